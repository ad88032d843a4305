"""Splits experts that are fused in 3-D tensors into one matrix each: the same bytes of the same file under other names.

Qwen3.5-MoE and Qwen3.6-MoE store E experts of width I, in a model of width H, as

    experts.gate_up_proj  [E, 2 I, H]  for each expert, the rows of its gate_proj and then those of its up_proj
    experts.down_proj     [E, H, I]

Source: transformers 5.23.0, Qwen3_5MoeExperts.forward and `qwen2_moe` in conversion_mapping.py.

auto-round 0.16.1 (modeling/fused_moe/qwen3_5_moe.py) packs `experts.{e}.gate_proj`, `up_proj` and `down_proj`. A
quantized checkpoint has these names too, which vLLM 0.32.0 (fused_moe/routed_experts.py, load_weights) and transformers
with auto-round read. Experts that are not quantized are split as well, without any change to their data: once a loader
of older vLLM versions has seen a fused tensor, it skips all tensors that are not fused.

Experts of the MTP head stay fused, as engines read them.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from dataclasses import replace

from requant.tasks.checkpoint.blocks import block_of
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.config import JsonObject
from requant.tasks.checkpoint.fp8 import WEIGHT_SCALE_SUFFIXES
from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.untrusted import shown
from requant.tasks.errors import CheckpointError

KNOWN = {"qwen3_5_moe_text"}  # values of model_type in the text config of models with the layout above
FUSED_EXPERTS = re.compile(r"(.+\.experts)\.(gate_up_proj|down_proj)")
MAX_MATRICES = 1_000_000  # ten times as many as in the largest models
MATRICES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def split_fused_experts(checkpoint: Checkpoint, skip: Container[str] = (), *, head_too: bool = False) -> Checkpoint:
    """Replace tensors of fused experts by one tensor for each matrix, and their FP8 scales likewise.

    Tensors named in `skip`, tensors with an unknown layout and, without `head_too`, those of the MTP head stay. Returns
    the same checkpoint if nothing is split.

    Raises CheckpointError if a matrix is there twice, fused and split, and for more than MAX_MATRICES matrices.
    """
    shapes, block = _shapes(checkpoint.text_config), checkpoint.config.fp8_block
    head = checkpoint.head.names if checkpoint.head and not head_too else ()
    views: dict[str, list[Tensor]] = {}
    count = 0
    for name, weight in checkpoint.tensors.items():
        match = FUSED_EXPERTS.fullmatch(name)
        if not match or weight.shape != shapes.get(match[2]) or name in head or name in skip or not block_of(name):
            continue
        matrices = MATRICES[match[2]]
        scales = {
            end: checkpoint.tensors[name + end] for end in WEIGHT_SCALE_SUFFIXES if name + end in checkpoint.tensors
        }
        if all(_divides(scale, weight, len(matrices), block) for scale in scales.values()):
            count += weight.shape[0] * len(matrices)
            if count > MAX_MATRICES:
                raise CheckpointError(f"{shown(name)} makes {count:,} matrices of experts, more than any model has")
            for end, tensor in {"": weight, **scales}.items():
                views[tensor.name] = list(_views(tensor, match[1], matrices, f"weight{end}"))
    if not views:
        return checkpoint
    twice = next((v.name for name in views for v in views[name] if v.name in checkpoint.tensors), None)
    if twice is not None:
        raise CheckpointError(f"{shown(twice)} is there by itself and fused with others: use a base that has it once")
    tensors = {view.name: view for name, tensor in checkpoint.tensors.items() for view in views.get(name, [tensor])}
    return replace(checkpoint, tensors=tensors)


def unknown_layout(checkpoint: Checkpoint) -> str | None:
    """Return what is wrong with fused experts that `split_fused_experts` has not split, or None if there are none."""
    head = checkpoint.head.names if checkpoint.head else ()
    for name, tensor in checkpoint.tensors.items():
        if len(tensor.shape) == 3 and "expert" in name and name not in head and block_of(name):
            return (
                f"the experts of the base lie fused in {shown(name)} {list(tensor.shape)}, and how is not known of "
                f"model type {shown(str(checkpoint.text_config.get('model_type')))} with its sizes: use a base with "
                "one tensor for each matrix of an expert"
            )
    return None


def _shapes(text_config: JsonObject) -> dict[str, tuple[int, ...]]:
    """Return the shapes of fused tensors by the name of the parameter; empty if the layout is not known."""
    stated = (text_config.integer(key) or 0 for key in ("num_experts", "moe_intermediate_size", "hidden_size"))
    sizes = [size for size in stated if size > 0]
    if text_config.string("model_type") not in KNOWN or len(sizes) < 3:
        return {}
    experts, width, hidden = sizes
    return {"gate_up_proj": (experts, 2 * width, hidden), "down_proj": (experts, hidden, width)}


def _divides(scale: Tensor, weight: Tensor, matrices: int, block: tuple[int, int] | None) -> bool:
    """Check whether no row of scales belongs to two matrices. `block`: rows and columns of a scale, if stated."""
    experts, rows = weight.shape[0], weight.shape[1] // matrices
    if len(scale.shape) != 3 or scale.shape[0] != experts or not scale.shape[1] or scale.shape[1] % matrices:
        return False
    return matrices == 1 or not rows % (block[0] if block else scale.shape[1] // matrices)


def _views(tensor: Tensor, experts: str, matrices: tuple[str, ...], part: str) -> Iterator[Tensor]:
    """Yield the matrices of a fused tensor, expert by expert, as ranges of its bytes."""
    count, rows, columns = tensor.shape
    size = tensor.nbytes // (count * len(matrices))
    names = (f"{experts}.{expert}.{matrix}.{part}" for expert in range(count) for matrix in matrices)
    for number, name in enumerate(names):
        begin = tensor.begin + number * size
        yield replace(tensor, name=name, shape=(rows // len(matrices), columns), begin=begin, end=begin + size)
