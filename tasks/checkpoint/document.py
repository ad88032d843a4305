"""The documents that `requant inspect` and `requant mtp-fix` print with `--json`.

Their keys are a contract with users: `requant schema` prints them as JSON Schemas. Sizes are in bytes.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from requant.tasks.checkpoint.config import Scalar
from requant.tasks.documents import Document


class EngineVerdict(Document):
    """Whether an engine will load a checkpoint and draft with its MTP head, from headers and configs alone.

    There are three answers: yes, no, and not judged, where Requant does not know.
    """

    loads: bool | None = Field(description="Whether the engine loads it; null: not judged")
    mtp: bool | None = Field(description="Whether the engine drafts with its MTP head; null: not judged")
    reason: str = Field(description="What is in the way, why it was not judged, or that nothing is in the way")
    version: str = Field(description="The engine's version whose rules were used, as 0.32.0")

    @property
    def rank(self) -> tuple[int, int]:
        """Order verdicts on one engine: no is worse than not judged, which is worse than yes; loading counts first."""
        ranks = {False: 0, None: 1, True: 2}
        return ranks[self.loads], ranks[self.mtp]

    def text(self, engine: str) -> str:
        """Return the verdict in words, with the engine's name and version."""
        loads = {True: "loads", False: "does not load", None: "loading not judged"}[self.loads]
        drafts = {True: "drafts", False: "does not draft", None: "drafting not judged"}[self.mtp]
        return f"{loads}, {drafts}: {self.reason} ({engine} {self.version})"


class QuantizedWeights(Document):
    """The quantized modules, and what the quantization config says. A value that it does not give is null."""

    count: int = Field(description="How many modules are quantized")
    bits: Scalar = Field(description="Bits of a weight; null if layers differ")
    group_size: Scalar = Field(description="Weights of a row that share one scale; -1: complete rows")
    sym: Scalar = Field(description="Whether the zero point is the middle of the range")
    method: Scalar = Field(description="The value of quant_method")
    name: str | None = Field(None, description="The method as people call it, as ModelOpt NVFP4; null without one")
    packing: Scalar = Field(description="The value of packing_format, as auto_round:auto_gptq")
    storage: dict[str, int] = Field(description="How many modules are stored in which way, as INT4 or F8_E4M3")


class ModuleGroup(Document):
    """Modules that are stored in one way, and whose names differ only in numbers."""

    modules: str = Field(description="Their name, with * for the numbers")
    count: int = Field(description="How many modules there are")
    storage: str = Field(description="How a weight is stored: INT4 and the like, packed, or a dtype as BF16")
    shape: list[int] = Field(description="Shape of the first module's largest stored tensor")
    bytes: int = Field(description="Bytes of all of them")


class HeadDocument(Document):
    """The MTP head."""

    present: bool = Field(description="Whether there is a head; without one, the other values are empty")
    layout: str | None = Field(
        None,
        description="mtp: its tensors are named mtp.* as those of Qwen; inlined: decoder layers behind the last one of "
        "the model as those of DeepSeek and GLM; unknown; or the layout of another family",
    )
    layers: int = Field(0, description="MTP layers that the config promises; if it promises none, those of the tensors")
    precision: str | None = Field(None, description="The ways in which its modules are stored, as BF16+INT4")
    experts: Literal["fused", "split"] | None = Field(
        None, description="Whether experts are stacked in 3-D tensors or stored one by one; null without experts"
    )
    complete: bool = Field(False, description="Whether no module is missing")
    missing: list[str] = Field([], description="Names of the missing modules")
    tensors: int = Field(0, description="How many tensors it has")
    bytes: int = Field(0, description="Bytes of its tensors")
    precisions: dict[str, int] = Field({}, description="How many of its modules are stored in which way")
    modules: dict[str, str] = Field({}, description="How each module is stored; empty for more than 200 modules")


class InspectDocument(Document):
    """What a checkpoint is, from headers and configs."""

    tensors: int = Field(description="How many tensors there are")
    bytes: int = Field(description="Bytes of all tensors")
    dtypes: dict[str, int] = Field(description="How many tensors have which dtype")
    quantized: QuantizedWeights = Field(description="The quantized modules")
    groups: list[ModuleGroup] = Field(description="All modules, in groups")
    complete: bool | None = Field(
        None, description="Whether it has all tensors that its architecture needs; null: the architecture is not known"
    )
    mtp: HeadDocument = Field(description="The MTP head")
    drafter: str | None = Field(
        None, description="The kind of draft model that the repo is, as EAGLE-3 or DFlash; null for a model itself"
    )
    tokenizer: bool | None = Field(
        None, description="Whether it has a tokenizer, by the names of its files, without which it is no base"
    )
    engines: dict[str, EngineVerdict] = Field(description="For vllm, sglang and transformers: will it load")
    problems: list[str] = Field(description="What is wrong, in sentences")


class Diagnosis(Document):
    """What `requant inspect` says of a checkpoint before or after its repair."""

    engines: dict[str, EngineVerdict] = Field(description="For vllm, sglang and transformers: will it load")
    problems: list[str] = Field(description="What is wrong, in sentences")


class MtpFixDocument(Document):
    """What a repair did, or would do with --dry-run or in a repo. What is about repos is null or empty for folders."""

    changed: bool = Field(description="Whether the folder was changed, or a pull request was opened")
    tensors_restored: int = Field(description="How many tensors of the MTP head were replaced")
    source: Literal["base", "dequantized"] = Field(
        description="Where restored tensors are from: the base, or without one the head's own quantized tensors"
    )
    writes: list[str] = Field(description="Paths of the files that were written, or would be")
    removes: list[str] = Field(description="Paths of the files that were removed, or would be")
    engines: dict[str, EngineVerdict] = Field(description="For vllm, sglang and transformers: will the result load")
    problems: list[str] = Field([], description="What remains wrong, in sentences")
    repo: str | None = Field(None, description="The repo on the Hub")
    sha: str | None = Field(None, description="The repo's commit that was inspected")
    base: str | None = Field(None, description="The base that was used in a repo: repo_id@sha, or a folder")
    before: Diagnosis | None = Field(None, description="The repo as it is")
    after: Diagnosis | None = Field(None, description="The repo with the repair")
    sizes: dict[str, int] = Field({}, description="Bytes to upload of each file that is written; 0: the Hub copies it")
    upload_bytes: int = Field(0, description="Bytes of all files to upload")
    download_bytes: int = Field(0, description="Bytes of tensors that have to be downloaded to write the files")
    pull_request: str | None = Field(None, description="Address of the pull request that has the repair")
