"""The base of a plan, as far as its list of files, its headers and its configs tell."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

from requant.tasks.artifact import REWRITTEN
from requant.tasks.checkpoint.checkpoint import Checkpoint, read_json
from requant.tasks.checkpoint.compat import PROCESSOR
from requant.tasks.errors import CheckpointError, HubError
from requant.tasks.hub.revision import Revision, resolve
from requant.tasks.hub.sparse_checkout import create_checkout, fetch_files
from requant.tasks.planning.base_diff import changed_fields, changed_files, changed_tensors, last_done
from requant.tasks.planning.document import BaseChanges
from requant.tasks.planning.transfers import Hashes, hashes_of, local_file
from requant.tasks.store import Store


@dataclass(frozen=True)
class BaseHeaders:
    """A base without its weights. `hashes`: the sha256 of each file that is known, by path; `source`: a skeleton, in
    which the files that this machine has are links into the store."""

    store: Store
    revision: Revision
    hashes: Hashes
    source: Checkpoint

    @classmethod
    def fetch(cls, store: Store, revision: Revision, folder: Path) -> BaseHeaders:
        """Lay the skeleton of a base into `folder`, which is made.

        Raises HubError, HubUnavailable, or CheckpointError for a base that is no checkpoint.
        """
        revision.check_names()
        hashes = hashes_of(store, revision)
        folder.mkdir()
        create_checkout(revision, folder, lambda file: local_file(store, file, hashes))
        processor = folder / PROCESSOR
        if processor.is_file() and not processor.is_symlink():
            fetch_files(revision, folder, [PROCESSOR])  # whether an engine will load depends on what it says
        return cls(store, revision, hashes, Checkpoint.open(folder))

    @cached_property
    def missing_bytes(self) -> int:
        """Add up the files that are not on this machine."""
        return sum(f.size for f in self.revision.wanted if local_file(self.store, f, self.hashes) is None)

    @cached_property
    def verbatim_files(self) -> Mapping[str, int]:
        """List the files that become the result's as they are: bytes by path."""
        weights = (".safetensors", ".safetensors.index.json")
        wanted = (f for f in self.revision.wanted if f.path not in REWRITTEN)
        return {f.path: f.size for f in wanted if not f.path.endswith(weights)}

    @cached_property
    def changes(self) -> BaseChanges | None:
        """Compare this commit with the one of this base that was downloaded last; None where none was.

        The headers of that one are asked of the Hub, as far as its files differ and are not on this machine.
        """
        found = last_done(self.store, self.revision)
        if found is None:
            return None
        sha, before = found
        files = changed_files(before, self.revision, self.hashes)
        config, tensors = None, None
        if files.added or files.removed or files.changed:
            known: Hashes = {file.path: file.sha256 for file in before.files}
            with TemporaryDirectory(prefix="requant-") as temporary, contextlib.suppress(CheckpointError, HubError):
                # The Hub may not have that commit any more.
                old = resolve(self.revision.repo_id, sha)
                folder = create_checkout(old, Path(temporary), lambda file: local_file(self.store, file, known))
                config = changed_fields(read_json(folder / "config.json"), self.source.config)
                tensors = changed_tensors(Checkpoint.open(folder), self.source, files.changed)
        return BaseChanges(since=sha, files=files, tensors=tensors, config=config or ())
