"""The checkpoint that comes out, to the byte: laid out by the code that writes it, from the base's headers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from requant.tasks.checkpoint.assemble import lay_out_shards
from requant.tasks.checkpoint.blocks import block_of
from requant.tasks.checkpoint.checkpoint import INDEX, Checkpoint
from requant.tasks.checkpoint.compat import verdicts
from requant.tasks.checkpoint.experts import split_fused_experts
from requant.tasks.checkpoint.fp8 import dequantize_fp8
from requant.tasks.checkpoint.head import HEAD_SHARD, HeadFiles, with_head, without_head
from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.inventory import inventory
from requant.tasks.checkpoint.mtp import without_head_entries
from requant.tasks.checkpoint.packing import PackingScheme
from requant.tasks.checkpoint.writer import Computed, Layout
from requant.tasks.errors import CheckpointError
from requant.tasks.planning.document import (
    EngineVerdict,
    KeptTensors,
    OutputLayout,
    QuantizationScheme,
    QuantizedModules,
)
from requant.tasks.planning.groups import uneven_problems
from requant.tasks.planning.layers import LayerSelection, choose_layers
from requant.tasks.planning.reasons import kept_groups
from requant.tasks.recipe.recipe import Recipe

PACKED = {"qweight": "I32", "qzeros": "I32", "scales": "F16"}
Parts = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class PlannedOutput:
    """What quantize and mtp_fix will write. `before_head` are the bytes of quantize's files, `sizes` of all. `base` is
    `source` as it is quantized: FP8 weights as the BF16 ones that they stand for, fused experts one by one."""

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
        """Tensors that are the base's, as it has them."""
        return [name for name in self.checkpoint.tensors if name in self.base.tensors]

    @property
    def packed_parameters(self) -> int:
        """Weights that are tuned and packed, the head's aside."""
        shapes = (self.base.tensors[f"{module}.weight"].shape for module in self.choice.packed)
        return sum(rows * columns for rows, columns in shapes)

    def engines(self) -> dict[str, EngineVerdict]:
        """Judge whether each engine will load the result, and draft."""
        return {engine: EngineVerdict(**verdict) for engine, verdict in verdicts(self.checkpoint).items()}

    def kept(self) -> tuple[KeptTensors, ...]:
        """List the tensors that are not packed, in the card's groups, with the card's reasons or auto-round's own."""
        return tuple(
            KeptTensors(tensors=group.strip("`"), count=int(count), why=why)
            for group, count, why in kept_groups(self.kept_names, self.choice.why)
        )

    def packed(self) -> tuple[QuantizedModules, ...]:
        """List the packed modules in groups: how many, how wide, bytes."""
        groups = (group for group in inventory(self.checkpoint) if group.storage.startswith("INT"))
        return tuple(QuantizedModules(**group.to_json()) for group in groups)

    def layout(self, recipe: Recipe) -> OutputLayout:
        """Describe the result for the plan's document."""
        bits, group_size, sym = recipe.quantize.resolved
        return OutputLayout(
            bytes=sum(self.sizes.values()),
            weights_bytes=sum(self.weights.values()),
            quantized_tensors=len(self.choice.packed),
            kept_tensors=len(self.kept_names),
            scheme=QuantizationScheme(bits=bits, group_size=group_size, sym=sym),
            packing=self.choice.quantization["packing_format"],
            shards=self.weights,
            files=self.sizes,
            quantized=self.packed(),
            kept=self.kept(),
        )


def plan_output(source: Checkpoint, recipe: Recipe, other_files: Mapping[str, int]) -> PlannedOutput:
    """Lay out what a recipe makes of a base. `other_files`: bytes of the base's files that join verbatim.

    What cannot be packed as asked is in `problems`. Raises CheckpointError where nothing can be laid out: FP8 without
    its scales, a head that is not whole.
    """
    base = dequantize_fp8(split_fused_experts(source))
    choice = choose_layers(base, recipe.quantize)
    quantization = without_head_entries(choice.quantization, base.head)
    parts, problems = _packed_parts(base, choice, quantization)
    made = lay_out_shards(base, parts, quantization)
    files = HeadFiles(made.documents["config.json"], made.documents[INDEX])
    if recipe.mtp == "drop" or base.head is None:
        joined = Layout({}, without_head(files, base.head).documents)
    else:
        joined = with_head(files, source, recipe.mtp)
    sizes = {**other_files, **made.sizes, **joined.sizes}
    shards = {**made.shards, **joined.shards}
    tensors = {tensor.name: tensor for shard in shards.values() for tensor in shard}
    total = joined.documents[INDEX]["metadata"]["total_size"]
    result = Checkpoint(source.folder, joined.documents["config.json"], tensors, tuple(shards), total)
    return PlannedOutput(source, base, choice, result, made.sizes, sizes, [*choice.problems, *problems], choice.notes)


def head_bytes(output: PlannedOutput) -> int:
    """Bytes of the shard that holds the head."""
    return output.sizes.get(HEAD_SHARD, 0)


def _packed_parts(base: Checkpoint, choice: LayerSelection, quantization: Mapping[str, Any]) -> tuple[Parts, list[str]]:
    """The packed parts of each chosen module, and what is wrong with its scheme."""
    parts: Parts = {}
    group_sizes: dict[str, int] = {}
    for module in choice.packed:
        out_features, in_features = base.tensors[f"{module}.weight"].shape
        try:
            scheme = PackingScheme.of(quantization, module)
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


def layers_by_block(output: PlannedOutput) -> dict[str, int]:
    """Packed weights by decoder block."""
    sizes: dict[str, int] = {}
    for module in output.choice.packed:
        rows, columns = output.base.tensors[f"{module}.weight"].shape
        block = block_of(module) or ""
        sizes[block] = sizes.get(block, 0) + rows * columns
    return sizes
