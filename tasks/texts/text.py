"""Texts to calibrate and to measure on, pinned by a digest of their content."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from requant.tasks.artifact import digest_of, sha256_of
from requant.tasks.errors import RecipeError
from requant.tasks.hub.revision import Revision, resolve, split_name
from requant.tasks.hub.sparse_checkout import stream
from requant.tasks.recipe.quantize_section import BUILTIN
from requant.tasks.recipe.recipe import BUILTIN_EVALUATION
from requant.tasks.texts.rows import COLUMNS, columns_of, needs_template

BUILTIN_FOLDER = Path(__file__).parent / "builtin"
EVALUATION = BUILTIN_FOLDER / "python-evaluation.txt"
READABLE = (".parquet", ".jsonl", ".json", ".txt")
MIXED = ("builtin:mixed",)  # samples are taken from each domain of these
CHATS = ("builtin:mixed", "builtin:mixed-evaluation")
MAX_DATASET_BYTES = 4_000_000_000  # calibration needs far less
# JSON files that describe a data set and have no rows. They are part of its digest, but are not read.
DESCRIPTIONS = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
# How much of a data set's first file is read to find its columns: at first, of a long first row, of a Parquet footer.
PEEK_BYTES = 1 << 16
MAX_ROW_BYTES = 4 << 20
MAX_FOOTER_BYTES = 16 << 20


@dataclass(frozen=True)
class Text:
    """A text: a local file (`path`), or the data files of a Hub data set (`dataset`).

    digest: of its content; chats: whether rows have messages, which the base's chat template renders; columns: the
    names of those of a data set's first file, if they are known.
    """

    name: str
    digest: str
    path: Path | None = None
    dataset: Revision | None = None
    chats: bool = False
    columns: tuple[str, ...] = ()

    @property
    def mixed(self) -> bool:
        """Whether samples are taken from each of its domains."""
        return self.name in MIXED


def find_text(name: str, key: str = "quantize.calibration") -> Text:
    """Find the text that a recipe's `key` names: `builtin:NAME`, a local file, or a Hub data set `id[@revision]`.

    A data set is resolved to a commit, and its digest is that of its data files. Raises RecipeError, HubError,
    HubUnavailable.
    """
    if name.startswith("builtin:"):
        if name not in BUILTIN + BUILTIN_EVALUATION:
            raise RecipeError(f"{key}: {name} does not exist: use {' or '.join(BUILTIN + BUILTIN_EVALUATION)}")
        path = BUILTIN_FOLDER / f"{name.removeprefix('builtin:')}.{'jsonl' if name in CHATS else 'txt'}"
        return _text(name, sha256_of(path), name in CHATS, path=path)
    if Path(name).is_absolute():
        try:
            digest = sha256_of(Path(name))
            return _text(Path(name).name, digest, needs_template([name]), path=Path(name))
        except (OSError, ValueError) as error:  # ValueError: the name has a NUL
            reason = getattr(error, "strerror", None) or error
            raise RecipeError(
                f"{key}: {name} cannot be read ({reason}) on this machine: put the file there, or name a Hub data set"
            ) from error
    repo_id, revision = split_name(name)
    dataset = resolve(repo_id, revision, "dataset")
    files = tuple(f for f in dataset.files if f.path.endswith(READABLE) and not f.path.startswith("."))
    if not any(has_rows(f.path) for f in files) or sum(f.size for f in files) > MAX_DATASET_BYTES:
        raise RecipeError(
            f"{key}: {name} has no readable data files ({', '.join(READABLE)}) "
            f"of together at most {MAX_DATASET_BYTES:,} bytes: name a smaller data set or a local file"
        )
    pinned = Revision(dataset.repo_id, dataset.sha, files, "dataset")
    digest = digest_of([(f.path, f.size, f.sha256 or f.blob_id) for f in files])  # an edited README does not change it
    columns = _columns(pinned)
    chats = COLUMNS[1] in columns and COLUMNS[0] not in columns
    return _text(f"{repo_id}@{dataset.sha}", f"dataset:{digest}", chats, dataset=pinned, columns=columns)


def _text(
    name: str,
    digest: str,
    chats: bool,
    path: Path | None = None,
    dataset: Revision | None = None,
    columns: tuple[str, ...] = (),
) -> Text:
    """Make a text.

    The digest of a text with chats has a prefix. Other digests have none, so that stage keys from before chats hold.
    """
    return Text(name, f"chats:{digest}" if chats else digest, path, dataset, chats, columns)


def has_rows(path: str) -> bool:
    """Check by its name whether a file of a data set has rows to read."""
    return path.endswith(READABLE) and Path(path).name not in DESCRIPTIONS


def _columns(dataset: Revision) -> tuple[str, ...]:
    """Find the columns of a data set in a few KB of its first file with rows; return none if these are not enough."""
    rows = [f for f in dataset.files if has_rows(f.path) and not f.path.endswith(".txt") and f.size]
    if not rows:
        return ()
    # A JSON file may describe the data set: files of other kinds, which can only be data, are preferred.
    file = min(rows, key=lambda f: (f.path.endswith(".json"), not f.path.endswith(".parquet"), f.path))
    suffix = Path(file.path).suffix
    if suffix != ".parquet":
        head, max_bytes, columns = b"", min(file.size, MAX_ROW_BYTES), tuple[str, ...]()
        while not columns and len(head) < max_bytes:
            head += b"".join(stream(dataset, file.path, len(head), min(max_bytes, 4 * len(head) or PEEK_BYTES)))
            columns = columns_of(head, b"", suffix, cut=len(head) >= max_bytes)
        return columns
    tail = b"".join(stream(dataset, file.path, max(0, file.size - PEEK_BYTES), file.size))
    footer_bytes = int.from_bytes(tail[-8:-4], "little") + 8
    if len(tail) < footer_bytes <= min(file.size, MAX_FOOTER_BYTES):
        tail = b"".join(stream(dataset, file.path, file.size - footer_bytes, file.size))
    return columns_of(b"", tail, suffix)
