"""auto-round run in this process, as the quantize child runs it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

from tasks.quantize_child import quantize
from tasks.quantizing.events import Events
from tasks.recipe_quantize import Quantize
from tests.factories.paths import ROOT


def pack_with_auto_round(base: Path, asked: Quantize, folder: Path) -> dict[str, Any]:
    """What auto-round leaves of a base: the child's result, with the folder that it wrote as `checkpoint`."""
    from tasks.checkpoint.checkpoint import Checkpoint

    head = Checkpoint.open(base).head
    job = {
        **asked.model_dump(exclude={"calibration"}),
        **dict(zip(("bits", "group_size", "sym"), asked.resolved, strict=True)),
        "model": str(base),
        "texts": [str(ROOT / "tasks" / "texts" / "python.txt")],
        "mixed": False,
        "head": head.prefixes if head else [],
        "device": "cpu",
        "allow_remote_code": False,
        "gradient_accumulate_steps": 1,
    }
    folders = {"AR_RESUME_DIR": str(folder / "resume"), "AR_WORK_SPACE": str(folder / "offload")}
    with mock.patch.dict(os.environ, folders):
        return quantize(job, folder, Events(folder / "events.jsonl"))
