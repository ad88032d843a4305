"""The memory of quantize follows a few blocks, and not the base: its weights stay pages of their files."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil
import pytest

from requant.tasks.checkpoint.blocks import block_of
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.quantize import quantize
from requant.tasks.quantizing.events import BlockDone, Event
from tests.factories import pico
from tests.factories.bases import prepared
from tests.factories.quantizing import children

LAYERS = 64
# The weights of each block, in a wide MLP or in experts, take 3 MB. In float32, as on a CPU, they take 6 MB.
WIDE = 8192
SMALL = {"iters": 1, "nsamples": 2, "seqlen": 32, "batch_size": 2, "compare_last": False}


@pytest.mark.parametrize("experts", [0, pytest.param(4, marks=pytest.mark.slow)], ids=["dense", "experts"])
def test_a_process_that_quantizes_64_blocks_never_holds_as_much_as_they_weigh(
    experts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pico, "EXPERT", WIDE // 4)
    base = pico.pico_base(
        tmp_path / "base", layers=LAYERS, intermediate=64 if experts else WIDE, experts=experts, head=False
    )
    blocks_bytes = sum(t.nbytes for name, t in Checkpoint.open(base).tensors.items() if block_of(name) is not None)
    held: list[int] = []

    def look(event: Event) -> None:
        if isinstance(event, BlockDone):
            with contextlib.suppress(psutil.Error, OSError):
                held.extend(_anonymous_bytes(child.pid) for child in children(tmp_path))

    quantize(*prepared(tmp_path, base, **SMALL), look)
    assert len(held) > LAYERS // 2
    # If every block left its weights behind, it would be 1.2 times that (dense) or 1.5 times (experts).
    assert max(held) - min(held[:5]) < 0.9 * blocks_bytes, held


def _anonymous_bytes(pid: int) -> int:
    """Return the memory of a process that belongs to no file."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
