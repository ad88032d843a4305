"""The recipe: what to make of which base, which gates the result must pass, and where it is published.

The sections `quantize` and `outputs` are in `quantize_section.py`; `loader.py` reads a recipe from a YAML file.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from requant.tasks.artifact import digest_of
from requant.tasks.checkpoint.config import HEAD_BITS
from requant.tasks.recipe.base_section import Base
from requant.tasks.recipe.engine_flags import checked_flags, server_address
from requant.tasks.recipe.quantize_section import (
    NAME_TAG,
    HeadPolicy,
    Output,
    PublishRepo,
    Quantize,
    Section,
    as_json,
)

# The errors that PyYAML raises for text that is not YAML, or whose tags do not fit their values.
NOT_YAML = (yaml.YAMLError, RecursionError, ValueError, KeyError, IndexError, AttributeError, TypeError)
PACKED_HEADS = tuple(HEAD_BITS)
COLLECTION = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,200}$"
# Evaluation texts of this package, in tasks/texts. They have no text in common with the calibration texts.
BUILTIN_EVALUATION = ("builtin:mixed-evaluation", "builtin:python-evaluation")
DOMAINS_TAG = "texts by domain"  # as the tags of quantize_section.py
DOMAIN = r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}"  # the name of a domain of the evaluation text
# The default limit in nats, above the noise floor. In 4 bits, a model of 135 M parameters reaches at most 0.19 in any
# domain if it is tuned on all kinds of text. Without tuning, or tuned on code alone, it reaches 0.32 to 0.34. Larger
# models lose less. docs/explanation/gates.md has the table.
MAX_KL_DIVERGENCE = 0.25
MAX_PROBE_LOSS = 0.1  # docs/explanation/gates.md has the measurements behind it
ENGINES = ("auto", "vllm", "torch", "none")
ENGINE_URL = re.compile(r"url:https?://[A-Za-z0-9.-]{1,253}(:\d{1,5})?(/[A-Za-z0-9._~/-]{0,200})?")
# Keys that were added to these sections, and left out of a recipe's digest while they have their defaults.
LATER_KEYS = {
    "base": ("folder",),
    "quantize": ("compare_last", "gpus"),
    "validation": ("tokens",),
    "gates": ("mtp_acceptance", "max_probe_loss", "max_experts_without_tokens"),
    "eval": ("engine", "margin", "stop_early", "allow_code"),
    "benchmark": ("acceptance_precision", "base_engine"),
}


def _text_tag(value: object) -> str:
    """Return the tag of a value of `validation.text`. A value of a wrong type is validated as a name."""
    return DOMAINS_TAG if isinstance(value, dict) else NAME_TAG


TextName = Annotated[str, Field(min_length=1)]
DomainName = Annotated[str, Field(pattern=f"^{DOMAIN}$")]
ValidationText = Annotated[
    Annotated[TextName, Tag(NAME_TAG)]
    | Annotated[dict[DomainName, TextName], Field(min_length=1, max_length=16), Tag(DOMAINS_TAG)],
    Discriminator(_text_tag),
    # A form shows one field of text, unless the other kind is chosen.
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "title": "One text", "minLength": 1},
                {
                    "type": "object",
                    "title": "A text for each domain",
                    "propertyNames": {"pattern": f"^{DOMAIN}$"},
                    "additionalProperties": {"type": "string", "minLength": 1},
                    "minProperties": 1,
                    "maxProperties": 16,
                },
            ]
        }
    ),
]


class Validation(Section):
    """What the result and its base are measured on."""

    text: ValidationText = Field(
        BUILTIN_EVALUATION[0],
        description="Hub data set id[@revision], a local .txt or .jsonl file, builtin:mixed-evaluation, or "
        "builtin:python-evaluation for a model that writes Python alone; or one of these for each domain",
    )
    tokens: Annotated[int, Field(ge=512, le=1_048_576)] | None = Field(
        None, description="Tokens measured of each domain; null: 8192, and 12288 of a text without domains"
    )

    @field_validator("text")
    @classmethod
    def known_text(cls, value: str | dict[str, str]) -> str | dict[str, str]:
        for name in [value] if isinstance(value, str) else value.values():
            if name.startswith("builtin:") and name not in BUILTIN_EVALUATION:
                raise ValueError(f"{name} does not exist: use {' or '.join(BUILTIN_EVALUATION)}")
        return value


class Gates(Section):
    """Limits. What is null is measured and reported, and not compared. Structure is always compared."""

    max_perplexity_increase: Annotated[float, Field(ge=-1, le=100)] | None = Field(
        0.05, description="Perplexity over the base's, minus 1"
    )
    max_kl_divergence: Annotated[float, Field(ge=0, le=100)] | None = Field(
        MAX_KL_DIVERGENCE, description="Mean KL divergence of next-token distributions from the base's, in nats"
    )
    min_top1_agreement: Annotated[float, Field(ge=0, le=1)] | None = Field(
        0.85, description="Share of positions where both predict the same next token"
    )
    min_mtp_acceptance_ratio: Annotated[float, Field(ge=0, le=10)] | None = Field(
        0.95, description="Draft acceptance over the base's, in torch and in the benchmark's engine"
    )
    mtp_acceptance: Literal["required"] | None = Field(
        None, description="required: fail where neither torch nor an engine tells the draft acceptance"
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
    max_probe_loss: Annotated[float, Field(ge=0, le=1)] | None = Field(
        MAX_PROBE_LOSS,
        description="Share of the questions of a probe that the base answers well and the result does not",
    )
    max_experts_without_tokens: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Experts that no token of the calibration reached, so that they are rounded and not tuned"
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
        None, min_length=1, description="A folder of further task definitions; needs allow_code, as they can run Python"
    )
    allow_code: bool | None = Field(
        None,
        description="Run the Python of `definitions`, and none of the base's; null: as allow_remote_code says",
    )
    engine: Literal["auto", "torch"] = Field(
        "auto", description="auto: vLLM with the benchmark's flags, where the benchmark starts it; else torch"
    )
    margin: Annotated[float, Field(gt=0, le=1)] = Field(
        0.02,
        description="Difference that does not matter, for a score between 0 and 1; for other scores and for "
        "perplexities a share of the base's",
    )
    stop_early: bool = Field(True, description="Run the result only until its comparison with the base is decided")

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
    flags: Annotated[dict[str, Any], AfterValidator(as_json), AfterValidator(checked_flags)] = Field(
        {}, description="The engine's own, as it spells them"
    )
    prompts: list[Literal["card", "code", "prose", "chat"]] = Field(
        ["card"], min_length=1, description="Prompt sets: tasks/prompts"
    )
    concurrency: int = Field(4, ge=1, le=256, description="Requests at once, beside one at a time")
    draft_tokens: int = Field(1, ge=1, le=8, description="Tokens that the MTP head drafts at once")
    max_tokens: Annotated[int, Field(ge=1, le=32_768)] | None = Field(None, description="At most so many a prompt")
    acceptance_precision: float = Field(
        0.01,
        ge=0.001,
        le=0.2,
        description="Count drafts for engine_acceptance_ratio until half of the 95 % interval of each rate is at most "
        "this share of the rate",
    )
    base_engine: str | None = Field(
        None,
        description="url:http://... of a server that runs already and serves the base, with the same flags, for "
        "engine_acceptance_ratio; null: vllm is started on the base",
        json_schema_extra={"pattern": rf"^{ENGINE_URL.pattern}$"},
    )

    @field_validator("engine")
    @classmethod
    def known_engine(cls, value: str) -> str:
        if value not in ENGINES and not ENGINE_URL.fullmatch(value):
            raise ValueError(f"use {', '.join(ENGINES)}, or url:http://HOST:PORT of a server without a password in it")
        return value

    @field_validator("base_engine")
    @classmethod
    def address_of_base(cls, value: str | None) -> str | None:
        if value is not None and not ENGINE_URL.fullmatch(value):
            raise ValueError("use url:http://HOST:PORT of a server without a password in it")
        return value

    @model_validator(mode="after")
    def base_has_a_server_of_its_own(self) -> Benchmark:
        if self.base_engine is not None and server_address(self.base_engine) == server_address(self.engine):
            raise ValueError(f"base_engine {self.base_engine} serves the result: name the server of the base")
        return self


class Probes(Section):
    """Questions that base and result answer in vLLM, compared in pairs. They start it twice, and use the GPU."""

    sets: list[Literal["tools", "answers", "retrieval"]] = Field(
        ["tools", "answers", "retrieval"],
        min_length=1,
        description="tools: are calls valid and right; answers: do they end, without a loop; retrieval: are values "
        "found in long texts",
    )
    max_tokens: int = Field(4096, ge=64, le=131_072, description="Of one answer in `answers`, its thought included")
    max_context: int = Field(131_072, ge=4096, le=131_072, description="Tokens of the longest text of `retrieval`")
    retrieval_minutes: float = Field(
        10.0, gt=0, le=1440, description="Time for `retrieval`: longer texts are left out where it is used up"
    )
    limit: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Questions of each set, and of each length of text; null: all"
    )
    seed: int = Field(42, ge=0, le=2**31 - 1, description="Of the sampled answers")
    concurrency: int = Field(16, ge=1, le=256, description="Questions at once")

    @field_validator("sets")
    @classmethod
    def each_set_once(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("name each set once")
        return value


class Publish(Section):
    """Where the result goes."""

    repo_id: PublishRepo = Field(description="Hub repo of the result")
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


def _problem_of_output(error: ValidationError) -> str:
    """Say in a sentence what is wrong with the recipe of one output, whose single values are valid already."""
    problem = error.errors(include_url=False)[0]
    key, value = ".".join(map(str, problem["loc"])), problem["input"]
    if "error" not in problem.get("ctx", {}):
        return f"{key} {value} is not allowed: {problem['msg']}"
    sentence = str(problem["ctx"]["error"])
    return f"{key}: {sentence}, not {value!r}" if isinstance(value, str) else sentence


def _both_packed_as(one: Quantize, other: Quantize) -> str:
    """Say why two outputs are equal although their formats have different names; empty if the names are equal."""
    if one.format == other.format:
        return ""
    return f" (format {one.format} and format {other.format} are both packed as {one.packing})"


class Recipe(Section):
    """What to make of which base."""

    base: Base
    adapter: Base | None = Field(
        None,
        description="LoRA adapter of peft that is merged into the base first: a Hub repo owner/name[@revision], or a "
        "folder",
    )
    quantize: Quantize = Quantize()
    mtp: HeadPolicy = Field(
        "keep", description="The MTP head: keep (lossless, from the base), its layers packed to int8 or int4, or drop"
    )
    allow_remote_code: bool = Field(
        False, description="Run Python files of the base's repo; those of an evaluation have eval.allow_code"
    )
    validation: Validation = Validation()
    gates: Gates = Gates()
    eval: Eval | None = None
    benchmark: Benchmark = Benchmark()
    probes: Probes | None = None
    publish: Publish | None = None
    hardware: Hardware | None = None
    outputs: list[Output] = Field(
        [], max_length=16, description="Several results of one base, each with what it does otherwise; none: one result"
    )

    @model_validator(mode="after")
    def own_tasks_need_trust(self) -> Recipe:
        """Refuse task definitions of the user's own unless their code is allowed.

        Source: lm_eval 0.4.13. `!function` and `class` import Python files next to the YAML (tasks/_yaml_loader.py),
        and prompts are Jinja templates without a sandbox (utils.py).
        """
        if self.eval is None or self.eval.definitions is None:
            return self
        allowed = self.allow_remote_code if self.eval.allow_code is None else self.eval.allow_code
        if not allowed:
            raise ValueError(
                f"eval.definitions {self.eval.definitions} can run Python: trust it with allow_code: true in eval"
            )
        return self

    @model_validator(mode="after")
    def not_over_the_base(self) -> Recipe:
        if self.publish is None or self.outputs:  # Each output has its own repo, which its own recipe checks.
            return self
        if self.publish.repo_id.lower() == (self.base.repo_id or "").lower():
            raise ValueError(f"publish.repo_id {self.publish.repo_id} is the base itself: name a repo of your own")
        return self

    @model_validator(mode="after")
    def outputs_are_possible_and_differ(self) -> Recipe:
        names: dict[str, int] = {}
        made: dict[str, tuple[int, Recipe]] = {}
        targets: dict[str, int] = {}
        for number, output in enumerate(self.outputs):
            where = f"outputs.{number}"
            if output.repo_id is not None and self.publish is None:
                raise ValueError(f"{where}.repo_id {output.repo_id}: without publish, nothing is published: add it")
            try:
                name, recipe = self._recipe_of(output)
            except ValidationError as error:
                raise ValueError(f"{where}: {_problem_of_output(error)}") from None
            first, other = made.setdefault(recipe.makes, (number, recipe))
            if first != number:
                formats = _both_packed_as(other.quantize, recipe.quantize)
                raise ValueError(f"{where} makes the same as outputs.{first}{formats}: take one of them out")
            if (first := names.setdefault(name.lower(), number)) != number:
                raise ValueError(f"{where} would be called {name}, as outputs.{first} is: give it a name")
            if recipe.publish and (first := targets.setdefault(recipe.publish.repo_id.lower(), number)) != number:
                raise ValueError(
                    f"{where}.repo_id {recipe.publish.repo_id} is where outputs.{first} goes: name another repo"
                )
        return self

    @property
    def each(self) -> dict[str, Recipe]:
        """The recipe of each output by its name. A recipe without outputs is its own only one, with an empty name."""
        return dict(map(self._recipe_of, self.outputs)) if self.outputs else {"": self}

    def _recipe_of(self, output: Output) -> tuple[str, Recipe]:
        """Return the name and the recipe of one output. Raises ValidationError if it is impossible."""
        document = self.model_dump(exclude_unset=True, exclude={"outputs"})
        document["quantize"] = quantize = output.applied_to(self.quantize)
        name = output.name_for(quantize)
        if output.mtp is not None:
            document["mtp"] = output.mtp
        if self.publish is not None:
            document["publish"]["repo_id"] = output.repo_id or f"{self.publish.repo_id}-{name}"
        return name, Recipe.model_validate(document)

    def with_group_size(self, group_size: int) -> Recipe:
        """Return this recipe, which has no outputs, with a number in place of the group size `auto`."""
        quantize = self.quantize.with_group_size(group_size)
        return self if quantize is self.quantize else self.model_copy(update={"quantize": quantize})

    @property
    def digest(self) -> str:
        """The sha256 of the recipe, its defaults included, without the hardware. Runs of one recipe share it."""
        return digest_of(self._document())

    @property
    def makes(self) -> str:
        """The sha256 of what this recipe makes, however it is spelled and wherever that is published.

        The recipe must have no outputs: `each` holds the recipe of each output.
        """
        return digest_of(self._document() | {"publish": None, "quantize": self.quantize.makes})

    def _document(self) -> dict[str, Any]:
        """Return the recipe as JSON for its digest, without the hardware.

        Keys that were added later are left out unless they are used, so that the digests of earlier recipes stay.
        """
        unused = {"hardware"} | {section for section in ("adapter", "outputs", "probes") if not getattr(self, section)}
        document = self.model_dump(mode="json", exclude=unused)
        for section, keys in LATER_KEYS.items():
            settings = getattr(self, section)
            for key in keys:
                if settings is not None and getattr(settings, key) == type(settings).model_fields[key].default:
                    del document[section][key]
        # Null was the default of this limit at first, so recipes of that time have it in their digest.
        if document["gates"]["max_kl_divergence"] == MAX_KL_DIVERGENCE:
            document["gates"]["max_kl_divergence"] = None
        return document
