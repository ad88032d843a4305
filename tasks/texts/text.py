"""Texts to calibrate and to measure on, pinned by a digest of their content."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from requant.tasks.artifact import Manifest, digest_of, sha256_of
from requant.tasks.errors import RecipeError
from requant.tasks.hub.revision import Revision, find_revision, split_name
from requant.tasks.hub.sparse_checkout import stream
from requant.tasks.recipe.quantize_section import BUILTIN, READABLE, SELF
from requant.tasks.recipe.recipe import BUILTIN_EVALUATION
from requant.tasks.texts.data_files import choose_files, read_card
from requant.tasks.texts.forms import form_of
from requant.tasks.texts.rows import (
    JSON_SUFFIXES,
    columns_of,
    decompressed_beginning,
    kind_of,
    lists_of,
    needs_template,
)

BUILTIN_FOLDER = Path(__file__).parent / "builtin"
EVALUATION = BUILTIN_FOLDER / "python-evaluation.txt"
MIXED = ("builtin:mixed",)  # samples are taken from each domain of these
CHATS = ("builtin:mixed", "builtin:mixed-evaluation")
# No natural text has more characters per token. A text with this many for each token that is needed has enough.
MAX_CHARACTERS_PER_TOKEN = 8
MAX_WHOLE_TEXT_BYTES = 1 << 24  # a larger .txt file of a data set, which is one row, is not read to its end
MAX_CARD_BYTES = 1 << 18  # the front matter of a data set's card is at its beginning
# JSON files that describe a data set and have no rows. They are part of its digest, but are not read.
DESCRIPTIONS = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
# How much of a data set's first file is read to find its columns: at first, of a long first row, of a Parquet footer.
PEEK_BYTES = 1 << 16
MAX_ROW_BYTES = 4 << 20
MAX_FOOTER_BYTES = 16 << 20


@dataclass(frozen=True)
class Text:
    """A text: a local file (`path`), a Hub data set (`dataset`), what the base wrote (`written`), or `domains`.

    digest: of its content, empty as long as the base has not written it; chats: whether rows have messages, which the
    base's chat template renders; columns: the names of those of a data set's first file, if they are known; field: the
    only column to read, if the recipe names one; domains: the text of each domain, if the recipe names one for each.
    """

    name: str
    digest: str
    path: Path | None = None
    dataset: Revision | None = None
    chats: bool = False
    columns: tuple[str, ...] = ()
    field: str | None = None
    written: Manifest | None = None
    license: str | None = None
    domains: tuple[tuple[str, Text], ...] = ()

    @property
    def label(self) -> str:
        """What logs and errors call it. Two local files in different folders can have one label."""
        return self.name if self.field is None else f"{self.name}, column {self.field}"

    @property
    def mixed(self) -> bool:
        """Whether samples are taken from each of its domains."""
        return self.name in MIXED or self.written is not None

    @property
    def waits_for_base(self) -> bool:
        """Whether the base is yet to write the text: see `Calibration.with_written`."""
        return not self.digest


def find_text(name: str, key: str = "quantize.calibration", field: str | None = None) -> Text:
    """Find the text that a recipe's `key` names: `builtin:NAME`, a local file or folder, or a Hub data set.

    The text `self` has no content yet. `field` is the only column to read.

    A data set is resolved to a commit, and its digest is that of its data files. Raises RecipeError, HubError,
    HubUnavailable.
    """
    if name == SELF and key == "quantize.calibration":
        return Text(name, "")
    if name.startswith("builtin:"):
        if name not in BUILTIN + BUILTIN_EVALUATION:
            raise RecipeError(f"{key}: {name} does not exist: use {' or '.join(BUILTIN + BUILTIN_EVALUATION)}")
        path = BUILTIN_FOLDER / f"{name.removeprefix('builtin:')}.{'jsonl' if name in CHATS else 'txt'}"
        return _text(Text(name, sha256_of(path), path=path, chats=name in CHATS))
    if Path(name).is_absolute():
        try:
            return _local_text(Path(name), key, field)
        except (OSError, ValueError) as error:  # ValueError: the name has a NUL
            reason = getattr(error, "strerror", None) or error
            raise RecipeError(
                f"{key}: {name} cannot be read ({reason}) on this machine: put the file there, or name a Hub data set"
            ) from error
    return _dataset(name, key, field)


def _dataset(name: str, key: str, field: str | None) -> Text:
    """Find the files of a Hub data set `id[@revision][:config][:split]` at its commit."""
    repo, *wanted = name.split(":")
    repo_id, revision = split_name(repo)
    found = find_revision(repo_id, revision, "dataset")
    card = read_card(_card_of(found))
    files = [file for file in found.files if file.path.endswith(READABLE) and not file.path.startswith(".")]
    paths = [file.path for file in files if has_rows(file.path)]
    try:
        if len(wanted) > 2:
            raise ValueError("has more than a configuration and a split behind it")
        chosen = set(choose_files(paths, card, wanted))
    except ValueError as error:
        raise RecipeError(f"{key}: {name} {error}") from error
    if not chosen:
        raise RecipeError(
            f"{key}: {name} has no readable data files ({', '.join(READABLE)}): name another data set or a local file"
        )
    if len(chosen) < len(paths):
        files = [file for file in files if file.path in chosen]
    dataset = Revision(found.repo_id, found.sha, tuple(files), "dataset")
    # An edited README does not change the digest, unless other files are chosen.
    digest = digest_of([(f.path, f.size, f.sha256 or f.blob_id) for f in files])
    if any(kind_of(f.path) == ".txt" and f.size > MAX_WHOLE_TEXT_BYTES for f in files):
        digest = f"beginning:{digest}"  # once, a .txt file was read whole
    columns, lists = _first_columns(dataset)
    return _text(
        Text(
            ":".join([f"{repo_id}@{found.sha}", *wanted]),
            f"dataset:{digest}",
            dataset=dataset,
            chats=field in lists if field is not None else form_of(columns) not in {None, "text"},
            columns=columns,
            field=field,
            license=card.license,
        )
    )


def _card_of(dataset: Revision) -> str:
    """Return the beginning of a data set's card; nothing if it has none."""
    readme = next((file for file in dataset.files if file.path == "README.md" and file.size), None)
    if readme is None:
        return ""
    return b"".join(stream(dataset, readme.path, 0, min(readme.size, MAX_CARD_BYTES))).decode(errors="replace")


def _text(text: Text) -> Text:
    """Return a text whose digest also says how it is read: whether it has chats, and which column is read.

    Other digests have no prefix, so that stage keys from before chats hold.
    """
    column = f"{text.field}:" if text.field is not None else ""
    return replace(text, digest=f"{'chats:' if text.chats else ''}{column}{text.digest}")


def _local_text(path: Path, key: str, field: str | None) -> Text:
    """Find a local file, or a folder of files that are read in the order of their names. Raises OSError, ValueError."""
    files = local_files(path)
    if path.is_dir():
        if not files:
            raise RecipeError(f"{key}: the folder {path} has no files to read ({', '.join(READABLE)})", path=path)
        digest = digest_of([[file.relative_to(path).as_posix(), sha256_of(file)] for file in files])
    else:
        # The name decides how a file is read: rows of JSON in a file with another name are one text.
        digest = f"{'whole:' if _has_json_rows_unread(path) else ''}{sha256_of(path)}"
    return _text(Text(path.name, digest, path=path, chats=needs_template(files, field), field=field))


def _has_json_rows_unread(path: Path) -> bool:
    """Check whether a file begins with a row of JSON, but is read as one text because of its name. Raises OSError."""
    if kind_of(path.name) in {*JSON_SUFFIXES, ".parquet"}:
        return False
    with path.open("rb") as stream:
        head = decompressed_beginning(stream.read(MAX_ROW_BYTES), path.name, MAX_ROW_BYTES)
    return bool(columns_of(head, b"", ".jsonl", cut=True))


def local_files(path: Path) -> list[Path]:
    """List the files with rows of a local text: itself, or if it is a folder those in it, without hidden ones."""
    if not path.is_dir():
        return [path]
    inside = ((file, file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    return sorted(
        file for file, name in inside if has_rows(name.as_posix()) and not any(p.startswith(".") for p in name.parts)
    )


def has_rows(path: str) -> bool:
    """Check by its name whether a file of a data set has rows to read."""
    return path.endswith(READABLE) and Path(path).name not in DESCRIPTIONS


def _first_columns(dataset: Revision) -> tuple[tuple[str, ...], Collection[str]]:
    """Find the columns of a data set in a few KB of its first file with rows, and which of them hold lists.

    Returns none if these are not enough.
    """
    rows = [f for f in dataset.files if has_rows(f.path) and kind_of(f.path) != ".txt" and f.size]
    if not rows:
        return (), ()
    # A JSON file may describe the data set: files of other kinds, which can only be data, are preferred.
    file = min(rows, key=lambda f: (kind_of(f.path) == ".json", kind_of(f.path) != ".parquet", f.path))
    kind = kind_of(file.path)
    if kind == ".parquet":
        tail = b"".join(stream(dataset, file.path, max(0, file.size - PEEK_BYTES), file.size))
        footer_bytes = int.from_bytes(tail[-8:-4], "little") + 8
        if len(tail) < footer_bytes <= min(file.size, MAX_FOOTER_BYTES):
            tail = b"".join(stream(dataset, file.path, file.size - footer_bytes, file.size))
        return columns_of(b"", tail, kind), lists_of(b"", tail, kind)
    head, max_bytes, columns = b"", min(file.size, MAX_ROW_BYTES), tuple[str, ...]()
    beginning = b""
    while not columns and len(head) < max_bytes:
        head += b"".join(stream(dataset, file.path, len(head), min(max_bytes, 4 * len(head) or PEEK_BYTES)))
        beginning = decompressed_beginning(head, file.path, MAX_ROW_BYTES)
        columns = columns_of(beginning, b"", kind, cut=len(head) >= max_bytes)
    return columns, lists_of(beginning, b"", kind)
