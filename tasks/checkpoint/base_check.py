"""Checks whether a checkpoint can be the base of a run."""

from __future__ import annotations

from requant.tasks.checkpoint.advice import without_advice
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.completeness import missing_tensors
from requant.tasks.checkpoint.fp8 import dequantize_fp8
from requant.tasks.checkpoint.head import check_head
from requant.tasks.checkpoint.heads.drafters import drafter_kind, is_no_base
from requant.tasks.checkpoint.methods import full_name
from requant.tasks.checkpoint.untrusted import shown, without_folder
from requant.tasks.errors import CheckpointError

# Dtypes in which quantized weights are packed. FP8 is not among them: an FP8 base is dequantized.
PACKED_DTYPES = {"U8", "I8", "U16", "I16", "U32", "I32", "F4", "F6_E2M3", "F6_E3M2"}


def check_base(base: Checkpoint, repo_id: str, *, with_head: bool) -> None:
    """Check before hours of work that a base is whole and can be quantized, its MTP head too if `with_head`.

    Raises CheckpointError, which names the base by `repo_id`.
    """
    check_kind(base, repo_id)
    try:
        base.sound()
        if missing := missing_tensors(base):
            more = f" (and {len(missing) - 1} more: see requant inspect)" if len(missing) > 1 else ""
            raise CheckpointError(f"it lacks {shown(missing[0])}{more}: name a base that has all tensors")
        if with_head:
            check_head(base)
    except CheckpointError as error:
        raise unusable(repo_id, without_folder(str(error), base.folder, "it")) from error


def check_kind(base: Checkpoint, repo_id: str) -> None:
    """Check that a base is no draft model, and is not quantized already, FP8 aside. Raises CheckpointError."""
    if (kind := drafter_kind(base.config)) is not None:
        raise unusable(repo_id, f"it is {is_no_base(kind)}: name the base that it drafts for")
    try:
        quantized = _is_packed(base) or any(module.quantized for module in dequantize_fp8(base).modules.values())
    except CheckpointError as error:
        raise unusable(repo_id, without_folder(str(error), base.folder, "it")) from error
    if quantized:
        how = f" ({shown(full_name(base.method, base.quantization))})" if base.method else ""
        raise unusable(repo_id, f"it is already quantized{how}: name the model that it was made of")


def unusable(repo_id: str, reason: str) -> CheckpointError:
    """Return the error that says why a base cannot be used. It does not advise to repair what is the Hub's."""
    return CheckpointError(f"the base {repo_id} cannot be used: {without_advice(reason)}")


def _is_packed(base: Checkpoint) -> bool:
    """Check whether a base whose config or files name a method has matrices of packed weights, of any method."""
    return base.method is not None and any(
        tensor.dtype in PACKED_DTYPES and len(tensor.shape) > 1 for tensor in base.tensors.values()
    )
