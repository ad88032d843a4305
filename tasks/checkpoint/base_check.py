"""Checks whether a checkpoint can be the base of a run."""

from __future__ import annotations

import os

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.fp8 import dequantize_fp8
from requant.tasks.checkpoint.head import check_head
from requant.tasks.checkpoint.heads.drafters import drafter_kind, is_no_base
from requant.tasks.errors import CheckpointError


def check_base(base: Checkpoint, repo_id: str, *, with_head: bool) -> None:
    """Check before hours of work that a base can be quantized and, if `with_head`, that its MTP head is complete.

    Raises CheckpointError, which names the base by `repo_id`.
    """
    try:
        base.sound()
        if (kind := drafter_kind(base.config)) is not None:
            raise CheckpointError(f"it is {is_no_base(kind)}: name the base that it drafts for")
        if any(module.quantized for module in dequantize_fp8(base).modules.values()):
            raise CheckpointError("it is already quantized: name the base that it was made of")
        if with_head:
            check_head(base)
    except CheckpointError as error:
        sentence = str(error).replace(f"{base.folder}{os.sep}", "").replace(str(base.folder), "it")
        raise CheckpointError(f"the base {repo_id} cannot be used: {sentence}") from error
