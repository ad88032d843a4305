"""Texts to calibrate and to measure on, pinned by what they hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tasks.artifact import digest_of, sha256_of
from tasks.errors import RecipeError
from tasks.hub.revision import Revision, resolve
from tasks.recipe import BUILTIN_EVALUATION
from tasks.recipe_quantize import BUILTIN

TEXTS = Path(__file__).parent / "texts"
EVALUATION = TEXTS / "python-evaluation.txt"
READABLE = (".parquet", ".jsonl", ".json", ".txt")
MAX_DATASET = 4_000_000_000  # bytes: more is not for calibration


@dataclass(frozen=True)
class Text:
    """A text by name: `digest` says what it holds; it is a local file, or the data files of a Hub data set."""

    name: str
    digest: str
    path: Path | None = None
    dataset: Revision | None = None


def find_text(name: str, key: str = "quantize.calibration") -> Text:
    """Find the text that a recipe's `key` names: `builtin:NAME`, a local file, or a Hub data set `id[@revision]`.

    A data set is resolved to a commit; its digest is that of its data files. Raises RecipeError, HubError or
    HubUnavailable.
    """
    if name.startswith("builtin:"):
        if name not in BUILTIN + BUILTIN_EVALUATION:
            raise RecipeError(f"{key}: {name} does not exist: use {' or '.join(BUILTIN + BUILTIN_EVALUATION)}")
        path = TEXTS / f"{name.removeprefix('builtin:')}.txt"
        return Text(name, sha256_of(path), path=path)
    if Path(name).is_absolute():
        try:
            return Text(Path(name).name, sha256_of(Path(name)), path=Path(name))
        except (OSError, ValueError) as error:  # a NUL in the name
            reason = getattr(error, "strerror", None) or error
            raise RecipeError(
                f"{key}: {name} cannot be read ({reason}) on this machine: put the file there, or name a Hub data set"
            ) from error
    repo_id, _, revision = name.partition("@")
    dataset = resolve(repo_id, revision or "main", "dataset")
    files = tuple(f for f in dataset.files if f.path.endswith(READABLE) and not f.path.startswith("."))
    if not files or sum(f.size for f in files) > MAX_DATASET:
        raise RecipeError(
            f"{key}: {name} has no readable data files ({', '.join(READABLE)}) "
            f"of together at most {MAX_DATASET:,} bytes: name a smaller data set or a local file"
        )
    pinned = Revision(dataset.repo_id, dataset.sha, files, "dataset")
    held = digest_of([(f.path, f.size, f.sha256 or f.blob_id) for f in files])  # an edited README changes nothing
    return Text(f"{repo_id}@{dataset.sha}", f"dataset:{held}", dataset=pinned)
