"""Blocks that several processes tune together: on a CPU with gloo, as on GPUs with NCCL."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from requant.tasks.errors import QuantizeDied
from requant.tasks.quantize import quantize, quantize_key
from requant.tasks.quantizing.events import BlockDone, Event, EventWriter, Failed, SettingsChosen, read_events
from requant.tasks.quantizing.failures import FailureKind
from tests.factories.bases import prepared
from tests.factories.paths import ROOT
from tests.factories.pico import pico_base

# The watch of a first process, with peers that run the code in the arguments.
WATCH = """
import subprocess, sys, time
from pathlib import Path
from requant.tasks.quantizing import peers
from requant.tasks.quantizing.events import EventWriter
work = Path(sys.argv[1])
running = {n: subprocess.Popen([sys.executable, "-c", code]) for n, code in enumerate(sys.argv[2:], 1)}
peers._watch(running, work, EventWriter(work / "events.jsonl").write)
"""


def peers_in(folder: Path) -> list[psutil.Process]:
    """The peers whose work folder is below this one."""
    words = {one: one.info["cmdline"] or [] for one in psutil.process_iter(["cmdline"])}
    return [one for one, line in words.items() if line[-1:] and line[-1].startswith(f"{folder}/")]


@pytest.mark.usefixtures("quantize_forks")
def test_two_processes_tune_as_one_does_and_one_goes_on_where_a_peer_was_killed(tmp_path: Path) -> None:
    base = pico_base(tmp_path / "base", experts=4)
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    store, recipe, files, text = prepared(folders[0], base, iters=10, nsamples=10, seqlen=64, gpus=1)
    alone = quantize(store, recipe, files, text).provenance.document
    store, both, files, text = prepared(folders[1], base, iters=10, nsamples=10, seqlen=64, gpus=2)
    assert quantize_key(both, files, text) == quantize_key(recipe, files, text)

    seen: list[Event] = []

    def kill_peer(event: Event) -> None:
        seen.append(event)
        if isinstance(event, BlockDone):
            (peer,) = peers_in(tmp_path)
            peer.send_signal(signal.SIGKILL)

    with pytest.raises(QuantizeDied, match="ended with SIGKILL"):
        quantize(store, both, files, text, kill_peer)
    chosen = [event for event in seen if isinstance(event, SettingsChosen)]
    assert [event.gpus for event in chosen] == [2]
    resumed = quantize(store, recipe, files, text).provenance.document
    assert peers_in(tmp_path) == []
    blocks = list(zip(alone["blocks"], resumed["blocks"], strict=True))  # type: ignore[call-overload]
    assert [block["starts"] for _, block in blocks] == [1, 2]
    for one, two in blocks:
        assert two["loss_before"] == pytest.approx(one["loss_before"], rel=0.2)
        assert two["output_error"] == pytest.approx(one["output_error"], rel=0.1)
    assert resumed["experts"] == alone["experts"]


@pytest.mark.parametrize(
    ("peers", "code", "kind"),
    [
        (["", ""], 0, None),
        (["import sys; sys.exit(1)", "import time; time.sleep(99)"], 1, FailureKind.FAILED),
        (["import sys, time; time.sleep(0.1); sys.exit(1)", "import sys; sys.exit(1)"], 1, FailureKind.GPU_MEMORY),
        (["import os; os.kill(os.getpid(), 9)", "import sys; sys.exit(1)"], -9, None),
    ],
    ids=["all end well", "one fails", "one has no memory", "one is killed"],
)
def test_the_first_process_ends_as_its_peers_do(
    peers: list[str], code: int, kind: FailureKind | None, tmp_path: Path
) -> None:
    for number, of_peer in enumerate([FailureKind.FAILED, FailureKind.GPU_MEMORY], 1):
        (tmp_path / f"peer-{number}").mkdir()
        if kind in {of_peer, FailureKind.GPU_MEMORY}:
            EventWriter(tmp_path / f"peer-{number}" / "events.jsonl").write(Failed(kind=of_peer, text="why"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", WATCH, str(tmp_path), *peers], env=environment, check=False)
    assert done.returncode == code
    assert [event.kind for event in read_events(tmp_path / "events.jsonl")[1] if isinstance(event, Failed)] == (
        [kind] if kind else []
    )
