"""The events that the quantize child reports, and the file events.jsonl that holds them.

The child appends events with an `EventWriter`, one JSON object per line. `event` names the class, and `seconds` is the
time since the start of the process. The process that started the child reads them with `read_events`. The file can be
older than the code that reads it, so fields that were added later have a default.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from requant.tasks.quantizing.failures import FailureKind


class JobRefused(ValueError):
    """The job cannot work as it is. The message is a sentence for the user."""


class Event(BaseModel):
    """The base class of events. The `EventWriter` sets `seconds`: the time since the child's start."""

    model_config = ConfigDict(frozen=True)

    event: str
    seconds: float = 0.0

    def details(self) -> dict[str, Any]:
        """Return the fields that were given, without the name of the event and its time."""
        return self.model_dump(exclude={"event", "seconds"}, exclude_unset=True)


class SettingsChosen(Event):
    """The settings that the child runs with, and the reason for each. It is the first event of each process."""

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
    torch: str | None = Field(None, description="the version of torch")
    transformers: str | None = Field(None, description="the version of transformers")
    gpus: int | None = Field(None, description="how many GPUs tune each block, or processes on a CPU, if not one")
    delta_rule: list[str] = Field(default_factory=list, description="modules whose gated delta rule is replaced")


class Resumed(Event):
    """The child continues after this number of blocks that an earlier process finished."""

    event: Literal["resumed"] = "resumed"
    blocks: int


class BlockStarted(Event):
    """The child begins the block `name`, number `index` (from 0) of `total`."""

    event: Literal["block"] = "block"
    name: str
    index: int | None = None
    total: int | None = None


class LoopChosen(Event):
    """Another loop than ours tunes the block, for this reason."""

    event: Literal["loop"] = "loop"
    loop: str
    reason: str


class CompileFailed(Event):
    """The block is tuned without torch.compile, which failed as `text` says."""

    event: Literal["fallback"] = "fallback"
    text: str


class BlockLoss(Event):
    """The loss of the first batch, and the lowest loss of all batches with its iteration.

    A loss is the mean squared error of the block's output.
    """

    event: Literal["loss"] = "loss"
    before: float
    after: float
    iteration: int | None = None


class StepsTimed(Event):
    """The seconds of a block's first step, in which it is compiled if its kind is new, and the median of the others."""

    event: Literal["steps"] = "steps"
    first: float
    median: float

    @property
    def compiling(self) -> float:
        """How many seconds more the first step took than the others."""
        return max(0.0, self.first - self.median)


class RoundingKept(Event):
    """Which rounding the block keeps: that of `last step` or of `lowest batch`; `losses` holds the losses of both."""

    event: Literal["kept"] = "kept"
    kept: str
    losses: dict[str, float]
    reason: str | None = None


class BlockOutput(Event):
    """The mean squared error of a quantized block's output over all samples; measuring it took `spent` seconds."""

    event: Literal["output"] = "output"
    error: float
    spent: float = 0.0


class ExpertsCounted(Event):
    """How many tokens of all samples each expert of the block `block` gets, by the module that has the experts."""

    event: Literal["experts"] = "experts"
    block: str
    tokens: dict[str, list[int]]


class BlockDone(Event):
    """A block has ended, the `done`-th of `total`; `peak_gpu_bytes` of the process so far is None without a GPU."""

    event: Literal["progress"] = "progress"
    done: int
    total: int
    peak_gpu_bytes: int | None = None


class Warned(Event):
    """A warning in auto-round's log."""

    event: Literal["warning"] = "warning"
    text: str


class Failed(Event):
    """The last event of a child that ended without a result, unless it was killed or crashed."""

    event: Literal["error"] = "error"
    kind: FailureKind
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
        | StepsTimed
        | RoundingKept
        | BlockOutput
        | ExpertsCounted
        | BlockDone
        | Warned
        | Failed,
        Field(discriminator="event"),
    ]
)


def line_of(event: Event) -> str:
    """Format an event as a line of events.jsonl, without the line break. Python's json writes and reads NaN too."""
    return json.dumps({"event": event.event, "seconds": event.seconds, **event.details()})


class EventWriter:
    """Appends to events.jsonl. A line is complete once its line break is there."""

    def __init__(self, path: Path) -> None:
        has_cut_line = path.exists() and not path.read_bytes().endswith(b"\n")
        self._stream = path.open("a", buffering=1)
        if has_cut_line:  # An earlier process was killed while it wrote the line.
            self._stream.write("\n")
        self._started = time.monotonic()

    def write(self, event: Event) -> None:
        """Append an event, with the seconds since this writer was created."""
        seconds = round(time.monotonic() - self._started, 3)
        self._stream.write(line_of(event.model_copy(update={"seconds": seconds})) + "\n")


def read_events(path: Path, position: int = 0) -> tuple[int, list[Event]]:
    """Read the complete lines of events.jsonl from the byte `position` on.

    Returns the position after them, and their events. Lines that are not valid JSON or not a known event are skipped.
    """
    if not path.exists():
        return position, []
    with path.open("rb") as stream:
        stream.seek(position)
        data = stream.read()
    end = data.rfind(b"\n") + 1
    events = []
    for line in data[:end].splitlines():
        with contextlib.suppress(ValueError):  # pydantic's ValidationError is a ValueError too.
            events.append(_LINE.validate_python(json.loads(line)))
    return position + end, events
