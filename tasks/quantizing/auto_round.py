"""Every name of auto-round and transformers that is replaced while a model is quantized, in one table.

`patches` lists the rows in the order in which they are applied: what is replaced, by what, why, and where it is known
upstream. `patched` applies rows for the time of a `with` block and then puts every original back. What a row puts in
place is a plain function of another module that takes the original and returns the replacement, so that nothing else in
this project assigns to a name of these packages.

The order matters where a name is replaced more than once: a later row wraps what an earlier one put there.

- `SignRoundQuantizer.quantize_block`, from the inside out: our loop, or auto-round's; what keeps the rounded weights of
  the block that either has tuned; the clock around both.
- `ResumeState.mark_block_done`: ours, and the clock around it.

The names are internal ones, and another version may call them differently or not at all. So `patched` refuses versions
other than CHECKED. An upgrade means to read each row against the new version, and then to change CHECKED.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from requant.tasks.quantizing import reporting, resume, samples
from requant.tasks.quantizing.auto_settings import LoopSettings
from requant.tasks.quantizing.events import EventSink, JobRefused
from requant.tasks.versions import version_problem

if TYPE_CHECKING:
    from requant.tasks.quantizing.loop.profile import Profile

CHECKED = {"auto-round": "0.16.1", "transformers": "5.23.0"}  # what all rows were read against
LOGGER = "autoround"
NOT_REPORTED = "not reported"
NO_UPSTREAM_ISSUE = "nothing to report: this serves Requant alone"


@dataclass(frozen=True)
class Patch:
    """A row of the table: the attribute `name` of `owner`, a module or class, and what stands there in the meantime."""

    owner: Any
    name: str
    replace: Callable[[Any], Any]  # (the original) -> what takes its place
    why: str
    upstream: str  # the issue or pull request, NOT_REPORTED, or NO_UPSTREAM_ISSUE


@dataclass(frozen=True)
class TuningRun:
    """What the replacements need to know of the run.

    report        gets the events
    seed          the recipe's: each block draws its samples from it
    loop          the settings of our tuning loop; None leaves auto-round's in place
    delta_rule    the modules whose gated delta rule is replaced (`modules_with_reference`)
    clock         measures the phases of each block, if REQUANT_PROFILE asks for it
    """

    report: EventSink
    seed: int
    loop: LoopSettings | None
    delta_rule: Sequence[ModuleType] = ()
    clock: Profile | None = None


def refuse_other_versions() -> None:
    """Raise Refused, naming the packages and the remedy, if versions other than CHECKED are installed."""
    if problem := version_problem("quantize", CHECKED):
        raise JobRefused(problem)


@contextmanager
def patched(patches: Iterable[Patch], report: EventSink) -> Iterator[None]:
    """Replace names, and report the losses and warnings of auto-round's log, until the block ends in whatever way.

    Raises Refused before anything is replaced if versions other than CHECKED are installed.
    """
    refuse_other_versions()
    log, reader = logging.getLogger(LOGGER), reporting.LogReader(report)
    with ExitStack() as undo:
        log.addHandler(reader)
        undo.callback(log.removeHandler, reader)
        for patch in patches:
            original = vars(patch.owner)[patch.name]
            setattr(patch.owner, patch.name, patch.replace(original))
            undo.callback(setattr, patch.owner, patch.name, original)
        yield


def patches(run: TuningRun) -> list[Patch]:
    """List what is replaced in a run of the quantize stage, in the order in which `patched` has to apply it."""
    rows = [*starting(), *tuning(run), *calibrating(), *resuming(run.report), *telling(run)]
    return [*rows, *timing(run.clock)] if run.clock else rows


def starting() -> list[Patch]:
    """List what auto-round need not wait for before it begins."""
    from auto_round.utils import device

    arch = "X86_64" if platform.machine().lower() in {"x86_64", "amd64"} else platform.machine()
    return [
        Patch(
            device.cpuinfo,
            "get_cpu_info",
            lambda original: lambda: {"arch": arch},
            why="On a CPU auto-round reads the architecture from the answer and nothing else, and waits 1.5 s for it: "
            "py-cpuinfo measures the clock of the processor for a second.",
            upstream=NOT_REPORTED,
        )
    ]


def tuning(run: TuningRun) -> list[Patch]:
    """List what makes tuning a block faster. Other rows wrap these: they come first."""
    if run.loop is None:
        return []
    from auto_round.algorithms.quantization.sign_round.quantizer import SignRoundQuantizer

    from requant.tasks.quantizing.loop import gated_delta_rule, tune

    loop = run.loop
    after_step = run.clock.step if run.clock else lambda: None
    rows = [
        Patch(
            module,
            gated_delta_rule.REFERENCE,
            lambda original: gated_delta_rule.chunk_gated_delta_rule,
            why="The reference walks the chunks in Python: compiled, that is a graph that takes minutes to compile; "
            "not compiled, autograd copies a large tensor for every chunk.",
            upstream="https://github.com/huggingface/transformers/pull/47625 made it faster, and still walks",
        )
        for module in run.delta_rule
    ]
    rows.append(
        Patch(
            SignRoundQuantizer,
            "quantize_block",
            lambda original: tune.fast_quantize_block(original, loop, run.report, after_step),
            why="Without auto-round's waits and copies, and with each kind of block compiled once, the same steps on "
            "the same samples take less than a third of the time on an H100 (loop/tune.py lists the differences).",
            upstream="https://github.com/intel/auto-round/issues/1679 tells of compiling anew; the rest is "
            + NOT_REPORTED,
        )
    )
    return rows


def calibrating() -> list[Patch]:
    """List what makes auto-round calibrate with all samples that it is given."""
    from auto_round.calibration.mllm import MLLMCalibrator

    return [
        Patch(
            MLLMCalibrator,
            "calib",
            samples.counting_every_sample,
            why="For a vision-language base it counts a batch for each entry of a list of samples: of 128 samples it "
            "takes the first 16 at batch size 8, without a word.",
            upstream=NOT_REPORTED,
        )
    ]


def resuming(report: EventSink) -> list[Patch]:
    """List what makes a killed or moved run go on from its finished blocks, as resume.py describes.

    auto-round's own resume state was proposed in https://github.com/intel/auto-round/pull/2062.
    """
    from auto_round.algorithms.quantization.sign_round.quantizer import SignRoundQuantizer
    from auto_round.compressors.orchestrator import CompressionOrchestrator
    from auto_round.utils import resume as theirs

    rounded: dict[str, Any] = {}  # the weights of the block that was tuned last, for the file that is written of it
    return [
        Patch(
            theirs,
            "compute_run_signature",
            resume.signing_without_folder,
            why="The signature holds the folder of the base, which another machine has elsewhere: it would start anew.",
            upstream=NOT_REPORTED,
        ),
        Patch(
            SignRoundQuantizer,
            "quantize_block",
            lambda original: resume.keeping_rounded_weights(original, rounded),
            why="The rounded weights are at hand only between the tuning of a block and its packing.",
            upstream=NO_UPSTREAM_ISSUE,
        ),
        Patch(
            theirs.ResumeState,
            "mark_block_done",
            lambda original: resume.writing_rounded_weights(rounded),
            why="It writes the hidden states of all samples anew after each block, 5.4 GB at 27 B dimensions; the "
            "rounded weights take 0.4 GB and are written once.",
            upstream=NOT_REPORTED,
        ),
        Patch(
            theirs.ResumeState,
            "load_q_input",
            lambda original: lambda self: None,
            why="Hidden states are asked for here, before the samples are at hand; `_quantize_blocks` computes them.",
            upstream=NO_UPSTREAM_ISSUE,
        ),
        Patch(
            theirs.ResumeState,
            "load_input_ids",
            lambda original: lambda self: [],
            why="As load_q_input; None would say that the state is lost, and the run would start anew.",
            upstream=NO_UPSTREAM_ISSUE,
        ),
        Patch(
            CompressionOrchestrator,
            "_quantize_blocks",
            lambda original: resume.passing_finished_blocks(original, report),
            why="Where a run goes on, the samples are passed through the finished blocks, whose weights are then "
            "dropped, or auto-round would write them once more, unpacked.",
            upstream="https://github.com/intel/auto-round/issues/2350 tells of the weights that are written twice",
        ),
    ]


def telling(run: TuningRun) -> list[Patch]:
    """List what reports the progress of auto-round as events."""
    from auto_round.algorithms.composer import AlgorithmComposer
    from auto_round.compressors import orchestrator

    end_block = run.clock.end_block if run.clock else lambda: None
    return [
        Patch(
            orchestrator,
            "tqdm",
            lambda original: reporting.reporting_bar(original, run.report, run.seed, end_block),
            why="Nothing but this bar tells when a block starts. The samples of all blocks are drawn from one "
            "sequence, so that a run that went on would end with other weights: the bar seeds it for each block.",
            upstream=NOT_REPORTED,
        ),
        Patch(
            AlgorithmComposer,
            "compress_block",
            lambda original: reporting.reporting_output(original, run.report),
            why="The loss that auto-round tells is the lowest of single batches, which says as much of the batch as of "
            "the block; the error of the output over all samples is told beside it.",
            upstream=NOT_REPORTED,
        ),
    ]


def timing(clock: Profile) -> list[Patch]:
    """List the phases of a block that REQUANT_PROFILE measures. Clocks go around all else: they come last."""
    from auto_round.algorithms.block_runner import BlockForwardRunner
    from auto_round.algorithms.quantization.sign_round.quantizer import SignRoundQuantizer
    from auto_round.compressors import utils
    from auto_round.compressors.shard_writer import ShardWriter
    from auto_round.utils.resume import ResumeState

    def timed(owner: Any, name: str, phase: str) -> Patch:
        return Patch(
            owner, name, lambda original: clock.timed(original, phase), f"The time of {phase}.", NO_UPSTREAM_ISSUE
        )

    return [
        timed(BlockForwardRunner, "__call__", "forward passes over all samples"),
        timed(SignRoundQuantizer, "quantize_block", "tuning"),
        timed(ShardWriter, "write", "writing the packed block"),
        timed(ShardWriter, "_flush_shard", "writing the packed block"),
        timed(ResumeState, "mark_block_done", "resume state"),
        timed(utils, "immediate_pack", "packing"),
        Patch(
            SignRoundQuantizer,
            "_step",
            clock.counted,
            "The steps of auto-round's own loop are counted.",
            NO_UPSTREAM_ISSUE,
        ),
    ]
