"""Texts to calibrate and to measure on, pinned by what they hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tasks.artifact import sha256_of
from tasks.errors import RecipeError
from tasks.hub.revision import Revision, resolve

BUILTIN = {"python": "python.txt"}
EVALUATION = Path(__file__).parent / "texts" / "python-evaluation.txt"
READABLE = (".parquet", ".jsonl", ".json", ".txt")
MAX_DATASET = 4_000_000_000  # bytes: more is not for calibration


@dataclass(frozen=True)
class Text:
    """A text by name: `digest` says what it holds; it is a local file, or the data files of a Hub data set."""

    name: str
    digest: str
    path: Path | None = None
    dataset: Revision | None = None


def find_text(name: str) -> Text:
    """Find a calibration text: `builtin:NAME`, a local file, or a Hub data set `id[@revision]`.

    A data set is resolved to a commit, which is its digest. Raises RecipeError, HubError or HubUnavailable.
    """
    if name.startswith("builtin:"):
        file = BUILTIN.get(name.removeprefix("builtin:"))
        if file is None:
            raise RecipeError(f"quantize.calibration: {name} does not exist: use builtin:{', builtin:'.join(BUILTIN)}")
        path = Path(__file__).parent / "texts" / file
        return Text(name, sha256_of(path), path=path)
    if Path(name).is_absolute():
        return Text(Path(name).name, sha256_of(Path(name)), path=Path(name))
    repo_id, _, revision = name.partition("@")
    dataset = resolve(repo_id, revision or "main", "dataset")
    files = tuple(f for f in dataset.files if f.path.endswith(READABLE) and not f.path.startswith("."))
    if not files or sum(f.size for f in files) > MAX_DATASET:
        raise RecipeError(
            f"quantize.calibration: {name} has no readable data files ({', '.join(READABLE)}) "
            f"of together at most {MAX_DATASET:,} bytes: name a smaller data set or a local file"
        )
    pinned = Revision(dataset.repo_id, dataset.sha, files, "dataset")
    return Text(f"{repo_id}@{dataset.sha}", f"dataset:{pinned.name}", dataset=pinned)
