"""Finds problems of a checkpoint from headers and configs alone. The sentences name the tensor or the field."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator

from requant.tasks.checkpoint.checkpoint import QUANTIZATION, Checkpoint, read_json
from requant.tasks.checkpoint.compat import Judgement, missing_vision_files
from requant.tasks.checkpoint.completeness import Completeness
from requant.tasks.checkpoint.completeness.sentences import lack_problems
from requant.tasks.checkpoint.header import CONFIG_DTYPES
from requant.tasks.checkpoint.inventory import missing_parts
from requant.tasks.checkpoint.modules import Module
from requant.tasks.checkpoint.mtp import LAYER_NAME
from requant.tasks.checkpoint.packing import REQUIRED, PackingScheme, check_parts
from requant.tasks.checkpoint.untrusted import shown
from requant.tasks.errors import CheckpointError

FLOATING = {"BF16", "F16", "F32", "F64"}
OTHER_TOWERS = re.compile(r"visual|vision|audio|image|projector")
ROUTER_NAME = re.compile(r"(gate|router|score|bias)")  # stored in a wider dtype than other weights, by design
COMPRESSED_REQUIRED = ("weight_scale", "weight_shape")


def problems_of(checkpoint: Checkpoint, judgement: Judgement, completeness: Completeness | None = None) -> list[str]:
    """Return all problems, those of index and headers first.

    `judgement`: the engines' judgement of the checkpoint. `completeness`: what it lacks, if that is known already.
    """
    completeness = completeness or Completeness.of(checkpoint)
    return [
        *checkpoint.problems,
        *_configs(checkpoint),
        *(f"{name} is missing: copy it from the base" for name in missing_vision_files(checkpoint)),
        *_parts(checkpoint),
        *_shapes(checkpoint, {lack.name for lack in completeness.lacks}),
        *_dtypes(checkpoint),
        *_layers(checkpoint),
        *([] if checkpoint.fatal else lack_problems(checkpoint, completeness)),
        *_head(checkpoint, judgement),
        *(f"an engine would hang on the pattern {shown(p)!r} of quantization_config" for p in judgement.hostile),
    ]


def _configs(checkpoint: Checkpoint) -> Iterator[str]:
    stated = checkpoint.config.get("quantization_config")
    file = checkpoint.folder / QUANTIZATION
    if file.is_file() and stated is not None and read_json(file) != stated:
        yield f"{QUANTIZATION} and config.json disagree about the quantization: run requant mtp-fix, or copy one"
    elif file.is_file() and stated is None:
        yield f"{QUANTIZATION} is there, and config.json has no quantization_config: put it there too"
    quantized = any(module.quantized for module in checkpoint.modules.values())
    if checkpoint.quantization and not quantized and checkpoint.tensors:
        yield "quantization_config is there, and no tensor is quantized: remove it, or restore the quantized shards"
    if quantized and not checkpoint.quantization:
        yield "tensors are quantized, and config.json has no quantization_config: restore it"


def _parts(checkpoint: Checkpoint) -> Iterator[str]:
    """Find quantized modules with missing or contradictory parts, and weights that are stored twice."""
    for module in checkpoint.modules.values():
        if module.storage == "integer":
            yield from _integer_parts(checkpoint, module)
        elif module.storage == "compressed":
            lacking = [p for p in COMPRESSED_REQUIRED if p not in module.parts]
            if lacking:
                yield f"{module.name}.{lacking[0]} is missing beside {module.name}.weight_packed"
        elif module.storage == "scaled" and not any(part.startswith("weight_scale") for part in module.parts):
            yield f"{module.name}.weight is {module.parts['weight'].dtype} and has no scale beside it"
        if module.storage in {"integer", "compressed"} and "weight" in module.parts:
            yield f"{module.name} is there twice, packed and as {module.name}.weight: remove one"


def _integer_parts(checkpoint: Checkpoint, module: Module) -> Iterator[str]:
    missing = [part for part in REQUIRED if part not in module.parts]
    if missing:
        there = next(iter(module.packed_parts))
        yield f"{module.name}.{missing[0]} is missing beside {module.name}.{there}"
        return
    try:
        scheme = PackingScheme.of(checkpoint.quantization, module.name)
        wrong = check_parts(module.name, module.packed_parts, scheme, scheme.weight_shape(module.parts))
    except CheckpointError as error:
        wrong = str(error)
    if wrong:
        yield wrong


def _shapes(checkpoint: Checkpoint, named: Container[str]) -> Iterator[str]:
    """Find matrices of the language model whose shapes contradict the sizes in the config, without those `named`."""
    text = checkpoint.text_config
    hidden, vocab = text.integer("hidden_size"), text.integer("vocab_size")
    if hidden is None:
        return
    from_hidden, to_hidden = (None, hidden), (hidden, None)
    vocabulary = (vocab, hidden)
    expected: dict[str, tuple[int | None, ...]] = {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), from_hidden),
        **dict.fromkeys(("o_proj", "down_proj"), to_hidden),
        **dict.fromkeys(("embed_tokens", "lm_head"), vocabulary),
        **dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (hidden,)),
        **dict.fromkeys(("mtp.fc", "eh_proj"), (hidden, 2 * hidden)),
    }
    for module in checkpoint.modules.values():
        sides = next((s for name, s in expected.items() if f".{module.name}".endswith(f".{name}")), None)
        if sides is None or OTHER_TOWERS.search(module.name) or f"{module.name}.weight" in named:
            continue
        shape = _weight_shape(checkpoint, module)
        if shape and (len(shape) != len(sides) or any(s not in (None, n) for s, n in zip(sides, shape, strict=True))):
            wanted = " x ".join("any" if side is None else str(side) for side in sides)
            yield f"{module.name} has shape {' x '.join(map(str, shape))}, and the sizes of config.json need {wanted}"


def _weight_shape(checkpoint: Checkpoint, module: Module) -> tuple[int, ...]:
    if module.storage == "plain" and "weight" in module.parts:
        return module.parts["weight"].shape
    if module.storage == "integer" and all(part in module.parts for part in REQUIRED):
        try:
            return PackingScheme.of(checkpoint.quantization, module.name).weight_shape(module.parts)
        except CheckpointError:
            return ()
    return ()


def _dtypes(checkpoint: Checkpoint) -> Iterator[str]:
    """Find matrices whose dtype was changed, as auto-round does on a CPU, so that they are not the base's any more."""
    word = checkpoint.text_config.get("dtype") or checkpoint.text_config.get("torch_dtype")
    word = word or checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    declared = CONFIG_DTYPES.get(word) if isinstance(word, str) else None
    if declared is None:
        return
    other: dict[str, list[str]] = {}
    for module in checkpoint.modules.values():
        weight = module.parts.get("weight")
        last = module.name.rpartition(".")[2]
        if module.storage != "plain" or weight is None or len(weight.shape) < 2 or ROUTER_NAME.search(last):
            continue
        if weight.dtype in FLOATING and weight.dtype != declared:
            other.setdefault(weight.dtype, []).append(weight.name)
    for dtype, names in other.items():
        more = f" and {len(names) - 1} more matrices are" if len(names) > 1 else " is"
        yield f"{names[0]}{more} {dtype}, and config.json says {word}: take them from the base, or change dtype"


def _layers(checkpoint: Checkpoint) -> Iterator[str]:
    promised = checkpoint.text_config.integer("num_hidden_layers")
    numbers = {int(m[1]) for name in checkpoint.modules if (m := LAYER_NAME.match(name)) and len(m[1]) < 9}
    if promised is not None and numbers and not checkpoint.fatal:
        lost = sorted(set(range(min(promised, 100_000))) - numbers)
        if lost:
            yield f"config.json promises {promised} layers, and layer {lost[0]} has no tensors: restore its shard"


def _head(checkpoint: Checkpoint, judgement: Judgement) -> Iterator[str]:
    promised, head = checkpoint.config.mtp_layers, checkpoint.head
    if head is None:
        if promised > 0:
            yield (
                f"config.json promises {promised} MTP layers, and there are no tensors of a head: "
                "restore it with requant mtp-fix --base"
            )
        return
    missing = missing_parts(checkpoint, head)
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        yield f"the MTP head lacks {missing[0]}{more}: restore it with requant mtp-fix --base"
    elif judgement.draft_problem is not None:
        yield judgement.draft_problem
