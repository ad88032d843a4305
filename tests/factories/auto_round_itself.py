"""auto-round itself, as the quantize child runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from requant.tasks.quantizing.ladder import run_child
from requant.tasks.recipe.quantize import Quantize
from requant.tasks.texts.text import find_text
from tests.factories.forked import forked_children, quantize_server


def pack_with_auto_round(base: Path, asked: Quantize, folder: Path) -> dict[str, Any]:
    """What auto-round leaves of a base: the child's result, with the folder that it wrote as `checkpoint`."""
    from requant.tasks.checkpoint.checkpoint import Checkpoint

    head = Checkpoint.open(base).head
    job = {
        **asked.model_dump(exclude={"calibration"}),
        **dict(zip(("bits", "group_size", "sym"), asked.resolved, strict=True)),
        "model": str(base),
        "texts": [str(find_text("builtin:python").path)],
        "mixed": False,
        "head": head.prefixes if head else [],
        "device": "cpu",
        "allow_remote_code": False,
        "gradient_accumulate_steps": 1,
    }
    with forked_children(quantize_server()):
        assert run_child(job, folder, lambda event: None) is None
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result
