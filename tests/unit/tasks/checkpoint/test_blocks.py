"""How much of a checkpoint is in memory at once if its blocks come and go."""

from __future__ import annotations

from pathlib import Path

from requant.tasks.checkpoint.blocks import streaming_parameters
from requant.tasks.checkpoint.checkpoint import Checkpoint
from tests.factories.checkpoints import edited
from tests.factories.heads import HIDDEN, INTERMEDIATE, VOCAB, make_base


def test_a_heads_copies_of_embeddings_and_output_layer_are_not_counted(tmp_path: Path) -> None:
    """A layer of the head is, like a block: it is the largest here. Its copies are never loaded."""
    base = make_base(tmp_path / "base", "inlined", shards=1)
    outside = 2 * VOCAB * HIDDEN + HIDDEN
    layer = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE + 2 * HIDDEN  # attention, MLP, norms
    around = 2 * HIDDEN * HIDDEN + 3 * HIDDEN  # fusion, norms
    assert streaming_parameters(Checkpoint.open(base)) == outside + 2 * (layer + around)
    with edited(base, "model-00001-of-00001.safetensors") as tensors:
        for name in ("embed_tokens", "shared_head.head"):
            tensors[f"model.layers.2.{name}.weight"] = tensors["lm_head.weight"]
    assert streaming_parameters(Checkpoint.open(base)) == outside + 2 * (layer + around)
