"""Plan the resulting checkpoint to the byte, from the base's headers, with the code that later writes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from requant.tasks.checkpoint.assemble import lay_out_shards
from requant.tasks.checkpoint.blocks import block_of
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.compat import Judgement
from requant.tasks.checkpoint.config import QuantizationConfig
from requant.tasks.checkpoint.document import ModuleGroup
from requant.tasks.checkpoint.exclusions import without_head_entries
from requant.tasks.checkpoint.experts import split_fused_experts
from requant.tasks.checkpoint.fp8 import dequantize_fp8
from requant.tasks.checkpoint.head import HEAD_SHARD, HeadFiles, with_head, without_head
from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.inventory import inventory
from requant.tasks.checkpoint.reading import Reading
from requant.tasks.checkpoint.writer import Computed, Layout
from requant.tasks.errors import CheckpointError
from requant.tasks.planning.document import (
    KeptTensors,
    OutputLayout,
    QuantizationScheme,
)
from requant.tasks.planning.groups import uneven_problems
from requant.tasks.planning.layers import LayerSelection, choose_layers
from requant.tasks.planning.reasons import MTP_HEAD, kept_groups
from requant.tasks.recipe.recipe import Recipe

PACKED = {"qweight": "I32", "qzeros": "I32", "scales": "F16"}
Parts = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class CheckpointPlan:
    """The checkpoint that quantize and mtp_fix will write.

    `base` is `source` in the form that is quantized: FP8 weights as BF16, and fused experts split. `before_head` has
    the bytes of the files that quantize writes, `sizes` those of all files, each by path.
    """

    source: Checkpoint
    base: Checkpoint
    choice: LayerSelection
    checkpoint: Checkpoint
    before_head: dict[str, int]
    sizes: dict[str, int]
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def weights(self) -> dict[str, int]:
        """Bytes of each shard."""
        return {path: size for path, size in self.sizes.items() if path.endswith(".safetensors")}

    @property
    def kept_names(self) -> list[str]:
        """The names of the tensors that stay as they are in the base."""
        return [name for name in self.checkpoint.tensors if name in self.base.tensors]

    @property
    def quantized_parameters(self) -> int:
        """How many weights are tuned and quantized, without the MTP head's."""
        return sum(self.block_parameters.values())

    @property
    def block_parameters(self) -> dict[str, int]:
        """How many weights are quantized, by decoder block."""
        sizes: dict[str, int] = {}
        for module in self.choice.quantized:
            rows, columns = self.base.tensors[f"{module}.weight"].shape
            block = block_of(module) or ""
            sizes[block] = sizes.get(block, 0) + rows * columns
        return sizes

    @property
    def head_bytes(self) -> int:
        """Bytes of the shard with the MTP head; 0 if the result has none."""
        return self.sizes.get(HEAD_SHARD, 0)

    @cached_property
    def judgement(self) -> Judgement:
        """Whether each engine will load the result, and draft with its MTP head."""
        return Judgement.of(self.checkpoint)

    def kept(self) -> tuple[KeptTensors, ...]:
        """List the tensors that are not quantized, with the groups and reasons of the model card."""
        head = self.source.head.names if self.source.head else ()
        reasons = self.choice.why | {name.removesuffix(".weight"): MTP_HEAD for name in head}
        return tuple(
            KeptTensors(tensors=group.strip("`"), count=int(count), why=why)
            for group, count, why in kept_groups(self.kept_names, reasons)
        )

    def quantized(self) -> tuple[ModuleGroup, ...]:
        """List the quantized modules in groups."""
        return tuple(group for group in inventory(self.checkpoint) if group.storage.startswith("INT"))

    def layout(self, recipe: Recipe) -> OutputLayout:
        """Describe the result for the plan's document."""
        bits, group_size, sym = recipe.quantize.resolved
        return OutputLayout(
            bytes=sum(self.sizes.values()),
            weights_bytes=sum(self.weights.values()),
            quantized_tensors=len(self.choice.quantized),
            kept_tensors=len(self.kept_names),
            scheme=QuantizationScheme(bits=bits, group_size=group_size, sym=sym),
            packing=self.choice.quantization["packing_format"],
            shards=self.weights,
            files=self.sizes,
            quantized=self.quantized(),
            kept=self.kept(),
        )


def plan_output(source: Checkpoint, recipe: Recipe, other_files: Mapping[str, int]) -> CheckpointPlan:
    """Lay out what a recipe makes of a base.

    `other_files` has the bytes of the base's files that are copied, by path. What cannot be quantized as the recipe
    says is in `problems`. Raises CheckpointError if nothing can be laid out, because FP8 weights have no scales or the
    MTP head is incomplete.
    """
    base = dequantize_fp8(split_fused_experts(source))
    choice = choose_layers(base, recipe.quantize)
    quantization = without_head_entries(choice.quantization, base.head)
    parts, problems = _packed_parts(base, choice, quantization)
    made = lay_out_shards(base, parts, quantization)
    files = HeadFiles.of(made.documents)
    if recipe.mtp == "drop" or base.head is None:
        joined = Layout({}, without_head(files, base.head).documents)
    else:
        joined = with_head(files, source, recipe.mtp)
    sizes = {**other_files, **made.sizes, **joined.sizes}
    shards = {**made.shards, **joined.shards}
    tensors = {tensor.name: tensor for shard in shards.values() for tensor in shard}
    written = HeadFiles.of(joined.documents)
    total = written.index["metadata"]["total_size"]
    result = Checkpoint(source.folder, written.config, tensors, tuple(shards), total)
    return CheckpointPlan(source, base, choice, result, made.sizes, sizes, [*choice.problems, *problems], choice.notes)


def _packed_parts(
    base: Checkpoint, choice: LayerSelection, quantization: QuantizationConfig
) -> tuple[Parts, list[str]]:
    """Lay out the packed tensors of each quantized module. Return them by module, and problems with their schemes."""
    parts: Parts = {}
    group_sizes: dict[str, int] = {}
    reading = Reading.of(base.config, quantization)
    for module in choice.quantized:
        out_features, in_features = base.tensors[f"{module}.weight"].shape
        try:
            scheme = reading.planned(module)
        except CheckpointError as error:
            return {}, [f"{error}: change quantize.layers"]
        group_sizes[module] = scheme.group_size
        shapes = scheme.shapes(out_features, in_features)
        parts[module] = {p: Computed.of(f"{module}.{p}", dtype, shapes[p], tuple) for p, dtype in PACKED.items()}
    problems = uneven_problems(base, choice, group_sizes)
    if not parts:
        problems.append(
            "no layer would be quantized: the base has no decoder blocks with linear layers, or all are kept"
        )
    return parts, problems
