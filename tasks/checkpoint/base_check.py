"""Checks whether a checkpoint can be the base of a run."""

from __future__ import annotations

import os

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.completeness import missing_tensors
from requant.tasks.checkpoint.fp8 import dequantize_fp8
from requant.tasks.checkpoint.head import check_head
from requant.tasks.checkpoint.untrusted import shown
from requant.tasks.errors import CheckpointError


def check_base(base: Checkpoint, repo_id: str, *, with_head: bool) -> None:
    """Check before hours of work that a base is whole and can be quantized, its MTP head too if `with_head`.

    Raises CheckpointError, which names the base by `repo_id`.
    """
    try:
        base.sound()
        if any(module.quantized for module in dequantize_fp8(base).modules.values()):
            raise CheckpointError("it is already quantized: name the base that it was made of")
        if missing := missing_tensors(base):
            more = f" (and {len(missing) - 1} more: see requant inspect)" if len(missing) > 1 else ""
            raise CheckpointError(f"it lacks {shown(missing[0])}{more}: name a base that has all tensors")
        if with_head:
            check_head(base)
    except CheckpointError as error:
        sentence = str(error).replace(f"{base.folder}{os.sep}", "").replace(str(base.folder), "it")
        raise CheckpointError(f"the base {repo_id} cannot be used: {sentence}") from error
