"""What the quantize child tells of its work: a class for each event, and the file of lines that carries them.

The child appends to `events.jsonl` with an `EventWriter`, one JSON object a line: `event` says of which class it is,
and `seconds` how long after the start of its process it happened. The process that started it reads them with
`read_events`. The file outlives both, so that a reader may find lines of an earlier version: fields that came later
have a default.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter


class JobRefused(ValueError):
    """The job cannot work as it is; the message is a sentence for the user."""


class Event(BaseModel):
    """What all events have. `seconds`: from the start of the child to the event, set by the `EventWriter`."""

    model_config = ConfigDict(frozen=True)

    event: str
    seconds: float = 0.0

    def details(self) -> dict[str, Any]:
        """List the fields that were given, without the kind of the event and its time."""
        return self.model_dump(exclude={"event", "seconds"}, exclude_unset=True)


class SettingsChosen(Event):
    """Which settings the child runs with, the first event of each process; `reasons` holds why, by setting."""

    event: Literal["settings"] = "settings"
    device: str | None = None
    fast: bool | None = None
    compare_last: bool | None = None
    offload: bool | None = None
    torch_compile: bool | None = None
    low_gpu_mem: bool | None = None
    batch_size: int | None = None
    gradient_accumulate_steps: int | None = None
    reasons: dict[str, str] = Field(default_factory=dict)
    torch: str | None = Field(None, description="version")
    transformers: str | None = Field(None, description="version")
    delta_rule: list[str] = Field(default_factory=list, description="modules whose gated delta rule is replaced")


class Resumed(Event):
    """The child goes on after `blocks` blocks that an earlier process finished."""

    event: Literal["resumed"] = "resumed"
    blocks: int


class BlockStarted(Event):
    """The block `name` is begun, the number `index` (from 0) of `total`."""

    event: Literal["block"] = "block"
    name: str
    index: int | None = None
    total: int | None = None


class LoopChosen(Event):
    """The block is tuned by another loop than ours, and why."""

    event: Literal["loop"] = "loop"
    loop: str
    reason: str


class CompileFailed(Event):
    """The block is tuned without torch.compile, which failed: `text` says how."""

    event: Literal["fallback"] = "fallback"
    text: str


class BlockLoss(Event):
    """The loss of the first batch and the lowest of all, with its iteration: mean squared errors of the output."""

    event: Literal["loss"] = "loss"
    before: float
    after: float
    iteration: int | None = None


class RoundingKept(Event):
    """Of the last step and the lowest batch, which one's rounding the block keeps; `losses` by these two names."""

    event: Literal["kept"] = "kept"
    kept: str
    losses: dict[str, float]
    reason: str | None = None


class BlockOutput(Event):
    """The mean squared error of a quantized block's output over all samples, and the seconds spent on measuring it."""

    event: Literal["output"] = "output"
    error: float
    spent: float = 0.0


class BlockDone(Event):
    """A block has ended: `done` of `total`, with the most bytes of GPU memory in use so far, None without a GPU."""

    event: Literal["progress"] = "progress"
    done: int
    total: int
    peak_gpu_bytes: int | None = None


class Warned(Event):
    """A warning of auto-round's."""

    event: Literal["warning"] = "warning"
    text: str


class Failed(Event):
    """The last event of a child that made no result. `kind`: what cures it (`kind_of`), or `refused`."""

    event: Literal["error"] = "error"
    kind: str
    text: str


EventSink = Callable[[Event], None]
_LINE: TypeAdapter[Event] = TypeAdapter(
    Annotated[
        SettingsChosen
        | Resumed
        | BlockStarted
        | LoopChosen
        | CompileFailed
        | BlockLoss
        | RoundingKept
        | BlockOutput
        | BlockDone
        | Warned
        | Failed,
        Field(discriminator="event"),
    ]
)


def line_of(event: Event) -> str:
    """Write an event as a line of events.jsonl, without the line break. A loss may be NaN, as Python's json has it."""
    return json.dumps({"event": event.event, "seconds": event.seconds, **event.details()})


class EventWriter:
    """Appends to events.jsonl; every line is whole when its line break is there."""

    def __init__(self, path: Path) -> None:
        cut = path.exists() and not path.read_bytes().endswith(b"\n")
        self._stream = path.open("a", buffering=1)
        if cut:  # by a kill in the middle of a line
            self._stream.write("\n")
        self._started = time.monotonic()

    def write(self, event: Event) -> None:
        """Append an event, with the seconds since this writer was made."""
        seconds = round(time.monotonic() - self._started, 3)
        self._stream.write(line_of(event.model_copy(update={"seconds": seconds})) + "\n")


def read_events(path: Path, position: int = 0) -> tuple[int, list[Event]]:
    """Read the whole lines of events.jsonl behind the byte `position`: (the position after them, their events).

    A line that a kill cut short, or whose event is not known here, is skipped.
    """
    if not path.exists():
        return position, []
    with path.open("rb") as stream:
        stream.seek(position)
        data = stream.read()
    end = data.rfind(b"\n") + 1
    events = []
    for line in data[:end].splitlines():
        with contextlib.suppress(ValueError):  # which pydantic's ValidationError is too
            events.append(_LINE.validate_python(json.loads(line)))
    return position + end, events


def kind_of(error: Exception) -> str:
    """Tell errors apart by what cures them: `oom` and `compile` are cured by other settings, `failed` is not."""
    text = f"{type(error).__module__}.{type(error).__name__}: {error}"
    if isinstance(error, MemoryError) or re.search(r"out of memory|allocate memory|_ALLOC_FAILED", text, re.IGNORECASE):
        return "oom"
    if "torch._dynamo" in text or "torch._inductor" in text or "triton" in text.lower():
        return "compile"
    return "failed"
