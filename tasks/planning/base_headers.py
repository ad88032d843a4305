"""The base of a plan: its list of files, its headers and its configs."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

from requant.tasks.artifact import REWRITTEN, Manifest
from requant.tasks.checkpoint.checkpoint import Checkpoint, read_json
from requant.tasks.errors import CheckpointError, HubError
from requant.tasks.hub.revision import HubFile, Revision, resolve
from requant.tasks.hub.sparse_checkout import create_checkout
from requant.tasks.planning.base_diff import changed_fields, changed_files, changed_tensors, last_download
from requant.tasks.planning.document import BaseChanges
from requant.tasks.planning.merging import PlannedMerge
from requant.tasks.planning.transfers import Hashes, known_hashes, local_path
from requant.tasks.store import Store


@dataclass(frozen=True)
class BaseHeaders:
    """A base without its weights.

    `hashes` has the sha256 of each file by path, as far as it is known. `source` is a sparse checkout, in which the
    files that this machine has are links into the store. `merge` is there if an adapter is merged into it.
    """

    store: Store
    revision: Revision
    hashes: Hashes
    source: Checkpoint
    merge: PlannedMerge | None = None

    @classmethod
    def fetch(cls, store: Store, revision: Revision, folder: Path) -> BaseHeaders:
        """Create `folder` with a sparse checkout of the base in it.

        Raises HubError, HubUnavailable, or CheckpointError if the base is no checkpoint, or if its adapter cannot be
        merged into it.
        """
        revision.check_names()
        hashes = known_hashes(store, revision)
        folder.mkdir()
        create_checkout(revision, folder, lambda file: local_path(store, file, hashes))
        source = Checkpoint.open(folder)
        merge = None if revision.adapter is None else PlannedMerge.of(revision.adapter, source)
        return cls(store, revision, hashes, source, merge)

    @cached_property
    def missing_bytes(self) -> int:
        """Bytes of the files that are not on this machine."""
        return sum(f.size for f in self.revision.wanted if local_path(self.store, f, self.hashes) is None)

    @cached_property
    def verbatim_files(self) -> Mapping[str, int]:
        """Bytes of the files that the result copies from the base, by path."""
        weights = (".safetensors", ".safetensors.index.json")
        wanted = (f for f in self.revision.wanted if f.path not in REWRITTEN)
        return {f.path: f.size for f in wanted if not f.path.endswith(weights)}

    @cached_property
    def last_download(self) -> tuple[str, Manifest] | None:
        """The last download of another commit of this base: the commit and its files; None if there was none."""
        return last_download(self.store, self.revision)

    @cached_property
    def changes(self) -> BaseChanges | None:
        """What this commit changed since the last one of this base that was downloaded; None if there was none.

        If files differ, the headers of the earlier commit are fetched from the Hub unless they are on this machine.
        """
        if self.last_download is None:
            return None
        sha, before = self.last_download
        files = changed_files(before, self.revision, self.hashes)
        config, tensors = None, None
        if files.added or files.removed or files.changed:
            known: Hashes = {file.path: file.sha256 for file in before.files}
            with TemporaryDirectory(prefix="requant-") as temporary, contextlib.suppress(CheckpointError, HubError):
                # The Hub may no longer have that commit, nor the store an earlier state of a folder. Then only the
                # files are compared.
                old = self._stored(before) if self.revision.is_local else resolve(self.revision.repo_id, sha)
                folder = create_checkout(old, Path(temporary), lambda file: local_path(self.store, file, known))
                config = changed_fields(read_json(folder / "config.json"), self.source.config)
                tensors = changed_tensors(Checkpoint.open(folder), self.source, files.changed)
        return BaseChanges(since=sha, files=files, tensors=tensors, config=config or ())

    def _stored(self, before: Manifest) -> Revision:
        """Return an earlier state of a folder as a revision. Raises CheckpointError if this machine lacks a file."""
        if any(self.store.local_path(file) is None for file in before.files):
            raise CheckpointError(f"this machine has not all files of an earlier {self.revision.repo_id}: run it again")
        files = tuple(HubFile(file.path, file.size, "", file.sha256) for file in before.files)
        return Revision(self.revision.repo_id, "", files, is_local=True)
