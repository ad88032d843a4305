"""Experts that lie fused in 3-D tensors, read as one matrix each: the same bytes of the same file, under other names.

Qwen3.5-MoE and Qwen3.6-MoE hold E experts of width I, in a model of width H, as

    experts.gate_up_proj  [E, 2 I, H]  of each expert the rows of its gate_proj, then those of its up_proj
    experts.down_proj     [E, H, I]

Source: transformers 5.23.0, Qwen3_5MoeExperts.forward and `qwen2_moe` in conversion_mapping.py. auto-round 0.16.1
(modeling/fused_moe/qwen3_5_moe.py) packs `experts.{e}.gate_proj`, `up_proj` and `down_proj`, and so they are named in
what is made, as vLLM 0.32.0 (fused_moe/routed_experts.py, load_weights) and transformers with auto-round read them. The
experts that stay in 16 bits come out one by one too, bit for bit: a loader of older vLLM, having seen a fused tensor,
passes over all that are not.

The head's stay fused, as engines read them.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import replace
from typing import Any

from requant.tasks.checkpoint.blocks import block_of
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.fp8 import WEIGHT_SCALE_SUFFIXES, block_size
from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.untrusted import shown
from requant.tasks.errors import CheckpointError

KNOWN = {"qwen3_5_moe_text"}  # model types of text models with the layout above
FUSED_EXPERTS = re.compile(r"(.+\.experts)\.(gate_up_proj|down_proj)")
MAX_MATRICES = 1_000_000  # matrices: ten times those of the largest models
MATRICES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def split_fused_experts(checkpoint: Checkpoint, held: Container[str] = (), *, head_too: bool = False) -> Checkpoint:
    """The checkpoint with a tensor for each matrix of an expert, and for its FP8 scales, in place of fused ones; the
    same checkpoint where there are none. Left alone: those named in `held`, layouts not known, and the head's.

    Raises CheckpointError for a checkpoint that has a matrix twice, fused and by itself, and for millions of them.
    """
    shapes, size = _shapes(checkpoint.text_config), block_size(checkpoint.config)
    head = checkpoint.head.names if checkpoint.head and not head_too else ()
    views: dict[str, list[Tensor]] = {}
    count = 0
    for name, weight in checkpoint.tensors.items():
        match = FUSED_EXPERTS.fullmatch(name)
        if not match or weight.shape != shapes.get(match[2]) or name in head or name in held or not block_of(name):
            continue
        matrices = MATRICES[match[2]]
        scales = {
            end: checkpoint.tensors[name + end] for end in WEIGHT_SCALE_SUFFIXES if name + end in checkpoint.tensors
        }
        if all(_divides(scale, weight, len(matrices), size) for scale in scales.values()):
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
    """Say what is wrong with fused experts that `split_fused_experts` has left; None where there are none."""
    head = checkpoint.head.names if checkpoint.head else ()
    for name, tensor in checkpoint.tensors.items():
        if len(tensor.shape) == 3 and "expert" in name and name not in head and block_of(name):
            return (
                f"the experts of the base lie fused in {shown(name)} {list(tensor.shape)}, and how is not known of "
                f"model type {shown(str(checkpoint.text_config.get('model_type')))} with its sizes: use a base with "
                "one tensor for each matrix of an expert"
            )
    return None


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes that fused tensors have by a text model's config; none where the layout is not known."""
    named = (config.get(key) for key in ("num_experts", "moe_intermediate_size", "hidden_size"))
    sizes = [size for size in named if type(size) is int and size > 0]
    if str(config.get("model_type")) not in KNOWN or len(sizes) < 3:
        return {}
    experts, width, hidden = sizes
    return {"gate_up_proj": (experts, 2 * width, hidden), "down_proj": (experts, hidden, width)}


def _divides(scale: Tensor, weight: Tensor, matrices: int, size: tuple[int, int] | None) -> bool:
    """Whether each matrix has rows of the scales to itself. `size`: rows and columns that one is for, if the config
    says; else told from the shapes."""
    experts, rows = weight.shape[0], weight.shape[1] // matrices
    if len(scale.shape) != 3 or scale.shape[0] != experts or not scale.shape[1] or scale.shape[1] % matrices:
        return False
    return matrices == 1 or not rows % (size[0] if size else scale.shape[1] // matrices)


def _views(tensor: Tensor, experts: str, matrices: tuple[str, ...], part: str) -> Iterator[Tensor]:
    """The matrices of a fused tensor, expert by expert, as ranges of its bytes."""
    count, rows, columns = tensor.shape
    size = tensor.nbytes // (count * len(matrices))
    names = (f"{experts}.{expert}.{matrix}.{part}" for expert in range(count) for matrix in matrices)
    for number, name in enumerate(names):
        begin = tensor.begin + number * size
        yield replace(tensor, name=name, shape=(rows // len(matrices), columns), begin=begin, end=begin + size)
