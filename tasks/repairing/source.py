"""Checkpoints of a repair by name: a folder, or a repo on the Hub of which data is downloaded when it is needed."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.repair_plan import RepairSource
from requant.tasks.checkpoint.untrusted import without_folder
from requant.tasks.errors import CheckpointError
from requant.tasks.hub.revision import Revision, resolve_name
from requant.tasks.hub.sparse_checkout import create_checkout, fetch_files, fill


def find_source(name: str | Path) -> Path | Revision:
    """Return the folder with this name, otherwise the revision of the repo `repo_id[@revision]`.

    Raises RequantError, HubError, HubUnavailable.
    """
    return Path(name) if Path(name).is_dir() else resolve_name(str(name))


@contextlib.contextmanager
def repair_source(found: Path | Revision | None) -> Iterator[RepairSource | None]:
    """Yield a checkpoint of a repair. The sparse checkout of a repo lasts for the block."""
    if isinstance(found, Revision):
        with sparse_source(found) as source:
            yield source
    else:
        yield RepairSource(found) if found else None


@contextlib.contextmanager
def sparse_source(revision: Revision) -> Iterator[RepairSource]:
    """Yield a sparse checkout of a revision, in a temporary folder of which no error speaks."""
    with tempfile.TemporaryDirectory(prefix="requant-") as temporary:
        folder = create_checkout(revision, Path(temporary).resolve() / "repo")
        fetched: set[Tensor] = set()

        def fetch(tensors: Iterable[Tensor], files: Iterable[str]) -> None:
            wanted = set(tensors) - fetched
            fill(revision, folder, wanted)
            fetch_files(revision, folder, files)
            fetched.update(wanted)

        source = RepairSource(folder, fetch, revision.name)
        try:
            yield source
        except CheckpointError as error:
            raise CheckpointError(without_folder(str(error), folder, source.name), tensor=error.tensor) from error
