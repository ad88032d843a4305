"""SIGKILL on a GPU, in the middle of a block and as one ends: the next run goes on, to the same bits."""

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
    """Without it attention's gradients are summed in another order each time. One compile cache for all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REQUANT_DETERMINISTIC", "1")
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Linear attention, full attention, linear attention."""
    return build_model(tmp_path_factory.mktemp("base") / "base", "mixed", SIZE)


@pytest.fixture(scope="module")
def undisturbed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of a run that nobody disturbs."""
    result = quantize(*prepared(tmp_path_factory.mktemp("undisturbed"), base, **SETTINGS))
    print(*result.provenance["blocks"], sep="\n")
    return result.manifest.digest


def kill_at(name: str, number: int, after: float, seen: list[Event]) -> EventSink:
    """Kill the quantize process so many seconds after the event `name` of the block `number`, once."""

    def report(event: Event) -> None:
        seen.append(event)
        if event.event == name and number in (getattr(event, "index", None), getattr(event, "done", None)):
            time.sleep(after)
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "requant.tasks.quantizing.child" in process.cmdline():
                        process.kill()

    return report


@pytest.mark.parametrize(
    ("name", "number", "after", "finished"),
    [("block", 2, 1.0, 2), ("progress", 1, 0.0, 1)],
    ids=["in the middle of the last block", "as the first block ends"],
)
def test_it_goes_on_after_the_last_finished_block_and_ends_with_the_same_bits(
    name: str, number: int, after: float, finished: int, base: Path, undisturbed: str, tmp_path: Path
) -> None:
    stage = prepared(tmp_path, base, **SETTINGS)
    seen: list[Event] = []
    with pytest.raises(QuantizeDied, match="SIGKILL"):
        quantize(*stage, kill_at(name, number, after, seen))
    assert max(event.done for event in seen if isinstance(event, BlockDone)) == finished
    again: list[Event] = []
    result = quantize(*stage, again.append)
    print(*result.provenance["blocks"], *result.provenance["attempts"], sep="\n")
    (resumed,) = (event.blocks for event in again if isinstance(event, Resumed))
    assert finished - 1 <= resumed <= finished
    assert sum(block["starts"] for block in result.provenance["blocks"]) <= SIZE.blocks + 2
    assert result.manifest.digest == undisturbed
