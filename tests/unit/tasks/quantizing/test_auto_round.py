"""What is replaced of auto-round: what the table says of it, and that every original is back afterwards."""

from __future__ import annotations

import logging
import platform
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cpuinfo
import pytest
from auto_round.algorithms.quantization.sign_round.quantizer import SignRoundQuantizer
from auto_round.utils.device import CpuInfo
from auto_round.utils.resume import ResumeState, compute_run_signature
from transformers.models.qwen3_5 import modeling_qwen3_5

from requant.tasks.quantizing import auto_round
from requant.tasks.quantizing.auto_round import (
    LOGGER_NAME,
    NO_UPSTREAM_ISSUE,
    NOT_REPORTED,
    Patch,
    TuningRun,
    patched,
    patches,
)
from requant.tasks.quantizing.auto_settings import LoopSettings
from requant.tasks.quantizing.events import BlockDone, BlockLoss, BlockStarted, Event, JobRefused, Warned
from requant.tasks.quantizing.loop.profile import Profile
from requant.tasks.versions import locked_version

LOOP = LoopSettings(torch_compile=False, offload=False, compare_last=True)


def run_of(folder: Path, seen: list[Event] | None = None) -> TuningRun:
    """A run in which everything is replaced that can be."""
    events = [] if seen is None else seen
    return TuningRun(events.append, 42, LOOP, [modeling_qwen3_5], Profile(folder / "profile"))


def ignored(event: Event) -> None:
    """Gets events that a test does not ask for."""


def places(rows: list[Patch]) -> dict[tuple[Any, str], Any]:
    """Where the rows replace something, and what is there now."""
    return {(row.owner, row.name): vars(row.owner)[row.name] for row in rows}


def test_every_original_is_back_at_the_end_of_the_block(tmp_path: Path) -> None:
    rows = patches(run_of(tmp_path))
    before, handlers = places(rows), list(logging.getLogger(LOGGER_NAME).handlers)
    with patched(rows, ignored):
        during = places(rows)
        assert all(during[place] is not original for place, original in before.items())
    after = places(rows)
    assert all(after[place] is original for place, original in before.items())
    assert logging.getLogger(LOGGER_NAME).handlers == handlers


def test_every_original_is_back_after_an_exception(tmp_path: Path) -> None:
    rows = patches(run_of(tmp_path))
    before, handlers = places(rows), list(logging.getLogger(LOGGER_NAME).handlers)
    for error in (ValueError, SystemExit, KeyboardInterrupt):
        with pytest.raises(error), patched(rows, ignored):
            raise error
        assert all(places(rows)[place] is original for place, original in before.items())
    assert logging.getLogger(LOGGER_NAME).handlers == handlers


def test_a_row_that_cannot_be_applied_takes_back_those_before_it(tmp_path: Path) -> None:
    rows = patches(run_of(tmp_path))
    before = places(rows)
    with (
        pytest.raises(KeyError),
        patched([*rows, Patch(ResumeState, "renamed", lambda o: o, "", NO_UPSTREAM_ISSUE)], ignored),
    ):
        pytest.fail("a name is missing")
    assert all(places(rows)[place] is original for place, original in before.items())


def test_every_row_says_why_and_where_it_is_known(tmp_path: Path) -> None:
    rows = patches(run_of(tmp_path))
    for row in rows:
        assert row.why.endswith(".")
        assert row.upstream in (NOT_REPORTED, NO_UPSTREAM_ISSUE) or row.upstream.startswith("https://github.com/")


def test_what_is_replaced_and_in_which_order(tmp_path: Path) -> None:
    """The clocks go around our own replacements.

    `_quantize_blocks` passes finished blocks before the first one is loaded, and returns when the last one is written.
    """
    names = [row.name for row in patches(run_of(tmp_path))]
    assert names == [
        "get_cpu_info",
        "torch_chunk_gated_delta_rule", "quantize_block",
        "calib",
        "compute_run_signature", "load_q_input", "load_input_ids", "_quantize_blocks",
        "_quantize_blocks", "dispatch_block", "clear_memory", "clear_memory",
        "forward",
        "mv_module_from_gpu", "immediate_pack", "write", "_add_tensor", "_flush_shard", "_resolve_tensor_shard_maps",
        "mark_block_done", "_quantize_blocks",
        "tqdm", "compress_block", "forward",
        "dispatch_block", "clear_memory", "clear_memory", "forward", "quantize_block", "mark_block_done", "_step",
    ]  # fmt: skip
    repeated = {name for name, count in Counter(names).items() if count > 1}
    assert repeated == {
        "quantize_block", "mark_block_done", "_quantize_blocks", "dispatch_block", "clear_memory", "forward",
    }  # fmt: skip


def test_without_our_loop_and_without_a_profile_less_is_replaced(tmp_path: Path) -> None:
    run = TuningRun(ignored, 42, loop=None, delta_rule=[modeling_qwen3_5])
    names = [row.name for row in patches(run)]
    assert "quantize_block" not in names and len(names) == 22
    assert "torch_chunk_gated_delta_rule" not in names


def test_auto_round_learns_of_the_processor_without_waiting_for_its_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpuinfo.cpuinfo, "get_cpu_info_json", lambda: pytest.fail("it measures the clock"))
    architecture, _ = cpuinfo.cpuinfo._parse_arch(platform.machine())
    with patched(patches(run_of(tmp_path)), ignored):
        assert ("X86" in cpuinfo.get_cpu_info()["arch"]) == ("X86" in architecture)
        assert CpuInfo().bf16 in {True, False}


def test_what_was_checked_is_what_is_locked() -> None:
    """An upgrade of the lock means to read the rows of the table against the new version first."""
    locked = {name: locked_version(name) for name in ("auto-round", "transformers")}
    assert locked == auto_round.CHECKED_VERSIONS


def test_another_version_is_refused_before_anything_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = patches(run_of(tmp_path))
    before = places(rows)
    monkeypatch.setitem(auto_round.CHECKED_VERSIONS, "auto-round", "0.17.0")
    sentence = r"needs auto-round 0\.17\.0.*has auto-round 0\.16\.1: run pip install"
    with pytest.raises(JobRefused, match=sentence), patched(rows, ignored):
        pytest.fail("another version")
    assert all(places(rows)[place] is original for place, original in before.items())


def test_losses_and_warnings_of_auto_rounds_log_are_reported_inside_the_block_alone() -> None:
    log = logging.getLogger(LOGGER_NAME)
    seen: list[Event] = []
    with patched([], seen.append):
        log.warning("quantized 6/8 layers in the block, loss iter 0: 2.000e-03 -> iter 7: 1.000e-03")
        log.warning("a warning")
    log.warning("later")
    assert seen == [BlockLoss(before=0.002, after=0.001, iteration=7), Warned(text="a warning")]


def test_the_bar_reports_blocks_and_seeds_each_of_them() -> None:
    from auto_round.compressors import orchestrator

    seen: list[Event] = []
    draws = []
    with patched(auto_round.progress_patches(TuningRun(seen.append, 42, loop=None)), ignored):
        for begin in (0, 1):  # as a run does, and one that goes on after the first block
            bar = orchestrator.tqdm(range(2), disable=False)
            bar.n = begin
            for name in ("layers.0", "layers.1")[begin:]:
                bar.set_description(f"Quantizing {name}")
                draws.append(random.random())
                bar.update(1)
            bar.set_description("Quantizing done")
            bar.close()
    assert draws[1] == draws[2] != draws[0]
    started = [event for event in seen if isinstance(event, BlockStarted)]
    assert started == [BlockStarted(name=f"layers.{n}", index=n, total=2) for n in (0, 1, 1)]
    done = [(event.done, event.total) for event in seen if isinstance(event, BlockDone)]
    assert done == [(1, 2), (2, 2), (2, 2)]


def test_the_signature_of_a_run_says_nothing_of_folders_and_samples() -> None:
    from auto_round.utils import resume

    with patched(auto_round.resume_patches(ignored), ignored):
        signed = [
            resume.compute_run_signature(*where, 8, 64, ["a"]) for where in (("/x", "W4", "d"), ("/y", "W4", "e"))
        ]
        other = resume.compute_run_signature("/x", "W8", "d", 8, 64, ["a"])
    assert signed[0] == signed[1] != other
    assert compute_run_signature("/x", "W4", "d", 8, 64, ["a"]) not in signed


def test_a_vision_language_base_is_calibrated_with_a_batch_size_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from auto_round.calibration.mllm import MLLMCalibrator

    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(MLLMCalibrator, "calib", lambda self, nsamples, bs: asked.append((nsamples, bs)))
    with patched(auto_round.calibration_patches(), ignored):
        MLLMCalibrator.calib(SimpleNamespace(), 128, 8)
    assert asked == [(128, 1)]


def test_a_block_that_our_loop_does_not_know_is_tuned_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned: list[Any] = []

    def quantize_block(
        self: Any, block: Any, fp_inputs: Any, input_others: Any, fp_outputs: Any, q_inputs: Any, block_ctx: Any,
        input_ids: Any = None, **kwargs: Any,
    ) -> str:  # fmt: skip
        tuned.append((block, input_ids))
        return "theirs"

    monkeypatch.setattr(SignRoundQuantizer, "quantize_block", quantize_block)
    seen: list[Event] = []
    run = TuningRun(seen.append, 42, LOOP)
    other = SimpleNamespace(enable_quanted_input=True)
    with patched(auto_round.tuning_patches(run), ignored):
        assert SignRoundQuantizer.quantize_block(other, "block", [], {}, [], None, None, input_ids=[1]) == "theirs"
    assert tuned == [("block", [1])]
    assert [(event.event, event.details()) for event in seen] == [
        ("loop", {"loop": "auto-round", "reason": "the block has another algorithm than plain sign descent"})
    ]
