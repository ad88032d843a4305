"""The record of how a stage made an artifact. It is stored beside the artifact, and published in requant.json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from requant.tasks.artifact import KeyParts
from requant.tasks.hardware import Machine

KEY_PARTS = "key_parts"  # the key of a record's JSON object


@dataclass(frozen=True)
class RecordedBase:
    """The base that a download fetched."""

    repo_id: str
    sha: str


@dataclass(frozen=True)
class TuningWork:
    """How much tuning a quantize stage does. `parameters`: how many weights it quantizes."""

    parameters: int
    iters: int
    nsamples: int
    seqlen: int
    batch_size: int
    fast: bool | str | None = None  # which tuning loop, as in the recipe


@dataclass(frozen=True)
class RecordedBlock:
    """What a quantize stage recorded of a block that it tuned: its losses are mean squared errors of its output."""

    name: str
    seconds: float | None
    loss_before: float | None
    loss_after: float | None
    step_seconds: float | None = None
    compile_seconds: float | None = None


@dataclass(frozen=True)
class RecordedSource:
    """What a quantize stage took from one calibration text: rows and tokens read, and samples by domain.

    name: of the text, pinned to what it was; license: of a data set, if its card names one; templated, plain: how many
    chats went through the base's chat template, and how many did not; reason: why the first one did not.
    """

    name: str
    weight: float | None
    license: str | None
    rows: int
    tokens: int
    samples: Mapping[str, int]
    templated: int
    plain: int
    reason: str | None


@dataclass(frozen=True)
class StageRecord:
    """A record, as the JSON object `document`. It is never part of a digest.

    Its keys differ between stages and between versions of Requant, and a record of a store is untrusted. So the object
    stays as it was read, and the properties give what Requant uses of it. Where the object lacks a value, or has one of
    another type, a property is None or empty.
    """

    document: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def from_json(cls, text: bytes | str | None) -> StageRecord:
        """Read a record. One that is absent or damaged is empty."""
        try:
            return cls(_object(json.loads(text or b"{}")))
        except (ValueError, RecursionError):
            return cls()

    def to_json(self) -> Mapping[str, object]:
        """Return the object as `json.dumps` takes it."""
        return self.document

    def with_values(self, **values: object) -> StageRecord:
        """Return a copy of the record in which these keys have these values."""
        return StageRecord({**self.document, **values})

    def with_key_parts(self, parts: KeyParts) -> StageRecord:
        """Return a copy of the record with what its stage key covers."""
        return self.with_values(**{KEY_PARTS: vars(parts)})

    @property
    def key_parts(self) -> KeyParts | None:
        """What the stage key covers; None in the record of a Requant that did not record it."""
        return KeyParts.from_json(self.document.get(KEY_PARTS))

    @property
    def published(self) -> Mapping[str, object]:
        """The object without what the key covers: that is of use in the store alone."""
        return {name: value for name, value in self.document.items() if name != KEY_PARTS}

    @property
    def started(self) -> str:
        """When the stage began, in ISO 8601."""
        return _text(self.document.get("started")) or ""

    @property
    def seconds(self) -> float | None:
        """How long the stage took."""
        return _number(self.document.get("seconds"))

    @property
    def tools(self) -> dict[str, str]:
        """The installed version of each tool that shapes the result."""
        return {name: str(version) for name, version in self._part("tools").items()}

    @property
    def machine(self) -> Machine:
        """The machine that did the work."""
        return Machine.from_json(self._part("machine"))

    @property
    def used(self) -> list[tuple[str, str]]:
        """The artifacts that were made or reused inside the stage, each as stage name and stage key."""
        names = self.document.get("used")
        pairs = names if isinstance(names, list) else []
        return [(str(pair[0]), str(pair[1])) for pair in pairs if isinstance(pair, list | tuple) and len(pair) == 2]

    @property
    def base(self) -> RecordedBase | None:
        """The base, in the record of a download."""
        base = self._part("base")
        return RecordedBase(str(base.get("repo_id")), str(base.get("sha"))) if base else None

    @property
    def bytes_processed(self) -> int:
        """The bytes that the stage read or moved; 0 where it does not say."""
        return int(_number(self.document.get("bytes_read")) or _number(self.document.get("bytes_moved")) or 0)

    @property
    def written_tokens(self) -> int:
        """The tokens that the base wrote for its calibration; 0 where it does not say."""
        return int(_number(self.document.get("written_tokens")) or 0)

    @property
    def bits(self) -> int | None:
        """The bits of the quantized weights, in the record of a quantize stage."""
        bits = self._part("scheme").get("bits")
        return bits if type(bits) is int else None

    @property
    def calibration(self) -> str | None:
        """The calibration text, pinned to what it was."""
        return _text(self.document.get("calibration"))

    @property
    def sources(self) -> list[RecordedSource]:
        """What a quantize stage took from each calibration text."""
        found = self.document.get("sources")
        return [_source(row) for row in found if isinstance(row, dict)] if isinstance(found, list) else []

    @property
    def settings(self) -> Mapping[str, object]:
        """The settings that a quantize stage ran with, by name."""
        return self._part("settings")

    @property
    def device(self) -> str | None:
        """The device that the stage used: a GPU by its name, or `cpu`."""
        return _text(self.settings.get("device"))

    @property
    def torch(self) -> str | None:
        """The version of torch that quantized."""
        return _text(self.settings.get("torch"))

    @property
    def work(self) -> TuningWork | None:
        """How much a quantize stage tuned."""
        work = self._part("work")
        names = ("parameters", "iters", "nsamples", "seqlen", "batch_size")
        counts = [count for name in names if isinstance(count := work.get(name), int)]
        if len(counts) < len(names):
            return None
        parameters, iters, nsamples, seqlen, batch_size = counts
        loop = work.get("fast")
        fast = loop if isinstance(loop, bool | str) else None
        return TuningWork(parameters, iters, nsamples, seqlen, batch_size, fast)

    @property
    def blocks(self) -> list[RecordedBlock]:
        """The blocks that a quantize stage tuned."""
        found = self.document.get("blocks")
        rows = [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []
        numbers = ("seconds", "loss_before", "loss_after", "step_seconds", "compile_seconds")
        return [RecordedBlock(str(row.get("name")), *(_number(row.get(name)) for name in numbers)) for row in rows]

    @property
    def experts(self) -> dict[str, tuple[int, ...]]:
        """How many tokens of the calibration each expert got, by the name of the module that has the experts."""
        counted = {name: counts for name, counts in self._part("experts").items() if isinstance(counts, list)}
        return {name: tuple(int(_number(count) or 0) for count in counts) for name, counts in counted.items()}

    @property
    def block_seconds(self) -> list[float]:
        """How long each tuned block took, where that is known."""
        return [block.seconds for block in self.blocks if block.seconds is not None]

    @property
    def step_seconds(self) -> list[float]:
        """How long a tuning step of each block took; empty unless all blocks were tuned by our own loop."""
        seconds = [block.step_seconds for block in self.blocks]
        known = [value for value in seconds if value is not None and value > 0]
        return known if len(known) == len(self.block_seconds) == len(seconds) else []

    @property
    def compile_seconds(self) -> float:
        """How long the first steps of new kinds of blocks took more than other steps."""
        return sum(block.compile_seconds or 0.0 for block in self.blocks)

    @property
    def base_has_head(self) -> bool:
        """Whether an mtp_fix stage found an MTP head in the base."""
        return bool(self._part("mtp").get("in_base"))

    @property
    def measured_tokens(self) -> int | None:
        """How many tokens a validate stage measured of each model."""
        tokens = _number(self._part("measured").get("tokens"))
        return int(tokens) if tokens is not None and 0 < tokens < math.inf else None

    @property
    def engine(self) -> str | None:
        """The inference engine of a benchmark."""
        return _text(self._part("measured").get("engine"))

    @property
    def benchmark_hardware(self) -> str | None:
        """The hardware that a benchmark measured."""
        return _text(self._part("measured").get("hardware"))

    def _part(self, key: str) -> Mapping[str, object]:
        return _object(self.document.get(key))


def _source(row: Mapping[str, object]) -> RecordedSource:
    samples, chats = _object(row.get("samples")), _object(row.get("chats"))
    return RecordedSource(
        name=_text(row.get("source")) or "",
        weight=_number(row.get("weight")),
        license=_text(row.get("license")),
        rows=int(_number(row.get("rows")) or 0),
        tokens=int(_number(row.get("tokens")) or 0),
        samples={name: int(_number(count) or 0) for name, count in samples.items()},
        templated=int(_number(chats.get("templated")) or 0),
        plain=int(_number(chats.get("plain")) or 0),
        reason=_text(chats.get("reason")),
    )


def _object(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _number(value: object) -> float | None:
    """Return a finite number, which alone can be turned into an integer; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if isinstance(value, int) or math.isfinite(value) else None
