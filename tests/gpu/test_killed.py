"""SIGKILL on a GPU, within a block and at the end of one: the next run continues and ends with the same bits."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra.bench.gpu_piece import Size, build_model
from requant.tasks.errors import QuantizeDied
from requant.tasks.quantize import quantize
from requant.tasks.quantizing.events import BlockDone, Event, EventSink, Resumed
from tests.factories.bases import prepared

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SIZE = Size(
    hidden=2048, intermediate=8192, heads=8, kv_heads=2, key_heads=8, value_heads=16, blocks=3, nsamples=32, iters=100
)
SETTINGS = {"nsamples": SIZE.nsamples, "seqlen": SIZE.seqlen, "iters": SIZE.iters, "batch_size": 8, "group_size": 128}


@pytest.fixture(scope="module", autouse=True)
def _same_bits(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Use deterministic kernels, as attention sums gradients in any order otherwise, and share one compile cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REQUANT_DETERMINISTIC", "1")
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a model with a linear-attention, a full-attention and another linear-attention block."""
    return build_model(tmp_path_factory.mktemp("base") / "base", "mixed", SIZE)


@pytest.fixture(scope="module")
def undisturbed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the digest of the artifact of a run that is not killed."""
    result = quantize(*prepared(tmp_path_factory.mktemp("undisturbed"), base, **SETTINGS))
    print(*result.provenance.document["blocks"], sep="\n")
    return result.manifest.digest


def kill_at(name: str, number: int, after_s: float, seen: list[Event]) -> EventSink:
    """Return a function that kills the quantize process `after_s` seconds after the event `name` of block `number`.

    It adds all events to `seen`.
    """

    def report(event: Event) -> None:
        seen.append(event)
        if event.event == name and number in (getattr(event, "index", None), getattr(event, "done", None)):
            time.sleep(after_s)
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "requant.tasks.quantizing.child" in process.cmdline():
                        process.kill()

    return report


@pytest.mark.parametrize(
    ("name", "number", "after_s", "finished"),
    [("block", 2, 1.0, 2), ("progress", 1, 0.0, 1)],
    ids=["in the middle of the last block", "as the first block ends"],
)
def test_it_goes_on_after_the_last_finished_block_and_ends_with_the_same_bits(
    name: str, number: int, after_s: float, finished: int, base: Path, undisturbed: str, tmp_path: Path
) -> None:
    stage = prepared(tmp_path, base, **SETTINGS)
    seen: list[Event] = []
    with pytest.raises(QuantizeDied, match="SIGKILL"):
        quantize(*stage, kill_at(name, number, after_s, seen))
    assert max(event.done for event in seen if isinstance(event, BlockDone)) == finished
    again: list[Event] = []
    result = quantize(*stage, again.append)
    print(*result.provenance.document["blocks"], *result.provenance.document["attempts"], sep="\n")
    (resumed,) = (event.blocks for event in again if isinstance(event, Resumed))
    assert finished - 1 <= resumed <= finished
    assert sum(block["starts"] for block in result.provenance.document["blocks"]) <= SIZE.blocks + 2
    assert result.manifest.digest == undisturbed
