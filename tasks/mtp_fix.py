"""The stage mtp_fix: adds the MTP head to a quantized checkpoint as the recipe says, and the base's remaining files.

`keep` copies the head bit for bit from the base to a shard of its own; `int8` and `int4` quantize its layers. The
quantized shards are neither changed nor read: the new artifact refers to the same blobs, and the cost depends on the
size of the head alone.
"""

from __future__ import annotations

import logging
from pathlib import Path

from requant.tasks.artifact import REWRITTEN, File, Manifest, StageKey
from requant.tasks.checkpoint.checkpoint import INDEX, SINGLE, Checkpoint
from requant.tasks.checkpoint.head import HEAD_SHARD, HeadFiles, keep_head, shards_with_head, without_head
from requant.tasks.checkpoint.shards import without_vendors_own
from requant.tasks.pipeline.stage import Made, Stage, StageResult, put_files, run_stage
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.store import Store

STAGE = Stage("mtp_fix", 2)
log = logging.getLogger(__name__)


def mtp_fix_key(recipe: Recipe, base: Manifest, quantized: Manifest) -> StageKey:
    """Return the stage key."""
    verbatim = Manifest.of(f for f in base.files if f.path not in REWRITTEN)
    return STAGE.key(
        reads={"base": verbatim.digest, "quantized": quantized.digest},
        settings={"mtp": recipe.mtp} | ({"shards": shards} if (shards := _without_index(base)) != [SINGLE] else {}),
    )


def _without_index(base: Manifest) -> list[str]:
    """Return the weight files of a base without an index, where the head may be in any; SINGLE if it has an index."""
    files = [f.path for f in base.files if "/" not in f.path and f.path.endswith(".safetensors")]
    return [SINGLE] if INDEX in base else without_vendors_own(files) or [SINGLE]


def mtp_fix(store: Store, recipe: Recipe, base: Manifest, quantized: Manifest) -> StageResult:
    """Complete a quantized checkpoint. Raises CheckpointError if the base's tensors contradict its config."""

    def work(folder: Path) -> Made:
        store.link_files(quantized, folder / "quantized", ["config.json", INDEX])
        files = HeadFiles.read(folder / "quantized")
        index = [INDEX] if INDEX in base else []
        store.link_files(base, folder / "base", ["config.json", *index])
        shards = shards_with_head(folder / "base") if index else _without_index(base)
        store.link_files(base, folder / "base", shards)
        source = Checkpoint.open_shards(folder / "base", shards)

        out = folder / "out"
        if recipe.mtp == "drop" or source.head is None:
            written = without_head(files, source.head).write(out)
        else:
            written = keep_head(files, source, out, recipe.mtp)
        put_files(store, out, written)
        names = {f.path for f in written}
        kept = [f for f in quantized.files if f.path not in names]
        result = Manifest.of([*written, *kept, *_remaining(base, {*names, *(f.path for f in kept)})])
        head = {
            "asked": recipe.mtp,
            "in_base": source.head is not None,
            "layout": source.head.layout if source.head else None,
            "tensors": len(source.head.names) if source.head else 0,
            "bytes": next((f.size for f in written if f.path == HEAD_SHARD), 0),
        }
        return Made(result, {"mtp": head})

    return run_stage(store, STAGE, mtp_fix_key(recipe, base, quantized), work)


def _remaining(base: Manifest, present: set[str]) -> list[File]:
    """Return the files of the base that are copied verbatim: all except weights and files that were written."""
    weights = (".safetensors", ".safetensors.index.json")
    return [f for f in base.files if f.path not in REWRITTEN and f.path not in present and not f.path.endswith(weights)]
