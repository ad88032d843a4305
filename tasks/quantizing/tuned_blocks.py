"""The record of each tuned block, put together from the child's events."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from requant.tasks.quantizing.events import (
    BlockDone,
    BlockLoss,
    BlockOutput,
    BlockStarted,
    CompileFailed,
    Event,
    ExpertsCounted,
    LoopChosen,
    RoundingKept,
    StepsTimed,
    read_events,
)


@dataclass(frozen=True)
class TunedBlock:
    """What happened to one block; None for what was not reported.

    name              the module's name in the model
    starts            how many attempts began the block; all other fields are those of the last attempt
    loss_before       the loss of the first step, the mean squared error of the block's output
    loss_after        the lowest loss of a step, which is that of the step `best_iteration`
    output_error      the mean squared error of the quantized block's output over all samples
    kept, compared    whether the rounding of the last step or of the lowest loss was kept, and the losses of both over
                      the same samples; `kept_because` says why the last step's was not kept
    loop              why auto-round's own loop tuned the block
    fallback          how torch.compile failed
    seconds           the time from the block's start to its end
    step_seconds      the median time of a step of our tuning loop
    compile_seconds   how much longer the first step took
    peak_gpu_bytes    the most GPU memory in use until the block's end
    """

    name: str
    starts: int
    loss_before: float | None = None
    loss_after: float | None = None
    best_iteration: int | None = None
    output_error: float | None = None
    kept: str | None = None
    compared: dict[str, float] | None = None
    kept_because: str | None = None
    loop: str | None = None
    fallback: str | None = None
    seconds: float | None = None
    step_seconds: float | None = None
    compile_seconds: float | None = None
    peak_gpu_bytes: int | None = None

    def to_json(self) -> dict[str, object]:
        """Return the fields that were reported, for the record of the stage."""
        return {name: value for name, value in vars(self).items() if value is not None}


def tuned_blocks(events: Path) -> list[TunedBlock]:
    """Read from events.jsonl what happened to each block in all attempts, in the order of the blocks' first starts."""
    blocks: dict[str, TunedBlock] = {}
    name: str | None = None
    began_s = 0.0
    for event in read_events(events)[1]:
        if isinstance(event, BlockStarted):
            name, began_s = event.name, event.seconds
            blocks[name] = TunedBlock(name=name, starts=blocks[name].starts + 1 if name in blocks else 1)
        elif name is not None:
            blocks[name] = _with_event(blocks[name], event, began_s)
    return list(blocks.values())


def expert_tokens(events: Path) -> dict[str, list[int]]:
    """Read from events.jsonl how many tokens each expert got, by the name of the module that has the experts."""
    counted: dict[str, list[int]] = {}
    for event in read_events(events)[1]:
        if isinstance(event, ExpertsCounted):
            counted |= {f"{event.block}.{module}": tokens for module, tokens in event.tokens.items()}
    return counted


def _with_event(block: TunedBlock, event: Event, began_s: float) -> TunedBlock:
    """Add what an event reports to the record of its block, which began at this second."""
    match event:
        case BlockLoss():
            return replace(block, loss_before=event.before, loss_after=event.after, best_iteration=event.iteration)
        case StepsTimed():
            return replace(block, step_seconds=event.median, compile_seconds=round(event.compiling, 3))
        case BlockOutput():
            return replace(block, output_error=event.error)
        case RoundingKept():
            return replace(block, kept=event.kept, compared=event.losses, kept_because=event.reason)
        case LoopChosen():
            return replace(block, loop=event.reason)
        case CompileFailed():
            return replace(block, fallback=event.text)
        case BlockDone():
            return replace(block, seconds=round(event.seconds - began_s, 3), peak_gpu_bytes=event.peak_gpu_bytes)
    return block
