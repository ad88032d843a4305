"""auto-round itself, as the quantize child runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from requant.tasks.quantizing.job import Job, Rung
from requant.tasks.quantizing.memory_fallback import run_child
from requant.tasks.quantizing.samples import SampleSource
from requant.tasks.recipe.quantize_section import Quantize
from requant.tasks.texts.text import find_text
from tests.factories.forked import forked_children, quantize_server


def pack_with_auto_round(base: Path, asked: Quantize, folder: Path) -> dict[str, Any]:
    """Let auto-round quantize a base. Returns the child's result, with the folder that it wrote as `checkpoint`."""
    from requant.tasks.checkpoint.checkpoint import Checkpoint

    head, text = Checkpoint.open(base).head, find_text("builtin:python").path
    assert text is not None
    settings = asked.model_copy(update={"device": "cpu"})
    job = Job(
        settings=settings,
        rung=Rung.asked(settings),
        model=base,
        sources=[SampleSource(name="builtin:python", paths=[text])],
        head=head.prefixes if head else [],
        allow_remote_code=False,
    )
    with forked_children(quantize_server()):
        assert run_child(job, folder, lambda event: None) is None
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result
