"""All names of auto-round and transformers that are replaced while a model is quantized, in one table.

`patches` lists the rows in the order in which they are applied. Each says what is replaced, by what, why, and where the
problem is known upstream. `patched` applies rows during a `with` block and then restores the originals. A replacement
is made by a function of another module, which gets the original. Nothing else in this project assigns to a name of
these packages.

The order matters for names that are replaced more than once, because a later row wraps the result of an earlier one:

- `SignRoundQuantizer.quantize_block`: our loop or auto-round's, then the clock.
- `SignRoundQuantizer.dispatch_block`: the wrapper that uses what was loaded ahead, then the clock.
- `ResumeState.mark_block_done` and `BlockForwardRunner.forward`: our replacement, then the clock.
- `CompressionOrchestrator._quantize_blocks`, from the inside out: what passes finished blocks, what loads the next one,
  what waits until the last one has been written.
- `clear_memory` in two modules: ours, then the clock.

The names are internal. Another version may have different ones, so `patched` refuses all versions but CHECKED_VERSIONS.
For an upgrade, check each row against the new version, and then change CHECKED_VERSIONS.
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
from requant.tasks.quantizing.loop.ranks import ALONE, Ranks
from requant.tasks.versions import version_problem

if TYPE_CHECKING:
    import torch

    from requant.tasks.quantizing.loop.profile import Profile

CHECKED_VERSIONS = {"auto-round": "0.16.1", "transformers": "5.23.0"}  # the versions that all rows fit
LOGGER_NAME = "autoround"
NOT_REPORTED = "not reported"
NO_UPSTREAM_ISSUE = "nothing to report: this serves Requant alone"


@dataclass(frozen=True)
class Patch:
    """A row of the table: the attribute `name` of `owner`, a module or class, and how it is replaced."""

    owner: Any
    name: str
    replace: Callable[[Any], Any]  # gets the original and returns the replacement
    why: str
    upstream: str  # the URL of an issue or pull request, NOT_REPORTED, or NO_UPSTREAM_ISSUE


@dataclass(frozen=True)
class TuningRun:
    """What the replacements need to know about the run.

    report        gets the events
    seed          the recipe's seed, which decides the order of the samples in each block
    loop          the settings of our tuning loop; None for auto-round's loop
    delta_rule    the modules whose gated delta rule is replaced (`modules_with_reference`)
    clock         measures the phases of each block if REQUANT_PROFILE is set
    ranks         this process among those that tune together
    load_ahead    the device onto which the next block is loaded while a block is tuned; None to load none ahead
    write_behind  whether a block is written while the next one is tuned
    """

    report: EventSink
    seed: int
    loop: LoopSettings | None
    delta_rule: Sequence[ModuleType] = ()
    clock: Profile | None = None
    ranks: Ranks = ALONE
    load_ahead: torch.device | None = None
    write_behind: bool = True


class PeerDone(Exception):
    """A peer has tuned all blocks, and leaves the rest to the first process."""


def refuse_other_versions() -> None:
    """Raise JobRefused, naming the packages and the remedy, if other versions than CHECKED_VERSIONS are installed."""
    if problem := version_problem("quantize", CHECKED_VERSIONS):
        raise JobRefused(problem)


@contextmanager
def patched(patches: Iterable[Patch], report: EventSink) -> Iterator[None]:
    """Replace names, and report the losses and warnings of auto-round's log, until the `with` block ends.

    Raises JobRefused before anything is replaced if other versions than CHECKED_VERSIONS are installed.
    """
    refuse_other_versions()
    log, reader = logging.getLogger(LOGGER_NAME), reporting.LogReader(report)
    with ExitStack() as undo:
        log.addHandler(reader)
        undo.callback(log.removeHandler, reader)
        for patch in patches:
            original = vars(patch.owner)[patch.name]
            setattr(patch.owner, patch.name, patch.replace(original))
            undo.callback(setattr, patch.owner, patch.name, original)
        yield


def patches(run: TuningRun) -> list[Patch]:
    """List all patches for a run of the quantize stage, in the order in which `patched` must apply them."""
    rows = [
        *start_patches(),
        *tuning_patches(run),
        *calibration_patches(),
        *resume_patches(run.report),
        *loading_patches(run.load_ahead),
        *passing_patches(run.ranks),
        *writing_patches(run.write_behind, is_peer=run.ranks.rank > 0),
        *(peer_patches() if run.ranks.rank else ()),
        *progress_patches(run),
    ]
    return [*rows, *profile_patches(run.clock)] if run.clock else rows


def start_patches() -> list[Patch]:
    """List the patches that make auto-round start faster."""
    from auto_round.utils import device

    arch = "X86_64" if platform.machine().lower() in {"x86_64", "amd64"} else platform.machine()
    return [
        Patch(
            device.cpuinfo,
            "get_cpu_info",
            lambda original: lambda: {"arch": arch},
            why="On a CPU, auto-round reads only the architecture from the result, but waits 1.5 s for it: py-cpuinfo "
            "measures the clock of the processor for a second.",
            upstream=NOT_REPORTED,
        )
    ]


def tuning_patches(run: TuningRun) -> list[Patch]:
    """List the patches that make tuning a block faster. They come first, because other patches wrap them."""
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
            why="The reference loops over the chunks in Python. Compiled, that is a graph that takes minutes to "
            "compile; not compiled, autograd copies a large tensor for every chunk.",
            upstream="https://github.com/huggingface/transformers/pull/47625 made it faster, but it still loops",
        )
        for module in run.delta_rule
    ]
    rows.append(
        Patch(
            SignRoundQuantizer,
            "quantize_block",
            lambda original: tune.fast_quantize_block(original, loop, run.report, after_step, run.ranks),
            why="Without auto-round's waits and copies, and with each kind of block compiled once, the same steps on "
            "the same samples take less than a third of the time on an H100 (loop/tune.py lists the differences).",
            upstream="https://github.com/intel/auto-round/issues/1679 reports the repeated compiling; the rest is "
            + NOT_REPORTED,
        )
    )
    return rows


def calibration_patches() -> list[Patch]:
    """List the patches that make auto-round calibrate with all samples that it gets."""
    from auto_round.calibration.mllm import MLLMCalibrator

    return [
        Patch(
            MLLMCalibrator,
            "calib",
            samples.counting_every_sample,
            why="For a vision-language base, it counts each entry of a list of samples as a batch: at batch size 8 it "
            "takes only the first 16 of 128 samples, without a warning.",
            upstream=NOT_REPORTED,
        )
    ]


def resume_patches(report: EventSink) -> list[Patch]:
    """List the patches that make a killed or moved run continue after its finished blocks, as resume.py describes.

    auto-round's own resume state was proposed in https://github.com/intel/auto-round/pull/2062.
    """
    from auto_round.compressors.orchestrator import CompressionOrchestrator
    from auto_round.utils import resume as auto_round_resume

    return [
        Patch(
            auto_round_resume,
            "compute_run_signature",
            resume.signing_without_folder,
            why="The signature includes the folder of the base. Another machine has it elsewhere and would start anew.",
            upstream=NOT_REPORTED,
        ),
        Patch(
            auto_round_resume.ResumeState,
            "load_q_input",
            lambda original: lambda self: None,
            why="It loads hidden states before the samples are known. `_quantize_blocks` computes them instead.",
            upstream=NO_UPSTREAM_ISSUE,
        ),
        Patch(
            auto_round_resume.ResumeState,
            "load_input_ids",
            lambda original: lambda self: [],
            why="As for load_q_input. None would mean that the state is lost, and the run would start anew.",
            upstream=NO_UPSTREAM_ISSUE,
        ),
        Patch(
            CompressionOrchestrator,
            "_quantize_blocks",
            lambda original: resume.passing_finished_blocks(original, report),
            why="A resumed run passes the samples through the finished blocks. It then drops the weights of these, "
            "which auto-round would otherwise write again, unpacked.",
            upstream="https://github.com/intel/auto-round/issues/2350 reports the weights that are written twice",
        ),
    ]


def loading_patches(device: torch.device | None) -> list[Patch]:
    """List the patches that load the next block onto the device while a block is tuned, unless that is None."""
    from auto_round.algorithms import composer
    from auto_round.algorithms.quantization.sign_round.quantizer import SignRoundQuantizer
    from auto_round.compressors import orchestrator

    from requant.tasks.quantizing.next_block import NextBlock

    following = NextBlock(device)
    return [
        Patch(
            orchestrator.CompressionOrchestrator,
            "_quantize_blocks",
            following.knowing_names,
            why="Loading a block ahead needs to know which one it will be.",
            upstream=NO_UPSTREAM_ISSUE,
        ),
        Patch(
            SignRoundQuantizer,
            "dispatch_block",
            following.starting,
            why="It copies the block to the GPU while the GPU waits.",
            upstream=NOT_REPORTED,
        ),
        *(
            Patch(
                module,
                "clear_memory",
                following.sparing,
                why="It is called five times per block. Each time it collects garbage, waits for the GPU, and gives "
                "memory back that the next call takes again.",
                upstream=NOT_REPORTED,
            )
            for module in (composer, orchestrator)
        ),
    ]


def passing_patches(ranks: Ranks) -> list[Patch]:
    """List the patches that make the forward passes over all samples faster."""
    from auto_round.algorithms.block_runner import BlockForwardRunner

    from requant.tasks.quantizing.loop import passes

    return [
        Patch(
            BlockForwardRunner,
            "forward",
            lambda original: passes.without_waits(original, ranks),
            why="It waits for the GPU several times per batch, to read indices that it has made itself. Where several "
            "processes tune a block, each computes its share of the batches.",
            upstream=NOT_REPORTED,
        )
    ]


def writing_patches(behind: bool, *, is_peer: bool) -> list[Patch]:
    """List the patches that pack and write a block in a thread, with `behind` while the next one is tuned.

    A peer drops the block instead.
    """
    from auto_round.compressors import orchestrator, utils
    from auto_round.compressors.shard_writer import ShardWriter
    from auto_round.utils import missing_tensors
    from auto_round.utils.resume import ResumeState

    from requant.tasks.quantizing.finished_blocks import DroppedBlocks, FinishedBlocks, flush_shard

    finished = DroppedBlocks() if is_peer else FinishedBlocks(wait=not behind)
    return [
        Patch(
            orchestrator,
            "mv_module_from_gpu",
            finished.leaving_in_place,
            why="It moves the weights of a tuned block to the CPU, and packing moves them to the GPU again.",
            upstream=NOT_REPORTED,
        ),
        Patch(
            utils,
            "immediate_pack",
            finished.postponing,
            why="Nothing is tuned while it packs a layer.",
            upstream=NOT_REPORTED,
        ),
        Patch(
            ShardWriter,
            "write",
            finished.postponing,
            why="It collects the packed layers of a block, which there are only when the thread has packed them.",
            upstream=NO_UPSTREAM_ISSUE,
        ),
        Patch(
            ShardWriter,
            "_add_tensor",
            finished.adding_packed_parts,
            why="All other tensors are taken from the base.",
            upstream=NO_UPSTREAM_ISSUE,
        ),
        Patch(
            ShardWriter,
            "_flush_shard",
            lambda original: finished.postponing(flush_shard),
            why="Nothing is tuned while it writes a file, and a killed process leaves an incomplete one.",
            upstream=NOT_REPORTED,
        ),
        Patch(
            missing_tensors,
            "_resolve_tensor_shard_maps",
            finished.hiding_what_was_left_out,
            why="It finds the base's tensors that are missing from what was written, to copy or pack them.",
            upstream=NO_UPSTREAM_ISSUE,
        ),
        Patch(
            ResumeState,
            "mark_block_done",
            lambda original: lambda self, *args: finished.mark_block_done(self, *args),
            why="It writes the hidden states of all samples anew after each block, 5.4 GB at 27 B dimensions. The "
            "rounded weights take 0.4 GB and are written once.",
            upstream=NOT_REPORTED,
        ),
        Patch(
            orchestrator.CompressionOrchestrator,
            "_quantize_blocks",
            finished.writing,
            why="The last block must have been written before auto-round lists the files.",
            upstream=NO_UPSTREAM_ISSUE,
        ),
    ]


def peer_patches() -> list[Patch]:
    """List the patches by which a peer ends after the last block."""
    from auto_round.algorithms.composer import AlgorithmComposer

    def done(*args: Any, **kwargs: Any) -> None:
        raise PeerDone

    why = "The first process writes the rest."
    return [Patch(AlgorithmComposer, "finalize_run", lambda original: done, why, NO_UPSTREAM_ISSUE)]


def progress_patches(run: TuningRun) -> list[Patch]:
    """List the patches that report auto-round's progress as events."""
    from auto_round.algorithms.block_runner import BlockForwardRunner
    from auto_round.algorithms.composer import AlgorithmComposer
    from auto_round.compressors import orchestrator

    end_block = run.clock.end_block if run.clock else lambda: None
    return [
        Patch(
            orchestrator,
            "tqdm",
            lambda original: reporting.reporting_bar(original, run.report, run.seed, end_block),
            why="Only this bar shows when a block starts. All blocks draw their samples from one random sequence, so "
            "a resumed run would end with other weights: the bar seeds the sequence for each block.",
            upstream=NOT_REPORTED,
        ),
        Patch(
            AlgorithmComposer,
            "compress_block",
            lambda original: reporting.reporting_output(original, run.report),
            why="The loss that auto-round logs is the lowest of single batches, so it depends on the batch as much as "
            "on the block. The error of the output over all samples is reported too.",
            upstream=NOT_REPORTED,
        ),
        Patch(
            BlockForwardRunner,
            "forward",
            lambda original: reporting.reporting_experts(original, run.report, run.ranks),
            why="An expert that gets no token of the samples is rounded and not tuned, and nothing says so.",
            upstream=NOT_REPORTED,
        ),
    ]


def profile_patches(clock: Profile) -> list[Patch]:
    """List the patches that measure the phases of a block. They come last, because clocks wrap all other patches."""
    from auto_round.algorithms import composer
    from auto_round.algorithms.block_runner import BlockForwardRunner
    from auto_round.algorithms.quantization.sign_round.quantizer import SignRoundQuantizer
    from auto_round.compressors import orchestrator
    from auto_round.utils.resume import ResumeState

    def timed(owner: Any, name: str, phase: str) -> Patch:
        return Patch(
            owner, name, lambda original: clock.timed(original, phase), f"The time of {phase}.", NO_UPSTREAM_ISSUE
        )

    return [
        timed(SignRoundQuantizer, "dispatch_block", "loading the block"),
        timed(composer, "clear_memory", "clearing memory"),
        timed(orchestrator, "clear_memory", "clearing memory"),
        timed(BlockForwardRunner, "forward", "forward passes over all samples"),
        timed(SignRoundQuantizer, "quantize_block", "tuning"),
        timed(ResumeState, "mark_block_done", "waiting for the block before to be written"),
        Patch(
            SignRoundQuantizer,
            "_step",
            clock.counted,
            "The steps of auto-round's own loop are counted.",
            NO_UPSTREAM_ISSUE,
        ),
    ]
