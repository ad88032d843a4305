"""Checks that a base is a checkpoint's, and compares their heads."""

from __future__ import annotations

from collections.abc import Iterable

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.head import Tensors
from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.untrusted import shown
from requant.tasks.checkpoint.writer import Computed
from requant.tasks.errors import CheckpointError

SIZES = ("hidden_size", "vocab_size", "num_hidden_layers")
# Dtypes of weights whose shape is the matrix's. Weights of 2 or 4 bits have smaller shapes under the same name.
UNPACKED_DTYPES = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}


def check_fits(checkpoint: Checkpoint, base: Checkpoint) -> None:
    """Check that a base has a head, the checkpoint's architecture, sizes and shapes. Raises CheckpointError if not."""
    if base.head is None:
        raise CheckpointError(f"the base {base.folder} has no MTP head: there is nothing to restore")
    foreign = f"{base.folder} is not the base of {checkpoint.folder}"
    ours, theirs = _type_of(checkpoint), _type_of(base)
    if ours and theirs and ours != theirs and _architecture(checkpoint) != _architecture(base):
        raise CheckpointError(f"{foreign}: model_type is {shown(theirs)} there and {shown(ours)} here")
    if checkpoint.head is not None and checkpoint.head.layout != base.head.layout:
        raise CheckpointError(
            f"{foreign}: its MTP head has the layout {base.head.layout}, and here it is {checkpoint.head.layout}"
        )
    for key in SIZES:
        size, there = checkpoint.text_config.get(key), base.text_config.get(key)
        if size != there:
            raise CheckpointError(f"{foreign}: {key} is {there} there and {size} here")
    for name, tensor in checkpoint.tensors.items():
        other = base.tensors.get(name)
        if other is not None and tensor.dtype in UNPACKED_DTYPES and other.shape != tensor.shape:
            raise CheckpointError(f"{foreign}: {name} is {list(other.shape)} there and {list(tensor.shape)} here")


def _type_of(checkpoint: Checkpoint) -> str:
    """Return the model type of the language model, which a multimodal model may name without `_text`."""
    stated = checkpoint.text_config.string("model_type") or checkpoint.config.string("model_type") or ""
    return stated.removesuffix("_text")


def _architecture(checkpoint: Checkpoint) -> object:
    """Return the name of the first architecture; an object of its own if there is none."""
    names = checkpoint.config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else object()


def alike_tensors(checkpoint: Checkpoint, wanted: Tensors) -> list[Tensor]:
    """Return the checkpoint's tensors that may be the wanted ones: name, dtype and shape are the same."""
    pairs = ((checkpoint.tensors.get(name), tensor) for name, tensor in wanted.items())
    return [ours for ours, tensor in pairs if ours is not None and _is_alike(ours, tensor)]


def stored_tensors(tensors: Iterable[Tensor], head_source: Iterable[Tensor]) -> list[Tensor]:
    """Return the stored tensors whose data these tensors need. Those that are computed are made of the head's."""
    wanted = list(tensors)
    made = head_source if any(isinstance(tensor, Computed) for tensor in wanted) else ()
    return list(dict.fromkeys([*(tensor for tensor in wanted if not isinstance(tensor, Computed)), *made]))


def differing_tensors(checkpoint: Checkpoint, wanted: Tensors) -> list[str]:
    """Return the names of the wanted tensors that the checkpoint lacks or has differently. Reads both."""
    differing = []
    for name, tensor in wanted.items():
        ours = checkpoint.tensors.get(name)
        if ours is None or (ours != tensor and not (_is_alike(ours, tensor) and _same_bytes(ours, tensor))):
            differing.append(name)
    return differing


def _is_alike(one: Tensor, other: Tensor) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape)


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    if one.nbytes != other.nbytes:
        return False
    ours, theirs = one.chunks(), other.chunks()
    rest = b""
    for chunk in ours:  # the chunks of the two may have different sizes
        while len(rest) < len(chunk):
            rest += next(theirs)
        if rest[: len(chunk)] != chunk:
            return False
        rest = rest[len(chunk) :]
    return True
