"""Repairs the MTP head of a checkpoint that was made elsewhere, in place.

Shards that hold a part of the old head are rewritten without it; the base's head goes into a shard of its own; index
and configs say so. New files are complete before the index names them, and no file is ever half-written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.checkpoint.assemble import configs_agree
from tasks.checkpoint.checkpoint import INDEX, SINGLE, Checkpoint, read_json
from tasks.checkpoint.engines import draft_problem, missing_vision_files, verdicts
from tasks.checkpoint.head import HEAD_SHARD, HeadFiles, keep_head, without_head
from tasks.checkpoint.header import Tensor
from tasks.checkpoint.mtp import Head
from tasks.checkpoint.packing import REQUIRED
from tasks.checkpoint.writer import index_of, write_file, write_shard
from tasks.errors import CheckpointError

RESTORED = "model-restored-{:05d}.safetensors"


def repair(folder: Path, base_folder: Path | None) -> dict[str, Any]:
    """Give `folder` the head of its base, bit for bit. Changes nothing if it has that already.

    Raises CheckpointError without a base where one is needed, and if base and checkpoint do not fit each other.
    """
    _finish_interrupted(folder)
    checkpoint = Checkpoint.open(folder).sound()
    if base_folder is None:
        return _without_base(checkpoint)
    base = Checkpoint.open(base_folder).sound()
    head = base.head
    if head is None:
        raise CheckpointError(f"the base {base_folder} has no MTP head: there is nothing to restore")
    if base.text_config.get("hidden_size") != checkpoint.text_config.get("hidden_size"):
        raise CheckpointError(f"{base_folder} is not the base of {folder}: their hidden_size differ")
    files = [name for name in missing_vision_files(checkpoint) if (base_folder / name).is_file()]
    for name in files:
        write_file(folder, name, [(base_folder / name).read_bytes()])
    restored = _differing(checkpoint, {n: base.tensors[n] for n in head.names})
    if restored or draft_problem(checkpoint) or checkpoint.problems or not configs_agree(checkpoint):
        _replace_head(checkpoint, base, head)
    elif not files:
        return _result(checkpoint, changed=False, restored=0)
    return _result(Checkpoint.open(folder), changed=True, restored=len(restored))


def _finish_interrupted(folder: Path) -> None:
    """Take away the single file of a checkpoint whose index, written by an earlier call, no longer names it."""
    if (folder / INDEX).exists() and (folder / SINGLE).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if isinstance(weight_map, dict) and HEAD_SHARD in weight_map.values() and SINGLE not in weight_map.values():
            (folder / SINGLE).unlink()


def _replace_head(checkpoint: Checkpoint, base: Checkpoint, head: Head) -> None:
    folder = checkpoint.folder
    old = set(checkpoint.head.names if checkpoint.head else ())
    layout: dict[str, list[Tensor]] = {}
    for tensor in checkpoint.tensors.values():
        layout.setdefault(tensor.path.name, []).append(tensor)
    stale = [shard for shard, tensors in layout.items() if any(t.name in old for t in tensors) or shard == SINGLE]
    body: dict[str, list[Tensor]] = {s: t for s, t in layout.items() if s not in stale}
    for number, shard in enumerate(stale, 1):
        rest = [t for t in layout[shard] if t.name not in old]
        if rest:
            name = _free_name(folder, number)
            write_shard(folder, name, rest)
            body[name] = rest
    files = HeadFiles(checkpoint.config, index_of(body))
    keep_head(without_head(files, head, keep_count=True), base, folder)
    for shard in stale:
        if shard != HEAD_SHARD:
            (folder / shard).unlink()


def _without_base(checkpoint: Checkpoint) -> dict[str, Any]:
    problem = draft_problem(checkpoint)
    if problem:
        raise CheckpointError(f"{checkpoint.folder}: {problem}; name the base with --base to restore its head")
    return _result(checkpoint, changed=False, restored=0)


def _differing(checkpoint: Checkpoint, head: dict[str, Tensor]) -> list[str]:
    """The head's tensors that the checkpoint has not, or not bit for bit, or has packed."""
    differing = []
    for name, tensor in head.items():
        ours = checkpoint.tensors.get(name)
        same = ours is not None and (ours.dtype, ours.shape) == (tensor.dtype, tensor.shape)
        if not same or ours is None or any(a != b for a, b in zip(ours.chunks(), tensor.chunks(), strict=True)):
            differing.append(name)
    packed = {n for n in (checkpoint.head.names if checkpoint.head else ()) if n.rsplit(".", 1)[1] in REQUIRED}
    return differing or sorted(packed)


def _free_name(folder: Path, number: int) -> str:
    while (folder / RESTORED.format(number)).exists():
        number += 1
    return RESTORED.format(number)


def _result(checkpoint: Checkpoint, *, changed: bool, restored: int) -> dict[str, Any]:
    return {
        "changed": changed,
        "tensors_restored": restored,
        "source": "base",
        "engines": verdicts(checkpoint),
    }
