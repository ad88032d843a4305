"""Texts to calibrate and to measure on, pinned by what they hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from requant.tasks.artifact import digest_of, sha256_of
from requant.tasks.errors import RecipeError
from requant.tasks.hub.revision import Revision, resolve
from requant.tasks.hub.sparse_checkout import stream
from requant.tasks.recipe.quantize import BUILTIN
from requant.tasks.recipe.recipe import BUILTIN_EVALUATION
from requant.tasks.texts.rows import COLUMNS, columns_of, needs_template

TEXTS = Path(__file__).parent / "builtin"
EVALUATION = TEXTS / "python-evaluation.txt"
READABLE = (".parquet", ".jsonl", ".json", ".txt")
MIXED = ("builtin:mixed",)  # of these, samples are taken from each domain
CHATS = ("builtin:mixed", "builtin:mixed-evaluation")
MAX_DATASET = 4_000_000_000  # bytes: more is not for calibration
# What describes a data set is JSON too, and no rows: it is part of what pins a data set, and is not read.
DESCRIPTIONS = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
PEEK = 1 << 16  # bytes of a data set's first file that tell its columns
MAX_ROW = 4 << 20  # bytes of its first row, where that is longer
MAX_FOOTER = 16 << 20  # bytes of a Parquet file's footer: larger ones tell nothing


@dataclass(frozen=True)
class Text:
    """A text by name: `digest` says what it holds; it is a local file, or the data files of a Hub data set.

    `chats`: rows of it are messages, which the base's chat template renders. `columns`: those of a data set's first
    file, as far as they are known.
    """

    name: str
    digest: str
    path: Path | None = None
    dataset: Revision | None = None
    chats: bool = False
    columns: tuple[str, ...] = ()

    @property
    def mixed(self) -> bool:
        """Tell whether samples are taken from each of its domains."""
        return self.name in MIXED


def find_text(name: str, key: str = "quantize.calibration") -> Text:
    """Find the text that a recipe's `key` names: `builtin:NAME`, a local file, or a Hub data set `id[@revision]`.

    A data set is resolved to a commit; its digest is that of its data files. Raises RecipeError, HubError or
    HubUnavailable.
    """
    if name.startswith("builtin:"):
        if name not in BUILTIN + BUILTIN_EVALUATION:
            raise RecipeError(f"{key}: {name} does not exist: use {' or '.join(BUILTIN + BUILTIN_EVALUATION)}")
        path = TEXTS / f"{name.removeprefix('builtin:')}.{'jsonl' if name in CHATS else 'txt'}"
        return _text(name, sha256_of(path), name in CHATS, path=path)
    if Path(name).is_absolute():
        try:
            held = sha256_of(Path(name))
            return _text(Path(name).name, held, needs_template([name]), path=Path(name))
        except (OSError, ValueError) as error:  # a NUL in the name
            reason = getattr(error, "strerror", None) or error
            raise RecipeError(
                f"{key}: {name} cannot be read ({reason}) on this machine: put the file there, or name a Hub data set"
            ) from error
    repo_id, _, revision = name.partition("@")
    dataset = resolve(repo_id, revision or "main", "dataset")
    files = tuple(f for f in dataset.files if f.path.endswith(READABLE) and not f.path.startswith("."))
    if not any(has_rows(f.path) for f in files) or sum(f.size for f in files) > MAX_DATASET:
        raise RecipeError(
            f"{key}: {name} has no readable data files ({', '.join(READABLE)}) "
            f"of together at most {MAX_DATASET:,} bytes: name a smaller data set or a local file"
        )
    pinned = Revision(dataset.repo_id, dataset.sha, files, "dataset")
    held = digest_of([(f.path, f.size, f.sha256 or f.blob_id) for f in files])  # an edited README changes nothing
    columns = _columns(pinned)
    chats = COLUMNS[1] in columns and COLUMNS[0] not in columns
    return _text(f"{repo_id}@{dataset.sha}", f"dataset:{held}", chats, dataset=pinned, columns=columns)


def _text(
    name: str,
    held: str,
    chats: bool,
    path: Path | None = None,
    dataset: Revision | None = None,
    columns: tuple[str, ...] = (),
) -> Text:
    """Make a text. Chats came later than texts: only the digest of a text that has chats says so."""
    return Text(name, f"chats:{held}" if chats else held, path, dataset, chats, columns)


def has_rows(path: str) -> bool:
    """Tell whether a file of a data set is read, by its name."""
    return path.endswith(READABLE) and Path(path).name not in DESCRIPTIONS


def _columns(dataset: Revision) -> tuple[str, ...]:
    """Tell the columns of a data set from a few KB of its first file with rows; none where these do not tell."""
    rows = [f for f in dataset.files if has_rows(f.path) and not f.path.endswith(".txt") and f.size]
    if not rows:
        return ()
    # A JSON file may be about the data set: files that can only be data tell more.
    file = min(rows, key=lambda f: (f.path.endswith(".json"), not f.path.endswith(".parquet"), f.path))
    suffix = Path(file.path).suffix
    if suffix != ".parquet":
        head, most, columns = b"", min(file.size, MAX_ROW), tuple[str, ...]()
        while not columns and len(head) < most:
            head += b"".join(stream(dataset, file.path, len(head), min(most, 4 * len(head) or PEEK)))
            columns = columns_of(head, b"", suffix, cut=len(head) >= most)
        return columns
    tail = b"".join(stream(dataset, file.path, max(0, file.size - PEEK), file.size))
    footer = int.from_bytes(tail[-8:-4], "little") + 8
    if len(tail) < footer <= min(file.size, MAX_FOOTER):
        tail = b"".join(stream(dataset, file.path, file.size - footer, file.size))
    return columns_of(b"", tail, suffix)
