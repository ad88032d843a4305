"""The GPU memory that nvidia-smi reports for a process, as the benchmark reads it for an engine."""

from __future__ import annotations

import subprocess
import sys

import pytest

from requant.tasks import hardware

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
HOLDS = """
import sys, torch
held = torch.ones(3 << 30, dtype=torch.uint8, device="cuda")
torch.cuda.synchronize()
print("there", flush=True)
sys.stdin.read()
"""
GIB = 1 << 30


def test_what_a_process_holds_is_its_memory_and_its_context() -> None:
    """Measure it by the process number, and as the increase since before its start.

    In a container that hides process numbers, only the second way works.
    """
    before = hardware.used_bytes()
    assert before is not None
    with subprocess.Popen([sys.executable, "-c", HOLDS], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"there\n"
            by_number, since = hardware.held_bytes({process.pid}, before), hardware.held_bytes((), before)
            rows = hardware.query("compute-apps=pid,used_memory")
        finally:
            process.kill()
    print(before, by_number, since, rows)
    for held in (by_number, since):
        assert held is not None and 3 * GIB <= held < 5 * GIB


def test_the_gpus_have_their_names() -> None:
    assert torch.cuda.get_device_name() in hardware.gpu_names()
