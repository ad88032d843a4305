"""The recipe's sections `quantize` and `outputs`, and the base class of all sections.

This module only describes and checks settings. The stage that uses them is `tasks/quantize.py`, and the parts that the
stage is made of are in `tasks/quantizing/`. The recipe's other sections are in `recipe.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    model_validator,
)

from requant.tasks.checkpoint.config import HeadPrecision
from requant.tasks.errors import RecipeError

SCHEME = re.compile(r"W(?P<bits>[2348])A16(?:G(?P<group_size>32|64))?")
# auto-round's own named recipes (auto-round 0.16.1, auto_round/cli/main.py, RECIPES).
PRESETS: dict[str, dict[str, int | float]] = {
    "auto-round": {"iters": 200, "nsamples": 128, "seqlen": 2048, "batch_size": 8},
    "auto-round-best": {"iters": 1000, "nsamples": 512, "seqlen": 2048, "batch_size": 8},
    "auto-round-light": {"iters": 50, "nsamples": 128, "seqlen": 2048, "batch_size": 8, "lr": 5e-3},
}
# Calibration texts of this package, in tasks/texts. The first one is the default: prose, code and chats.
BUILTIN = ("builtin:mixed", "builtin:python")
# The files that texts are read from, by the end of their names: of a kind, plain or compressed.
TEXT_KINDS = (".parquet", ".jsonl", ".json", ".txt")
COMPRESSIONS = (".gz", ".zst")
READABLE = (*TEXT_KINDS, *(kind + end for kind in TEXT_KINDS[1:] for end in COMPRESSIONS))
SELF = "self"  # the source whose text the base writes
MAX_SOURCES = 16
PRESET_KEYS = frozenset(key for preset in PRESETS.values() for key in preset)
REPO_ID = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?$"
# The rules of `_publishable` as a pattern for Prefect's form. pydantic cannot check it: its patterns have no lookahead.
NAME_PATTERN = r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
PUBLISHABLE = rf"^(?!.*(--|\.\.))(?!.*\.git$){NAME_PATTERN}/{NAME_PATTERN}$"
T = TypeVar("T")


def _add_form_hints(schema: dict[str, Any]) -> None:
    """Add what Prefect's form needs: the order of the fields, and a title for sections that may be absent."""
    for position, (name, field) in enumerate(schema.get("properties", {}).items()):
        field["position"] = position
        field.setdefault("title", name.replace("_", " ").capitalize())


def _allow_preset(schema: dict[str, Any]) -> None:
    """Allow the key `preset` without making it a field: a form sends all its fields, and these would override it."""
    _add_form_hints(schema)
    schema["patternProperties"] = {"^preset$": {"enum": list(PRESETS)}}


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, json_schema_extra=_add_form_hints)


def as_json(value: T) -> T:
    """Return the value unchanged. Raises ValueError if JSON cannot hold it."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise ValueError("use text, numbers, true, false, null, lists and mappings only") from None
    return value


def _known_scheme(value: str) -> str:
    if not SCHEME.fullmatch(value):
        raise ValueError("use W2A16, W3A16, W4A16 or W8A16, optionally with G32 or G64 behind it")
    return value


def _publishable(value: str) -> str:
    """Return the name of a repo that can be created: it names an owner and follows the rules of the Hub's client.

    Raises ValueError for other names.
    """
    from huggingface_hub.errors import HFValidationError  # This import takes 0.2 s, and few commands read a recipe.
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    reason = "" if "/" in value else "it names no owner"
    try:
        validate_repo_id(value)
    except HFValidationError as error:
        first = str(error).rpartition(": '")[0] or str(error)
        reason = first[0].lower() + first[1:]
    if reason:
        raise ValueError(f"write owner/name as the Hub takes it ({reason})")
    return value


def packing_format(export: str, bits: int, sym: bool, layer_bits: Collection[object]) -> str:
    """Return the packing format that auto-round uses for an export format.

    `layer_bits` holds the bits of all quantized layers: for `auto_round` with 4 bits, the packing depends on them.

    Source: auto-round 0.16.1, export/formats/backends/autoround.py, AutoRoundFormat.
    """
    if export != "auto_round":
        return export
    if sym:
        return "auto_round:auto_gptq"
    return "auto_round:auto_awq" if bits == 4 and all(width in (4, 16) for width in layer_bits) else "auto_round"


SCHEMES = [f"W{bits}A16{group}" for bits in (4, 8, 3, 2) for group in ("", "G64", "G32")]
Scheme = Annotated[str, AfterValidator(_known_scheme), WithJsonSchema({"type": "string", "enum": SCHEMES})]
PublishRepo = Annotated[str, AfterValidator(_publishable), WithJsonSchema({"type": "string", "pattern": PUBLISHABLE})]
Bits = Literal[2, 3, 4, 8]
GroupSize = Literal["auto", -1, 32, 64, 128, 256, 512, 1024]
Format = Literal["auto_round", "auto_round:auto_gptq", "auto_round:auto_awq"]
Iters = Annotated[int, Field(ge=0, le=10_000)]
SampleCount = Annotated[int, Field(ge=1, le=100_000)]
Length = Annotated[int, Field(ge=16, le=131_072)]
Batch = Annotated[int, Field(ge=1, le=1024)]
Rate = Annotated[float, Field(gt=0, le=1)]
Layers = Annotated[dict[str, dict[str, Any]], AfterValidator(as_json)]
HeadPolicy = Literal[HeadPrecision, "drop"]
SourceName = Annotated[str, Field(min_length=1, max_length=4096)]
# With this schema, a form shows one list of values instead of a choice of types.
AutoOrBool = Annotated[Literal["auto"] | bool, WithJsonSchema({"enum": ["auto", True, False]})]


class Source(Section):
    """One of several sources of the calibration samples."""

    source: SourceName = Field(description="As calibration: a data set, a local file or folder, builtin:NAME or self")
    weight: Annotated[float, Field(gt=0, le=1000)] | None = Field(
        None, description="Its share of the samples, beside the other weights; null: 1 if another source has one"
    )
    field: Annotated[str, Field(min_length=1, max_length=200)] | None = Field(
        None, description="The column with the text or the chat; null: as rows are read by default"
    )


def _entry_tag(value: object) -> str:
    """Return the tag of an entry of a list of sources. A value of a wrong type is validated as a name."""
    return SOURCE_TAG if isinstance(value, dict | Source) else NAME_TAG


def _calibration_tag(value: object) -> str:
    """Return the tag of a value of `calibration`."""
    return LIST_TAG if isinstance(value, list) else _entry_tag(value)


def _calibration_schema() -> dict[str, Any]:
    """Return the JSON schema of `calibration`: a form shows one field of text, unless another kind is chosen."""
    source = {"title": "One source with its settings", **Source.model_json_schema()}
    name = {"type": "string", "title": "One source", "minLength": 1}
    entries = {"anyOf": [{**name, "title": "Source"}, source]}
    several = {"type": "array", "title": "Several sources", "items": entries, "minItems": 1, "maxItems": MAX_SOURCES}
    return {"anyOf": [name, several, source]}


# The tags only tell pydantic by which type it validates. `loader.py` leaves them out of its sentences.
NAME_TAG, SOURCE_TAG, LIST_TAG = "a name", "a source", "a list"
CalibrationEntry = Annotated[
    Annotated[SourceName, Tag(NAME_TAG)] | Annotated[Source, Tag(SOURCE_TAG)], Discriminator(_entry_tag)
]
CalibrationSetting = Annotated[
    Annotated[SourceName, Tag(NAME_TAG)]
    | Annotated[Source, Tag(SOURCE_TAG)]
    | Annotated[list[CalibrationEntry], Field(min_length=1, max_length=MAX_SOURCES), Tag(LIST_TAG)],
    Discriminator(_calibration_tag),
    WithJsonSchema(_calibration_schema()),
]


class AskedScheme(NamedTuple):
    """The scheme of a recipe after its overrides. The group size can still be `auto`."""

    bits: int
    group_size: int | Literal["auto"]
    sym: bool


class ResolvedScheme(NamedTuple):
    """The scheme of a recipe with its group size as a number; -1 means one group per row."""

    bits: int
    group_size: int
    sym: bool


def _layer_bits(layer: Mapping[str, object], bits: int) -> object:
    """Read the bits from one entry of `layers`; `bits` if it names none, None if its scheme is not known."""
    if layer.get("bits") is not None:
        return layer["bits"]
    if layer.get("scheme") is None:
        return bits
    match = SCHEME.fullmatch(str(layer["scheme"]).upper())
    return int(match["bits"]) if match else None


class Quantize(Section):
    """How auto-round quantizes. The defaults are its default recipe."""

    model_config = ConfigDict(json_schema_extra=_allow_preset)

    scheme: Scheme = Field("W4A16", description="auto-round scheme: W2A16, W3A16, W4A16, W8A16, or with G32, G64")
    bits: Bits | None = Field(None, description="Overrides the scheme's bits")
    group_size: GroupSize | None = Field(
        None, description="Inputs that share a scale; -1: all; auto: the most that divides all. Overrides the scheme's"
    )
    sym: bool | None = Field(None, description="Symmetric zero point. Overrides the scheme's (true)")
    format: Format = Field("auto_round", description="auto-round export format")
    iters: Iters = Field(200, description="Tuning steps a block; 0: round to nearest")
    nsamples: SampleCount = Field(128, description="Calibration samples")
    seqlen: Length = Field(2048, description="Tokens a sample")
    batch_size: Batch = Field(8, description="Samples a step")
    lr: Rate | None = Field(None, description="Step size; by default 1 / iters")
    seed: int = Field(42, ge=0, le=2**32 - 1, description="Of the samples' order")
    calibration: CalibrationSetting = Field(
        BUILTIN[0],
        description="Hub data set id[@revision][:config][:split], a local file or folder, builtin:mixed, "
        "builtin:python for a model that writes Python alone, self for text that the base writes; or a list of "
        "these, each a name or {source, weight, field}",
    )
    layers: Layers = Field({}, description="Per-layer overrides: auto-round's layer_config")
    fast: AutoOrBool = Field("auto", description="Our tuning loop in place of auto-round's: the same steps")
    compare_last: AutoOrBool = Field(
        "auto", description="Keep the last step's rounding where it is better (in our loop)"
    )
    torch_compile: AutoOrBool = Field("auto", description="Compile each kind of block once")
    low_gpu_mem: AutoOrBool = Field("auto", description="Samples in the CPU's memory")
    gpus: Literal["auto"] | Annotated[int, Field(ge=1, le=64)] = Field(
        1, description="GPUs of one host that tune each block together; auto: all that there are"
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")

    @model_validator(mode="before")
    @classmethod
    def expand_preset(cls, values: Any) -> Any:
        """Replace `preset` by the keys that it stands for. Keys that are given next to it override the preset's."""
        if not isinstance(values, dict) or "preset" not in values:
            return values
        values = dict(values)
        preset = values.pop("preset")
        if not isinstance(preset, str) or preset not in PRESETS:
            raise ValueError(f"preset {preset!r} does not exist: use one of {', '.join(PRESETS)}")
        return {**PRESETS[preset], **values}

    @model_validator(mode="after")
    def possible(self) -> Quantize:
        bits, _, sym = self.asked
        if self.format == "auto_round:auto_awq" and bits != 4:
            raise ValueError(f"format {self.format} holds 4 bits only, not {bits}: use format auto_round")
        if self.format == "auto_round:auto_gptq" and not sym:
            raise ValueError("format auto_round:auto_gptq loses accuracy with sym false: use format auto_round")
        if bits == 8 and not sym:
            raise ValueError("8 bits with sym false: no format that engines serve holds that: leave sym out")
        self._check_sources()
        if self.gpus != 1 and self.device.startswith("cuda:"):
            raise ValueError(f"device {self.device} is one GPU, and gpus is {self.gpus}: write device cuda")
        if self.batch_size > self.nsamples:
            raise ValueError(f"batch_size {self.batch_size} is larger than nsamples {self.nsamples}")
        return self

    def _check_sources(self) -> None:
        """Raise ValueError for a built-in text that does not exist, and for a source that is named twice."""
        named = set()
        for source in self.sources:
            if source.source.startswith("builtin:") and source.source not in BUILTIN:
                raise ValueError(f"calibration {source.source} does not exist: use {' or '.join(BUILTIN)}")
            if source.field is not None and (source.source == SELF or source.source.startswith("builtin:")):
                raise ValueError(f"calibration {source.source} has no columns to choose from: leave field out")
            if (source.source, source.field) in named:
                raise ValueError(f"calibration names {source.source} twice: name it once, with a larger weight")
            named.add((source.source, source.field))

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources of the calibration samples, each with its settings."""
        given = self.calibration if isinstance(self.calibration, list) else [self.calibration]
        return tuple(one if isinstance(one, Source) else Source(source=one) for one in given)

    @property
    def asked(self) -> AskedScheme:
        """The scheme after overrides. A scheme has group size 128 and is symmetric unless the recipe says otherwise."""
        match = SCHEME.fullmatch(self.scheme)
        bits = self.bits or int(match["bits"] if match else 4)
        group_size = self.group_size or int((match and match["group_size"]) or 128)
        return AskedScheme(bits, group_size, True if self.sym is None else self.sym)

    @property
    def resolved(self) -> ResolvedScheme:
        """The scheme with a number as its group size. Raises RecipeError for `auto` (see `with_group_size`)."""
        bits, group_size, sym = self.asked
        if group_size == "auto":
            raise RecipeError(
                "quantize.group_size auto is not settled yet: a plan or a run of the recipe settles it from the base's "
                "headers; name a number here"
            )
        return ResolvedScheme(bits, group_size, sym)

    def require_group_size(self) -> None:
        """Raise RecipeError if the group size is still `auto`."""
        _ = self.resolved

    def with_group_size(self, group_size: int) -> Quantize:
        """Return these settings with a number in place of the group size `auto`.

        Where the scheme has this group size anyway, the number is left out (null). Then the stage key equals that of a
        recipe without a group size, and the results of such a recipe are reused.
        """
        if self.group_size != "auto":
            return self
        by_scheme = self.model_copy(update={"group_size": None})
        if by_scheme.asked.group_size == group_size:
            return by_scheme
        return self.model_copy(update={"group_size": group_size})

    @property
    def packing(self) -> str:
        """The packing format, as far as the recipe alone determines it: it assumes that the base has all `layers`."""
        return self._packing(self.format)

    @property
    def key_format(self) -> str:
        """The export format for a stage key: `auto_round` also where another format gives the same bytes."""
        return "auto_round" if self.packing == self._packing("auto_round") else self.format

    @property
    def makes(self) -> dict[str, Any]:
        """All settings, spelled so that two recipes which give the same bytes have equal ones."""
        bits, group_size, sym = self.asked
        normalized = {"scheme": None, "bits": bits, "group_size": group_size, "sym": sym, "format": self.packing}
        return self.model_dump(mode="json") | normalized

    def _packing(self, export: str) -> str:
        bits, _, sym = self.asked
        return packing_format(export, bits, sym, [bits, *(_layer_bits(layer, bits) for layer in self.layers.values())])


class Output(Section):
    """One of several results of a base: what it does otherwise than `quantize` and `mtp`. null: as they say."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] | None = Field(
        None, description="What it is called; null: after scheme and format, as W8A16-auto_round"
    )
    repo_id: PublishRepo | None = Field(
        None, description="Hub repo of this one; null: that of publish, with the name behind it"
    )
    preset: Literal["auto-round", "auto-round-best", "auto-round-light"] | None = Field(
        None, description="auto-round's named recipe; keys beside it win"
    )
    scheme: Scheme | None = Field(
        None, description="auto-round scheme; brings its bits, and its group size if it has one"
    )
    bits: Bits | None = Field(None, description="Overrides the scheme's bits")
    group_size: GroupSize | None = Field(None, description="Inputs that share a scale; -1: all; auto")
    sym: bool | None = Field(None, description="Symmetric zero point")
    format: Format | None = Field(None, description="auto-round export format")
    iters: Iters | None = Field(None, description="Tuning steps a block; 0: round to nearest")
    nsamples: SampleCount | None = Field(None, description="Calibration samples")
    seqlen: Length | None = Field(None, description="Tokens a sample")
    batch_size: Batch | None = Field(None, description="Samples a step")
    lr: Rate | None = Field(None, description="Step size")
    layers: Layers | None = Field(None, description="Per-layer overrides, in place of the others")
    mtp: HeadPolicy | None = Field(None, description="The MTP head")

    def applied_to(self, quantize: Quantize) -> Quantize:
        """Return `quantize` with the settings of this output in place of its own.

        A scheme of this output also replaces the bits of `quantize`, and the group size if the scheme names one. A
        preset replaces all keys that presets set. Raises ValidationError for an impossible combination.
        """
        own = self.model_dump(exclude_none=True, exclude={"name", "repo_id", "preset", "mtp"})
        replaced: set[str] = set(PRESET_KEYS) if self.preset else set()
        if self.scheme is not None:
            match = SCHEME.fullmatch(self.scheme)
            replaced |= {"bits", "group_size"} if match and match["group_size"] else {"bits"}
        kept = quantize.model_dump(exclude_unset=True, exclude=replaced)
        return Quantize.model_validate({**kept, **(PRESETS[self.preset] if self.preset else {}), **own})

    def name_for(self, quantize: Quantize) -> str:
        """Return the name of this output: as given, else made of the scheme and format of its settings `quantize`."""
        if self.name is not None:
            return self.name
        bits, group_size, sym = quantize.asked
        group = {"128": "", "auto": "", "-1": "Gall"}.get(str(group_size), f"G{group_size}")
        words = [f"W{bits}A16{group}{'' if sym else '-asym'}", quantize.format.removeprefix("auto_round:")]
        words += [self.preset.removeprefix("auto-round-")] if self.preset not in {None, "auto-round"} else []
        return "-".join([*words, *([f"mtp-{self.mtp}"] if self.mtp else [])])
