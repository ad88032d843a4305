"""Checkpoints of a repair that are on the Hub: their data is downloaded when it is needed."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.repair_plan import RepairSource
from requant.tasks.checkpoint.untrusted import without_folder
from requant.tasks.errors import CheckpointError
from requant.tasks.hub.revision import Revision
from requant.tasks.hub.sparse_checkout import create_checkout, fetch_files, fill


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
