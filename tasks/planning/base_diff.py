"""Compare a new revision of a base with the last one that was downloaded: files, tensor headers, config fields."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from requant.tasks.artifact import Manifest
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.untrusted import shown
from requant.tasks.hub.revision import Revision
from requant.tasks.planning.document import FieldChange, FileChanges, TensorChanges
from requant.tasks.store import Store

MAX_LISTED = 100  # entries per list


def last_download(store: Store, base: Revision) -> tuple[str, Manifest] | None:
    """Find the last download of another commit of this base: the commit and its files. None if there was none."""
    downloads = [
        (record.started, record.base.sha, key)
        for key, record in store.records("download").items()
        if record.base and record.base.repo_id == base.repo_id and record.base.sha != base.sha
    ]
    if not downloads:
        return None
    _, sha, key = max(downloads)
    manifest = store.read_manifest("download", key)
    return (sha, manifest) if manifest is not None else None


def changed_files(before: Manifest, base: Revision, hashes: Mapping[str, str | None]) -> FileChanges:
    """Compare files by path and sha256; a file whose sha256 is not known is compared by size."""
    now = {file.path: (file.size, hashes.get(file.path)) for file in base.wanted}
    old = {file.path: (file.size, file.sha256) for file in before.files}
    both = now.keys() & old.keys()
    different = [p for p in both if now[p][0] != old[p][0] or (now[p][1] or old[p][1]) != old[p][1]]
    return FileChanges(
        added=tuple(sorted(now.keys() - old.keys())[:MAX_LISTED]),
        removed=tuple(sorted(old.keys() - now.keys())[:MAX_LISTED]),
        changed=tuple(sorted(different)[:MAX_LISTED]),
    )


def changed_tensors(before: Checkpoint, now: Checkpoint, shards: Collection[str]) -> TensorChanges:
    """Compare tensors by dtype and shape, and count those that lie in `shards`, the weight files that changed."""
    old, new = ({n: (t.dtype, t.shape) for n, t in c.tensors.items()} for c in (before, now))
    return TensorChanges(
        added=tuple(sorted(new.keys() - old.keys())[:MAX_LISTED]),
        removed=tuple(sorted(old.keys() - new.keys())[:MAX_LISTED]),
        retyped=tuple(sorted(n for n in new.keys() & old.keys() if new[n] != old[n])[:MAX_LISTED]),
        in_changed_shards=sum(_shard(t) in shards for t in now.tensors.values()),
    )


def changed_fields(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[FieldChange, ...]:
    """Compare two config.json, field by field."""
    old, new = dict(flat(before)), dict(flat(now))
    differing = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    return tuple(FieldChange(field=shown(k), before=old.get(k), now=new.get(k)) for k in differing[:MAX_LISTED])


def flat(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the fields of a JSON document, with dots in the names of nested ones, and their values as JSON."""
    for key, value in document.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", shown(json.dumps(value))


def _shard(tensor: Tensor) -> str:
    return tensor.path.name
