"""The stage merge: merge a LoRA adapter into the downloaded base. Later stages read the result in place of the base.

peft would load the whole model. Its formula is applied here to one matrix at a time, as the files are written, and
a test compares the result with that of `merge_and_unload`, bit for bit. Shards that do not change are not copied.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from requant.tasks.artifact import REWRITTEN, Manifest, StageKey
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.lora import CONFIG, PICKLE, WEIGHTS, Adapter, Update, shards_to_change
from requant.tasks.checkpoint.untrusted import shown
from requant.tasks.checkpoint.writer import Computed, Layout
from requant.tasks.download import STAGE as DOWNLOAD
from requant.tasks.download import fetch_unless_stored, find_base
from requant.tasks.errors import CheckpointError
from requant.tasks.hub.revision import Revision, find_revision
from requant.tasks.local_base import find_local_base
from requant.tasks.pipeline.stage import Made, Stage, StageResult, put_files, run_stage
from requant.tasks.progress import progress
from requant.tasks.recipe.base_section import Base
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.store import Store

STAGE = Stage("merge", 1)
ROWS_AT_ONCE = 256  # torch computes a sum of two dtypes in copies of both
log = logging.getLogger(__name__)


def find_merged_base(store: Store, recipe: Recipe, hash_limit_bytes: int | None = None) -> Revision:
    """Resolve a recipe's base, with the adapter that is merged into it if the recipe names one.

    `hash_limit_bytes` as in `find_base`. Raises what `find_base` and `find_adapter` raise.
    """
    base = find_base(store, recipe.base, hash_limit_bytes)
    return base if recipe.adapter is None else replace(base, adapter=find_adapter(store, recipe.adapter))


def find_adapter(store: Store, adapter: Base) -> Revision:
    """Resolve an adapter to its commit, or to a digest of its folder, with the two files that are read of it.

    Raises CheckpointError for what is no adapter in safetensors, and what `find_revision` and `find_local_base` raise.
    """
    if adapter.folder is None:
        return adapter_files(find_revision(adapter.name, adapter.revision))
    return adapter_files(find_local_base(store, adapter))


def adapter_files(revision: Revision) -> Revision:
    """Return a revision with the files of the adapter alone. Raises CheckpointError if it has none."""
    paths, name = {file.path for file in revision.files}, shown(revision.repo_id)
    if CONFIG not in paths:
        raise CheckpointError(f"{name} is no LoRA adapter of peft: it has no {CONFIG}")
    if WEIGHTS not in paths:
        found = f"only {PICKLE}, a pickle, which Requant does not open" if PICKLE in paths else "none"
        raise CheckpointError(f"the adapter {name} needs its weights as {WEIGHTS}, and has {found}: save it again")
    return replace(revision, files=tuple(file for file in revision.files if file.path in {CONFIG, WEIGHTS}))


def base_stage(recipe: Recipe) -> str:
    """Return the name of the stage that makes the files from which the recipe's model is quantized."""
    return DOWNLOAD.name if recipe.adapter is None else STAGE.name


def merge_key(base: Manifest, adapter: Revision) -> StageKey:
    """Return the stage key, of the content of a base, its card aside, and of an adapter."""
    return STAGE.key(reads={"base": _without_card(base).digest, "adapter": adapter.content}, settings={})


def merge(store: Store, base: Manifest, adapter: Revision) -> StageResult:
    """Merge an adapter into a downloaded base. The result has all files of the base but its card.

    Raises CheckpointError if the adapter cannot be merged (`Adapter`), HubError or HubUnavailable.
    """

    def work(folder: Path) -> Made:
        with progress("fetch the adapter", sum(file.size for file in adapter.files), "bytes") as bar:
            fetched = [fetch_unless_stored(store, adapter, folder / "fetched", bar, file)[0] for file in adapter.files]
        lora = Adapter.open(store.link_files(Manifest.of(fetched), folder / "adapter"))
        checkpoint = Checkpoint.open(store.link_files(_without_card(base), folder / "base"))
        updates = lora.updates(checkpoint)
        shards = {
            path: [_merged(tensor, updates.get(tensor.name)) for tensor in tensors]
            for path, tensors in shards_to_change(checkpoint, updates.values()).items()
        }
        written = Layout(shards, {}).write(folder / "merged")
        put_files(store, folder / "merged", written)
        changed = {file.path for file in written}
        files = [file for file in _without_card(base).files if file.path not in changed]
        log.info(f"merged {adapter.name} into {len(updates)} matrices")
        record = {"adapter": {"repo_id": adapter.repo_id, "sha": adapter.sha}, "matrices": len(updates)}
        return Made(Manifest.of([*files, *written]), record)

    return run_stage(store, STAGE, merge_key(base, adapter), work)


def with_card(merged: Manifest, base: Manifest) -> Manifest:
    """Return the files of a merged base, and of the base those that it lacks: the card."""
    return Manifest.of([*merged.files, *(file for file in base.files if file.path not in merged)])


def _without_card(base: Manifest) -> Manifest:
    return Manifest.of(file for file in base.files if file.path not in REWRITTEN)


def _merged(tensor: Tensor, update: Update | None) -> Tensor:
    """Return a tensor as it is with an update, computed when it is written, or without one as it is."""
    if update is None:
        return tensor
    return Computed.of(tensor.name, tensor.dtype, tensor.shape, lambda: [_merged_bytes(update)])


def _merged_bytes(update: Update) -> bytes:
    """Return a merged matrix in the base's dtype: `weight + scale * (b @ a)` in float32, rounded once.

    This is what peft 0.21.2 computes on a CPU after PeftModel.from_pretrained, which loads adapters as float32. Raises
    CheckpointError if a value is not finite.
    """
    import torch

    from requant.tasks.checkpoint.torch_tensor import to_torch

    delta = to_torch(update.b).float() @ to_torch(update.a).float()
    delta *= update.scale
    weight = to_torch(update.weight)
    for begin in range(0, len(weight), ROWS_AT_ONCE):
        rows = weight[begin : begin + ROWS_AT_ONCE]
        rows += delta[begin : begin + ROWS_AT_ONCE]
        if not torch.isfinite(rows).all():
            raise CheckpointError(
                f"{shown(update.weight.name)} has values that are not finite once the adapter is merged: train it again"
            )
    del delta  # it is twice as large as the weight
    return weight.view(torch.uint8).numpy().tobytes()
