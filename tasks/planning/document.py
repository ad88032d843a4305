"""The document of a plan, which `requant plan --json` prints and which a run makes before it downloads anything.

Its keys are a contract with users: `requant schema plan` prints them as a JSON Schema. Sizes are in bytes, times in
seconds, costs in the currency of `hardware.price_per_hour`. An unknown value is null. A key whose description says
"absent" is left out where it has no meaning.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from requant.tasks.checkpoint.document import EngineVerdict, ModuleGroup
from requant.tasks.documents import Document, is_empty, is_none
from requant.tasks.texts.calibration import CalibrationSource

StageName = Literal[
    "download",
    "merge",
    "self_calibration",
    "quantize",
    "mtp_fix",
    "validate",
    "benchmark",
    "acceptance",
    "probe",
    "publish",
]


class PlannedBase(Document):
    """The base at the commit that would be used."""

    repo_id: str = Field(description="The base's repo on the Hub, owner/name; of a base in a folder, its name")
    folder: str | None = Field(
        None, exclude_if=is_none, description="The folder of a base that is not on the Hub; otherwise absent"
    )
    revision: str = Field(description="The branch, tag or commit that the recipe names")
    sha: str | None = Field(
        description="The commit that the revision is now, of a folder a digest of its files; null where it does not "
        "resolve, and for a large folder that no run has hashed yet"
    )
    adapter: str | None = Field(
        None, exclude_if=is_none, description="The adapter that is merged into it, at its commit; otherwise absent"
    )
    bytes: int | None = Field(description="Bytes of the files that a run fetches; null where there is no commit")
    tensors: int | None = Field(description="Tensors of the checkpoint; null where it cannot be used")


class PlannedStage(Document):
    """A stage of the run, and what it takes."""

    output: str | None = Field(
        None, exclude_if=is_none, description="The output that the stage works on; absent in a plan of one result"
    )
    name: StageName = Field(description="The stage")
    state: Literal["run", "reused"] = Field(description="Whether the stage would run, or its result is there already")
    bytes: int = Field(description="Bytes that the stage moves or reads; 0 where it is reused")
    seconds: float = Field(description="Seconds that the stage takes; 0 where it is reused")
    cost: float | None = Field(description="What the GPU costs for so long; null without a price or where none is used")
    figure: str = Field(description="Where the seconds are from, in words")
    again: str | None = Field(
        None,
        exclude_if=is_none,
        description="Why the stage runs although the store has an earlier result of it; absent where it has none",
    )


class QuantizationScheme(Document):
    """How the weights of most quantized layers are stored."""

    bits: int = Field(description="Bits of a weight")
    group_size: int = Field(description="Weights of a row that share one scale; -1: whole rows")
    sym: bool = Field(description="Whether the zero point is the middle of the range")


class KeptTensors(Document):
    """Tensors that stay as the base has them."""

    tensors: str = Field(description="Their name, with * for numbers or for all tensors below")
    count: int = Field(description="How many tensors there are")
    why: str = Field(description="Why they are not quantized")


class OutputLayout(Document):
    """The checkpoint that one result comes to."""

    bytes: int = Field(description="Bytes of all files")
    weights_bytes: int = Field(description="Bytes of the weight files")
    quantized_tensors: int = Field(description="Matrices that are quantized, the MTP head's aside")
    kept_tensors: int = Field(description="Tensors that stay as the base has them")
    scheme: QuantizationScheme = Field(description="The scheme of layers that the recipe gives none of their own")
    packing: str = Field(description="auto-round's name of the layout of packed weights, as auto_round:auto_gptq")
    shards: dict[str, int] = Field(description="Bytes of each weight file, by path")
    files: dict[str, int] = Field(description="Bytes of each file, by path")
    quantized: tuple[ModuleGroup, ...] = Field(description="The quantized modules, in groups")
    kept: tuple[KeptTensors, ...] = Field(description="The tensors that stay as they are, in groups")


class OutputTotals(Document):
    """What several outputs come to together, or nulls where nothing can be made."""

    bytes: int | None = Field(description="Bytes of all files of the outputs that can be made; null where none can")
    quantized_tensors: None = Field(description="Stands in the plan of each output")
    kept_tensors: None = Field(description="Stands in the plan of each output")


class StageNeeds(Document):
    """What one stage takes. A key is absent where the stage takes nothing of the kind."""

    disk_bytes: int | None = Field(None, exclude_if=is_none, description="Bytes of disk that the stage adds")
    ram_bytes: int | None = Field(None, exclude_if=is_none, description="Peak bytes of memory")
    vram_bytes: int | None = Field(None, exclude_if=is_none, description="Peak bytes of GPU memory")
    low_ram_bytes: int | None = Field(
        None, exclude_if=is_none, description="Peak bytes of memory with quantize.low_gpu_mem"
    )
    low_vram_bytes: int | None = Field(
        None, exclude_if=is_none, description="Peak bytes of GPU memory with quantize.low_gpu_mem"
    )


class MemoryNeeds(Document):
    """What the run takes of memory."""

    ram_bytes: int = Field(description="Peak bytes of memory")
    vram_bytes: int = Field(description="Peak bytes of GPU memory")


class Needs(Document):
    """What the run takes: disk is the sum of its stages, memory the most of any."""

    disk_bytes: int = Field(description="Bytes that must be free below the store now")
    ram_bytes: int = Field(description="Peak bytes of memory")
    vram_bytes: int = Field(description="Peak bytes of GPU memory")
    low_gpu_mem: MemoryNeeds = Field(description="The same with quantize.low_gpu_mem")
    stages: dict[str, StageNeeds] = Field(description="What each stage that would run takes, by its name")

    @classmethod
    def of(cls, stages: dict[str, StageNeeds], kept_bytes: int = 0) -> Needs:
        """Add up the stages. `kept_bytes` is the disk space that earlier outputs of the same run keep occupied."""
        every = stages.values()
        return cls(
            disk_bytes=kept_bytes + sum(stage.disk_bytes or 0 for stage in every),
            ram_bytes=max((stage.ram_bytes or 0 for stage in every), default=0),
            vram_bytes=max((stage.vram_bytes or 0 for stage in every), default=0),
            low_gpu_mem=MemoryNeeds(
                ram_bytes=max((stage.low_ram_bytes or 0 for stage in every), default=0),
                vram_bytes=max((stage.low_vram_bytes or 0 for stage in every), default=0),
            ),
            stages=stages,
        )


class UnknownNeeds(Document):
    """What a run takes that cannot be planned."""

    disk_bytes: None = Field(description="Not known")
    ram_bytes: None = Field(description="Not known")
    vram_bytes: None = Field(description="Not known")


class Transfers(Document):
    """What goes over the network."""

    download_bytes: int = Field(description="Bytes of the base that the store lacks; 0 for a base in a folder")
    upload_bytes: int = Field(description="Bytes that publishing sends")

    @classmethod
    def of(cls, stages: Iterable[PlannedStage], *, from_folder: bool = False) -> Transfers:
        moved = {stage.name: stage.bytes for stage in stages}
        return cls(download_bytes=0 if from_folder else moved.get("download", 0), upload_bytes=moved.get("publish", 0))


class PlannedHardware(Document):
    """Where the run takes place, how long and for how much."""

    gpu: str | None = Field(description="The GPU that the recipe names, or cpu; null: whatever is there")
    seconds: float = Field(description="Seconds of all stages")
    price_per_hour: float | None = Field(description="Price of the GPU for an hour, as the recipe has it")
    cost: float | None = Field(description="Cost of all stages that use the GPU; null without a price")


class FileChanges(Document):
    """Paths of the base's files, at most 100 of a kind."""

    added: tuple[str, ...] = Field(description="Files that are new")
    removed: tuple[str, ...] = Field(description="Files that are gone")
    changed: tuple[str, ...] = Field(description="Files whose content is another")


class TensorChanges(Document):
    """Names of the base's tensors, at most 100 of a kind, from headers."""

    added: tuple[str, ...] = Field(description="Tensors that are new")
    removed: tuple[str, ...] = Field(description="Tensors that are gone")
    retyped: tuple[str, ...] = Field(description="Tensors whose dtype or shape is another")
    in_changed_shards: int = Field(description="How many tensors lie in weight files that changed")


class FieldChange(Document):
    """A field of config.json that has another value."""

    field: str = Field(description="Its path, with dots")
    before: str | None = Field(description="Its value before, as JSON; null where it was not there")
    now: str | None = Field(description="Its value now, as JSON; null where it is gone")


class BaseChanges(Document):
    """What the base's commit changed against the last one that was downloaded."""

    since: str = Field(description="The commit that was downloaded last")
    files: FileChanges = Field(description="The files")
    tensors: TensorChanges | None = Field(description="The tensors; null where no file changed or they are not known")
    config: tuple[FieldChange, ...] = Field(description="Fields of config.json, at most 100")


class Plan(Document):
    """What making one result does, takes and costs, or making all results of a recipe."""

    base: PlannedBase = Field(description="The base")
    stages: tuple[PlannedStage, ...] = Field(description="The stages in their order; none where nothing can be made")
    output: OutputLayout | OutputTotals = Field(description="The checkpoint that comes out")
    needs: Needs | UnknownNeeds = Field(description="Disk and memory; of several outputs, the most of any")
    transfer: Transfers = Field(description="What goes over the network")
    engines: dict[str, EngineVerdict] = Field(description="By engine: will it load; of several outputs, the worst")
    hardware: PlannedHardware = Field(description="Time and cost")
    changes: BaseChanges | None = Field(description="What is new in the base; null where it was never downloaded")
    notes: tuple[str, ...] = Field(description="What is worth knowing and stops nothing, in sentences")
    problems: tuple[str, ...] = Field(description="What would stop the run, in sentences")
    warnings: tuple[str, ...] = Field(
        (),
        exclude_if=is_empty,
        description="What may stop the run or make it slow, and what could not be checked; absent where there is "
        "nothing of the kind",
    )


class OutputName(Document):
    """Which of several outputs a plan is of."""

    name: str = Field(description="The output's name")
    repo_id: str | None = Field(description="The repo that the output is published to; null: it stays in the store")


class PlannedOutput(Plan, OutputName):
    """The plan of one of several outputs."""

    @classmethod
    def of(cls, name: str, repo_id: str | None, plan: Plan) -> PlannedOutput:
        return cls(name=name, repo_id=repo_id, **{part: getattr(plan, part) for part in Plan.model_fields})


class PlannedSource(Document):
    """A text that calibration samples will be taken from."""

    source: str = Field(description="Its name, pinned to what it is now")
    field: str | None = Field(description="The only column that is read, if the recipe names one")
    weight: float | None = Field(description="Its share of the samples beside the other weights, if it has one")
    chats: bool = Field(description="Whether it has chats, which go through the base's chat template")
    license: str | None = Field(description="The license that a data set's card names")

    @classmethod
    def of(cls, source: CalibrationSource) -> PlannedSource:
        text = source.text
        return cls(source=text.name, field=text.field, weight=source.weight, chats=text.chats, license=text.license)


class PlanDocument(Plan):
    """What a run of a recipe will do, take and cost, and what would stop it."""

    calibration: tuple[PlannedSource, ...] | None = Field(
        None,
        exclude_if=is_none,
        description="The texts that samples will be taken from; absent where the base cannot be read",
    )
    repo_id: str | None = Field(
        None,
        exclude_if=is_none,
        description="The repo that the result is published to; absent where it stays in the store, and of outputs",
    )
    outputs: tuple[PlannedOutput, ...] | None = Field(
        None,
        exclude_if=is_none,
        description="The plan of each output; empty where the base cannot be read; absent where the recipe has none",
    )
