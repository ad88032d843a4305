"""The recipe: one YAML file that says what to make of which base, which gates it must pass and where it goes."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, field_validator, model_validator

from tasks.artifact import digest_of
from tasks.serving.flags import check_flags

# What PyYAML raises for text that is not YAML, or whose tags do not fit their values.
NOT_YAML = (yaml.YAMLError, RecursionError, ValueError, KeyError, IndexError, AttributeError, TypeError)
PACKED_HEADS = ("int8", "int4")
REPO_ID = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?$"
COLLECTION = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,200}$"
SCHEME = re.compile(r"W(?P<bits>[2348])A16(?:G(?P<group_size>32|64))?")
# auto-round's own named recipes (auto_round/cli/main.py, RECIPES, 0.16.1).
PRESETS: dict[str, dict[str, Any]] = {
    "auto-round": {"iters": 200, "nsamples": 128, "seqlen": 2048, "batch_size": 8},
    "auto-round-best": {"iters": 1000, "nsamples": 512, "seqlen": 2048, "batch_size": 8},
    "auto-round-light": {"iters": 50, "nsamples": 128, "seqlen": 2048, "batch_size": 8, "lr": 5e-3},
}
# Texts of this package, in tasks/texts: to calibrate with, and to measure on. They share nothing.
BUILTIN = ("builtin:python",)
BUILTIN_EVALUATION = ("builtin:python-evaluation",)
ENGINES = ("auto", "vllm", "torch", "none")
ENGINE_URL = re.compile(r"url:https?://[A-Za-z0-9.-]{1,253}(:\d{1,5})?(/[A-Za-z0-9._~/-]{0,200})?")
# A form shows one list, not a choice of types.
Choice = Annotated[Literal["auto"] | bool, WithJsonSchema({"enum": ["auto", True, False]})]


def _as_form(schema: dict[str, Any]) -> None:
    """What Prefect's form needs beside the schema: the order of the fields, a title for a group that may be absent."""
    for position, (name, field) in enumerate(schema.get("properties", {}).items()):
        field["position"] = position
        field.setdefault("title", name.replace("_", " ").capitalize())


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, json_schema_extra=_as_form)


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    """What a recipe hands on to others must be what JSON can hold."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise ValueError("use text, numbers, true, false, null, lists and mappings only") from None
    return value


class Base(Section):
    """The base: a Hub repo at a revision, resolved to a commit before anything else happens."""

    repo_id: str = Field(pattern=REPO_ID, description="Hub repo of the base checkpoint")
    revision: str = Field("main", min_length=1, max_length=255, description="Branch, tag or commit")


class Quantize(Section):
    """How auto-round quantizes. The defaults are its default recipe."""

    scheme: str = Field(
        "W4A16",
        description="auto-round scheme: W2A16, W3A16, W4A16, W8A16, or with G32, G64",
        json_schema_extra={"enum": [f"W{bits}A16{group}" for bits in (4, 8, 3, 2) for group in ("", "G64", "G32")]},
    )
    bits: Literal[2, 3, 4, 8] | None = Field(None, description="Overrides the scheme's bits")
    group_size: Literal[-1, 32, 64, 128, 256, 512, 1024] | None = Field(
        None, description="Inputs that share a scale; -1: all. Overrides the scheme's"
    )
    sym: bool | None = Field(None, description="Symmetric zero point. Overrides the scheme's (true)")
    format: Literal["auto_round", "auto_round:auto_gptq", "auto_round:auto_awq"] = Field(
        "auto_round", description="auto-round export format"
    )
    iters: int = Field(200, ge=0, le=10_000, description="Tuning steps a block; 0: round to nearest")
    nsamples: int = Field(128, ge=1, le=100_000, description="Calibration samples")
    seqlen: int = Field(2048, ge=16, le=131_072, description="Tokens a sample")
    batch_size: int = Field(8, ge=1, le=1024, description="Samples a step")
    lr: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="Step size; by default 1 / iters")
    seed: int = Field(42, ge=0, le=2**32 - 1, description="Of the samples' order")
    calibration: str = Field(
        "builtin:python", description="Hub data set id[@revision], a local .txt or .jsonl file, or builtin:python"
    )
    layers: Annotated[dict[str, dict[str, Any]], AfterValidator(_as_json)] = Field(
        {}, description="Per-layer overrides: auto-round's layer_config"
    )
    fast: Choice = Field("auto", description="Our tuning loop in place of auto-round's: the same steps")
    torch_compile: Choice = Field("auto", description="Compile each kind of block once")
    low_gpu_mem: Choice = Field("auto", description="Samples in the CPU's memory")
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

    @field_validator("scheme")
    @classmethod
    def known_scheme(cls, value: str) -> str:
        if not SCHEME.fullmatch(value):
            raise ValueError("use W2A16, W3A16, W4A16 or W8A16, optionally with G32 or G64 behind it")
        return value

    @model_validator(mode="after")
    def possible(self) -> Quantize:
        bits, _, sym = self.resolved
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
    def resolved(self) -> tuple[int, int, bool]:
        """(bits, group_size, sym) after overrides; a scheme has group size 128 and is symmetric unless it says so."""
        match = SCHEME.fullmatch(self.scheme)
        bits = self.bits or int(match["bits"] if match else 4)
        group_size = self.group_size or int((match and match["group_size"]) or 128)
        return bits, group_size, True if self.sym is None else self.sym


class Validation(Section):
    """What the result and its base are measured on."""

    text: str = Field(
        BUILTIN_EVALUATION[0],
        min_length=1,
        description="Hub data set id[@revision], a local .txt or .jsonl file, or builtin:python-evaluation",
    )

    @field_validator("text")
    @classmethod
    def known_text(cls, value: str) -> str:
        if value.startswith("builtin:") and value not in BUILTIN_EVALUATION:
            raise ValueError(f"{value} does not exist: use {' or '.join(BUILTIN_EVALUATION)}")
        return value


class Gates(Section):
    """Limits. What is null is measured and reported, and not compared. Structure is always compared."""

    max_perplexity_increase: Annotated[float, Field(ge=-1, le=100)] | None = Field(
        0.05, description="Perplexity over the base's, minus 1"
    )
    max_kl_divergence: Annotated[float, Field(ge=0, le=100)] | None = Field(
        None, description="Mean KL divergence of next-token distributions from the base's, in nats"
    )
    min_top1_agreement: Annotated[float, Field(ge=0, le=1)] | None = Field(
        0.85, description="Share of positions where both predict the same next token"
    )
    min_mtp_acceptance_ratio: Annotated[float, Field(ge=0, le=10)] | None = Field(
        0.95, description="Draft acceptance over the base's"
    )
    max_block_error: Annotated[float, Field(ge=0, le=100)] | None = Field(
        0.5, description="Error of one decoder block's output, given the base's input, over what the block adds"
    )
    max_weight_slope_error: Annotated[float, Field(ge=0, le=100)] | None = Field(
        0.03, description="Slope of one packed matrix on the base's, from where rounding alone would put it"
    )
    max_weight_offset: Annotated[float, Field(ge=0, le=100)] | None = Field(
        0.25, description="Mean difference of one packed matrix from the base's, in steps of its scales"
    )
    min_task_recovery: Annotated[float, Field(ge=0, le=10)] | None = Field(
        0.95, description="Score of the lm-eval task that kept least, over the base's"
    )


class Eval(Section):
    """lm-eval tasks, run on the base and on the result. Needs `requant[eval]`."""

    tasks: list[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:+()-]{0,127}$")]] = Field(
        min_length=1, max_length=100, description="Names of tasks, groups or tags, as `lm_eval ls tasks` lists them"
    )
    limit: Annotated[int, Field(ge=1)] | None = Field(None, description="Samples of each task; null: all")
    num_fewshot: Annotated[int, Field(ge=0, le=100)] | None = Field(None, description="Examples; null: the task's own")
    chat_template: bool = Field(False, description="Ask through the model's chat template")
    batch_size: int = Field(8, ge=1, le=1024, description="Requests at a time")
    definitions: str | None = Field(
        None, min_length=1, description="A folder of further task definitions; lm-eval's can run Python"
    )

    @field_validator("tasks")
    @classmethod
    def each_once(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("name each task once")
        return value


class Benchmark(Section):
    """What measures speed. `torch` is transformers on the machine at hand, never an engine's figure."""

    engine: str = Field(
        "auto",
        description="auto (vllm where there is one, else torch), vllm, url:http://..., torch, none",
        json_schema_extra={"pattern": rf"^({'|'.join(ENGINES)}|{ENGINE_URL.pattern})$"},
    )
    flags: Annotated[dict[str, Any], AfterValidator(_as_json)] = Field(
        {}, description="The engine's own, as it spells them"
    )
    prompts: list[Literal["card", "code", "prose", "chat"]] = Field(
        ["card"], min_length=1, description="Prompt sets: tasks/prompts"
    )
    concurrency: int = Field(4, ge=1, le=256, description="Requests at once, beside one at a time")
    draft_tokens: int = Field(1, ge=1, le=8, description="Tokens that the MTP head drafts at once")
    max_tokens: Annotated[int, Field(ge=1, le=32_768)] | None = Field(None, description="At most so many a prompt")

    @field_validator("engine")
    @classmethod
    def known_engine(cls, value: str) -> str:
        if value not in ENGINES and not ENGINE_URL.fullmatch(value):
            raise ValueError(f"use {', '.join(ENGINES)}, or url:http://HOST:PORT of a server without a password in it")
        return value

    @field_validator("flags")
    @classmethod
    def possible_flags(cls, value: dict[str, Any]) -> dict[str, Any]:
        check_flags(value)
        return value


class Publish(Section):
    """Where the result goes."""

    repo_id: str = Field(pattern=REPO_ID, description="Hub repo of the result")
    private: bool | None = Field(None, description="null: as the base, and what is private stays so")
    gated: Literal["auto", "manual", "open"] | None = Field(
        None, description="Who may read: null: as the base, and what is gated stays so"
    )
    license: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.+-]{0,63}$")] | None = Field(
        None, description="The card's license; null: the base's"
    )
    collection: Annotated[str, Field(pattern=COLLECTION)] | None = Field(
        None, description="Hub collection to be listed in: owner/title-0123456789abcdef01234567"
    )
    pull_request: bool = Field(False, description="Leave the move of main to a person: open a pull request")
    overwrite: bool = Field(False, description="Publish over a main that someone else changed")


class Hardware(Section):
    """What it runs on, for the plan: how long it takes there, and what it costs. Changes no result, so no stage key."""

    gpu: str | None = Field(None, min_length=1, max_length=100, description="Name of the GPU, as NVIDIA H100 80GB HBM3")
    price_per_hour: Annotated[float, Field(ge=0, le=10_000)] | None = Field(None, description="In any currency")


class Recipe(Section):
    """What to make of which base."""

    base: Base
    quantize: Quantize = Quantize()
    mtp: Literal["keep", "int8", "int4", "drop"] = Field(
        "keep", description="The MTP head: keep (lossless, from the base), its layers packed to int8 or int4, or drop"
    )
    allow_remote_code: bool = Field(False, description="Run Python files of the base's repo")
    validation: Validation = Validation()
    gates: Gates = Gates()
    eval: Eval | None = None
    benchmark: Benchmark = Benchmark()
    publish: Publish | None = None
    hardware: Hardware | None = None

    @model_validator(mode="after")
    def own_tasks_are_code(self) -> Recipe:
        """Source: lm_eval 0.4.13. `!function` and `class` import what stands beside the YAML (tasks/_yaml_loader.py),
        and prompts are Jinja templates without a sandbox (utils.py)."""
        if self.eval is not None and self.eval.definitions is not None and not self.allow_remote_code:
            raise ValueError(
                f"eval.definitions {self.eval.definitions} can run Python: trust it with allow_remote_code: true"
            )
        return self

    @model_validator(mode="after")
    def not_over_the_base(self) -> Recipe:
        if self.publish is not None and self.publish.repo_id.lower() == self.base.repo_id.lower():
            raise ValueError(f"publish.repo_id {self.publish.repo_id} is the base itself: name a repo of your own")
        return self

    @property
    def digest(self) -> str:
        """sha256 of all that the recipe says, defaults too, but the hardware: how runs of a recipe know each other."""
        return digest_of(self.model_dump(mode="json", exclude={"hardware"}))
