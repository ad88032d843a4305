"""What a recipe's groups of keys have in common, and two of them: `quantize`, and what an output does otherwise."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from requant.tasks.errors import RecipeError

SCHEME = re.compile(r"W(?P<bits>[2348])A16(?:G(?P<group_size>32|64))?")
# auto-round's own named recipes (auto_round/cli/main.py, RECIPES, 0.16.1).
PRESETS: dict[str, dict[str, Any]] = {
    "auto-round": {"iters": 200, "nsamples": 128, "seqlen": 2048, "batch_size": 8},
    "auto-round-best": {"iters": 1000, "nsamples": 512, "seqlen": 2048, "batch_size": 8},
    "auto-round-light": {"iters": 50, "nsamples": 128, "seqlen": 2048, "batch_size": 8, "lr": 5e-3},
}
# Texts of this package to calibrate with, in tasks/texts. The first is the default: prose, code and chats.
BUILTIN = ("builtin:mixed", "builtin:python")
PRESET_KEYS = frozenset(key for preset in PRESETS.values() for key in preset)
REPO_ID = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?$"
# What `_publishable` allows, as a form checks it: pydantic's own patterns know no lookahead.
NAME_PATTERN = r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
PUBLISHABLE = rf"^(?!.*(--|\.\.))(?!.*\.git$){NAME_PATTERN}/{NAME_PATTERN}$"


def _as_form(schema: dict[str, Any]) -> None:
    """What Prefect's form needs beside the schema: the order of the fields, a title for a group that may be absent."""
    for position, (name, field) in enumerate(schema.get("properties", {}).items()):
        field["position"] = position
        field.setdefault("title", name.replace("_", " ").capitalize())


def _with_preset(schema: dict[str, Any]) -> None:
    """`preset` is allowed, and no field: a form sends what its other fields show, which wins over a preset."""
    _as_form(schema)
    schema["patternProperties"] = {"^preset$": {"enum": list(PRESETS)}}


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, json_schema_extra=_as_form)


def as_json(value: dict[str, Any]) -> dict[str, Any]:
    """What a recipe hands on to others must be what JSON can hold."""
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
    """Refuse the name of a repo that the Hub would not make: its client's own rules, and an owner."""
    from huggingface_hub.errors import HFValidationError  # takes 0.2 s, and few commands read a recipe
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


def packing_format(export: str, bits: int, sym: bool, widths: Collection[Any]) -> str:
    """Tell how auto-round packs for an export format. `widths`: the bits of all layers, which `auto_round` looks at.

    Source: auto-round 0.16.1, export/formats/backends/autoround.py, AutoRoundFormat.
    """
    if export != "auto_round":
        return export
    if sym:
        return "auto_round:auto_gptq"
    return "auto_round:auto_awq" if bits == 4 and all(width in (4, 16) for width in widths) else "auto_round"


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
HeadPolicy = Literal["keep", "int8", "int4", "drop"]
# A form shows one list, not a choice of types.
AutoOrBool = Annotated[Literal["auto"] | bool, WithJsonSchema({"enum": ["auto", True, False]})]


def _width(layer: Mapping[str, Any], bits: int) -> Any:
    """Read the bits of one entry of `layers`, by default `bits`; None: not known."""
    if layer.get("bits") is not None:
        return layer["bits"]
    if layer.get("scheme") is None:
        return bits
    match = SCHEME.fullmatch(str(layer["scheme"]).upper())
    return int(match["bits"]) if match else None


class Quantize(Section):
    """How auto-round quantizes. The defaults are its default recipe."""

    model_config = ConfigDict(json_schema_extra=_with_preset)

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
    calibration: str = Field(
        BUILTIN[0],
        description="Hub data set id[@revision], a local .txt or .jsonl file, builtin:mixed, or builtin:python for a "
        "model that writes Python alone",
    )
    layers: Layers = Field({}, description="Per-layer overrides: auto-round's layer_config")
    fast: AutoOrBool = Field("auto", description="Our tuning loop in place of auto-round's: the same steps")
    compare_last: AutoOrBool = Field(
        "auto", description="Keep the last step's rounding where it is better (in our loop)"
    )
    torch_compile: AutoOrBool = Field("auto", description="Compile each kind of block once")
    low_gpu_mem: AutoOrBool = Field("auto", description="Samples in the CPU's memory")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")

    @model_validator(mode="before")
    @classmethod
    def expand_preset(cls, values: Any) -> Any:
        """`preset: auto-round-best` stands for that preset's keys; keys given beside it win."""
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
        if self.calibration.startswith("builtin:") and self.calibration not in BUILTIN:
            raise ValueError(f"calibration {self.calibration} does not exist: use {' or '.join(BUILTIN)}")
        if self.batch_size > self.nsamples:
            raise ValueError(f"batch_size {self.batch_size} is larger than nsamples {self.nsamples}")
        return self

    @property
    def asked(self) -> tuple[int, int | Literal["auto"], bool]:
        """(bits, group_size, sym) after overrides; a scheme has group size 128 and is symmetric unless it says so."""
        match = SCHEME.fullmatch(self.scheme)
        bits = self.bits or int(match["bits"] if match else 4)
        group_size = self.group_size or int((match and match["group_size"]) or 128)
        return bits, group_size, True if self.sym is None else self.sym

    @property
    def resolved(self) -> tuple[int, int, bool]:
        """The same once the group size is a number. Raises RecipeError as long as it is auto (`with_group_size`)."""
        bits, group_size, sym = self.asked
        if group_size == "auto":
            raise RecipeError(
                "quantize.group_size auto is not settled yet: a plan or a run of the recipe settles it from the base's "
                "headers; name a number here"
            )
        return bits, group_size, sym

    def with_group_size(self, group_size: int) -> Quantize:
        """These settings with a number in place of auto: null where the scheme gives this number in any case.

        So auto has the stage key of a recipe that names no group size, and finds what that recipe has made.
        """
        if self.group_size != "auto":
            return self
        by_scheme = self.model_copy(update={"group_size": None})
        return by_scheme if by_scheme.asked[1] == group_size else self.model_copy(update={"group_size": group_size})

    @property
    def packing(self) -> str:
        """Tell how auto-round packs, as far as the recipe alone tells: whether the base has the layers that `layers`
        names is known to a plan."""
        return self._packing(self.format)

    @property
    def key_format(self) -> str:
        """Name the format for a stage key: `auto_round` also where another name makes the same bytes."""
        return "auto_round" if self.packing == self._packing("auto_round") else self.format

    @property
    def makes(self) -> dict[str, Any]:
        """List all settings, with scheme, overrides and format in one spelling for all that make the same bytes."""
        bits, group_size, sym = self.asked
        spelled = {"scheme": None, "bits": bits, "group_size": group_size, "sym": sym, "format": self.packing}
        return self.model_dump(mode="json") | spelled

    def _packing(self, export: str) -> str:
        bits, _, sym = self.asked
        return packing_format(export, bits, sym, [bits, *(_width(layer, bits) for layer in self.layers.values())])


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

    def over(self, quantize: Mapping[str, Any]) -> dict[str, Any]:
        """`quantize` with what this output says. A scheme stands for its bits and a preset for all that presets say, so
        that what `quantize` says of these does not apply."""
        given = self.model_dump(exclude_none=True, exclude={"name", "repo_id", "preset", "mtp"})
        gone: set[str] = set(PRESET_KEYS) if self.preset else set()
        if self.scheme is not None:
            match = SCHEME.fullmatch(self.scheme)
            gone |= {"bits", "group_size"} if match and match["group_size"] else {"bits"}
        kept = {key: value for key, value in quantize.items() if key not in gone}
        return {**kept, **(PRESETS[self.preset] if self.preset else {}), **given}

    def called(self, quantize: Quantize) -> str:
        """Its name; `quantize` is what it comes to."""
        if self.name is not None:
            return self.name
        bits, group_size, sym = quantize.asked
        group = {"128": "", "-1": "Gall"}.get(str(group_size), f"G{group_size}")
        words = [f"W{bits}A16{group}{'' if sym else '-asym'}", quantize.format.removeprefix("auto_round:")]
        words += [self.preset.removeprefix("auto-round-")] if self.preset not in {None, "auto-round"} else []
        return "-".join([*words, *([f"mtp-{self.mtp}"] if self.mtp else [])])
