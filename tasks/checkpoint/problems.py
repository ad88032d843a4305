"""Finds problems of a checkpoint from headers and configs alone. The sentences name the tensor or the field."""

from __future__ import annotations

import re
from collections.abc import Iterator

from requant.tasks.checkpoint.advice import FIX
from requant.tasks.checkpoint.checkpoint import QUANTIZATION, Checkpoint, Harmless
from requant.tasks.checkpoint.companions import companion_problems
from requant.tasks.checkpoint.compat import Judgement, missing_vision_files
from requant.tasks.checkpoint.completeness.sentences import lack_problems
from requant.tasks.checkpoint.header import CONFIG_DTYPES
from requant.tasks.checkpoint.heads.drafters import drafter_kind
from requant.tasks.checkpoint.heads.layouts import promised_layers
from requant.tasks.checkpoint.inventory import missing_parts
from requant.tasks.checkpoint.lost_parts import lost_parts
from requant.tasks.checkpoint.methods import MODELOPT_FILE, quantizes_cache_only
from requant.tasks.checkpoint.modules import Module
from requant.tasks.checkpoint.mtp import LAYER_NAME
from requant.tasks.checkpoint.packing import REQUIRED, check_parts
from requant.tasks.checkpoint.reading import Contradiction
from requant.tasks.checkpoint.remedies import Remedies
from requant.tasks.checkpoint.untrusted import shown
from requant.tasks.errors import CheckpointError

FLOATING = {"BF16", "F16", "F32", "F64"}
OTHER_TOWERS = re.compile(r"visual|vision|audio|image|projector")
# Routers of experts, and of the indexer that DeepSeek V3.2 chooses tokens with.
ROUTER_NAME = re.compile(
    r"(gate|router|score|bias|weights_proj)"
)  # stored in a wider dtype than other weights, by design
COMPRESSED_REQUIRED = {
    "I32": ("weight_scale", "weight_shape")
}  # by the dtype of weight_packed; FP4 has no weight_shape


def problems_of(checkpoint: Checkpoint, judgement: Judgement, *, with_head: bool = True) -> list[str]:
    """Return all problems, those of index and headers first.

    `judgement`: the engines' judgement of the checkpoint. Without `with_head`, nothing is said of the MTP head as a
    whole: it will be dropped. Where a shard cannot be read, nothing is said of tensors: what seems to be missing may be
    in it.
    """
    remedies = Remedies(checkpoint, judgement)
    of_files = [
        *map(remedies.checked, checkpoint.problems),
        *companion_problems(checkpoint.folder),
        *(f"{name} is missing: copy it from the base" for name in missing_vision_files(checkpoint)),
    ]
    if checkpoint.has_unread:
        return of_files
    found = [
        *of_files,
        *_configs(checkpoint, remedies),
        *_parts(checkpoint),
        *lost_parts(checkpoint.modules.values()),
        *_contradictions(checkpoint),
        *_dtypes(checkpoint),
        *([] if drafter_kind(checkpoint.config) else _of_a_base(checkpoint)),
        *(_head(checkpoint, judgement, remedies) if with_head and not drafter_kind(checkpoint.config) else ()),
        *(f"an engine would hang on the pattern {shown(p)!r} of quantization_config" for p in judgement.hostile),
    ]
    refused = judgement.load_problem
    return found if refused is None or judgement.loading["vllm"] in found else [*found, refused]


def _of_a_base(checkpoint: Checkpoint) -> list[str]:
    """Return what contradicts the sizes and counts of the config, which say other things for a draft model."""
    completeness = checkpoint.completeness
    lacks = () if checkpoint.fatal else lack_problems(checkpoint, completeness)
    return [*_shapes(checkpoint, of_known=completeness.architecture is not None), *_layers(checkpoint), *lacks]


def _configs(checkpoint: Checkpoint, remedies: Remedies) -> Iterator[str]:
    stated = checkpoint.config.quantization or None
    beside = checkpoint.document(QUANTIZATION)
    if beside is not None and stated is not None and beside != stated:
        yield remedies.checked(f"{QUANTIZATION} and config.json disagree about the quantization: {FIX}")
    elif (other := checkpoint.quantization_file) not in (None, MODELOPT_FILE):
        method = checkpoint.quantization.get("quant_method")
        yield (
            f"{other} is there, and config.json has no quantization_config, which engines read: put it there too, with "
            f"quant_method {shown(repr(method))}"
        )
    quantized = any(module.quantized for module in checkpoint.modules.values())
    known = checkpoint.method is None or checkpoint.method.readable  # the tensors of other methods may be overlooked
    if (
        checkpoint.quantization
        and known
        and not quantizes_cache_only(checkpoint.quantization)
        and not quantized
        and checkpoint.tensors
    ):
        remedy = "remove it, or restore" if remedies.loads_unquantized() else "restore"
        yield f"quantization_config is there, and no tensor is quantized: {remedy} the quantized shards"
    if quantized and not checkpoint.quantization and checkpoint.method is None:
        yield "tensors are quantized, and config.json has no quantization_config: restore it"


def _parts(checkpoint: Checkpoint) -> Iterator[str]:
    """Find quantized modules with missing or contradictory parts, and weights that are stored twice."""
    for module in checkpoint.modules.values():
        if module.storage == "integer":
            yield from _integer_parts(checkpoint, module)
        elif module.storage == "compressed":
            required = COMPRESSED_REQUIRED.get(module.parts["weight_packed"].dtype, ("weight_scale",))
            lacking = [part for part in required if part not in module.parts]
            if lacking:
                yield f"{module.name}.{lacking[0]} is missing beside {module.name}.weight_packed"
        elif module.storage == "scaled" and not any("scale" in part for part in module.parts):
            yield f"{module.name}.weight is {module.parts['weight'].dtype} and has no scale beside it"
        if module.storage in {"integer", "compressed"} and "weight" in module.parts:
            yield f"{module.name} is there twice, packed and as {module.name}.weight, and engines expect one of them"


def _integer_parts(checkpoint: Checkpoint, module: Module) -> Iterator[str]:
    missing = [part for part in REQUIRED if part not in module.parts]
    if missing:
        there = next(iter(module.packed_parts))
        yield f"{module.name}.{missing[0]} is missing beside {module.name}.{there}"
        return
    try:
        scheme = checkpoint.reading.scheme(module)
    except CheckpointError:
        return  # of a method that is not judged, or of a config that `_contradictions` tells of
    wrong = check_parts(module.name, module.packed_parts, scheme, scheme.weight_shape(module.parts))
    if wrong:
        yield wrong


def _contradictions(checkpoint: Checkpoint) -> Iterator[str]:
    """Find packed modules of the main model of which the config says something else; one sentence for all alike."""
    alike: dict[tuple[str, str], list[Contradiction]] = {}
    for module in checkpoint.modules.values():
        found = checkpoint.reading.contradiction(module) if module.name not in checkpoint.head_modules else None
        if found is not None:
            alike.setdefault((found.tensors, found.config.replace(found.module, "")), []).append(found)
    for first, *others in alike.values():
        yield f"{first} (and so for {len(others)} more modules)" if others else str(first)


def _shapes(checkpoint: Checkpoint, *, of_known: bool) -> Iterator[str]:
    """Find matrices of the language model whose shapes contradict the sizes in the config, as most models have them.

    Of a known architecture, whose own formulas have been compared, only the MTP head is looked at. Of any other one,
    only what has the prefix of the embeddings is: a tower has sizes of its own.
    """
    text = checkpoint.text_config
    hidden, vocab = text.integer("hidden_size"), text.integer("vocab_size")
    if hidden is None:
        return
    from_hidden, to_hidden = (None, hidden), (hidden, None)
    vocabulary = (vocab, hidden)
    expected: dict[str, tuple[int | None, ...]] = dict.fromkeys(("mtp.fc", "eh_proj"), (hidden, 2 * hidden))
    usual: dict[str, tuple[int | None, ...]] = {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), from_hidden),
        **dict.fromkeys(("o_proj", "down_proj"), to_hidden),
        **dict.fromkeys(("embed_tokens", "lm_head"), vocabulary),
        **dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (hidden,)),
    }
    names = (name for name in checkpoint.modules if f".{name}".endswith(".embed_tokens"))
    roots = [name.removesuffix("embed_tokens") for name in names if not OTHER_TOWERS.search(name) and not of_known]
    for module in checkpoint.modules.values():
        usual_here = roots and (module.name.startswith(roots[0]) or module.name.endswith("lm_head"))
        looked_at = {**expected, **usual} if usual_here else expected
        sides = next((s for name, s in looked_at.items() if f".{module.name}".endswith(f".{name}")), None)
        if sides is None or OTHER_TOWERS.search(module.name):
            continue
        shape = _weight_shape(checkpoint, module)
        if len(shape) == 3:  # experts, fused
            continue
        if shape and (len(shape) != len(sides) or any(s not in (None, n) for s, n in zip(sides, shape, strict=True))):
            wanted = " x ".join("any" if side is None else str(side) for side in sides)
            yield f"{module.name} has shape {' x '.join(map(str, shape))}, and the sizes of config.json need {wanted}"


def _weight_shape(checkpoint: Checkpoint, module: Module) -> tuple[int, ...]:
    if module.storage == "plain" and "weight" in module.parts:
        return module.parts["weight"].shape
    if module.storage == "integer" and all(part in module.parts for part in REQUIRED):
        try:
            return checkpoint.reading.scheme(module).weight_shape(module.parts)
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
    in_head = set(checkpoint.head.names) if checkpoint.head else set()
    other: dict[str, list[str]] = {}
    for module in checkpoint.modules.values():
        weight = module.parts.get("weight")
        last = module.name.rpartition(".")[2]
        if module.storage != "plain" or weight is None or len(weight.shape) < 2 or ROUTER_NAME.search(last):
            continue
        if weight.name in in_head:  # it has the base's dtype, and engines convert it
            continue
        if weight.dtype in FLOATING and weight.dtype != declared:
            other.setdefault(weight.dtype, []).append(weight.name)
    for dtype, names in other.items():
        more = f" and {len(names) - 1} more matrices are" if len(names) > 1 else " is"
        yield Harmless(f"{names[0]}{more} {dtype}, and config.json says {word}, to which engines convert them")


def _layers(checkpoint: Checkpoint) -> Iterator[str]:
    promised = checkpoint.text_config.integer("num_hidden_layers")
    numbers = {int(m[1]) for name in checkpoint.modules if (m := LAYER_NAME.match(name)) and len(m[1]) < 9}
    if promised is not None and numbers and not checkpoint.fatal:
        lost = sorted(set(range(min(promised, 100_000))) - numbers)
        if lost:
            yield f"config.json promises {promised} layers, and layer {lost[0]} has no tensors: restore its shard"


def _head(checkpoint: Checkpoint, judgement: Judgement, remedies: Remedies) -> Iterator[str]:
    promised, head = promised_layers(checkpoint.config), checkpoint.head
    problem: str | None
    if head is None:
        problem = (
            f"config.json promises {promised} MTP layers, and there are no tensors of a head" if promised else None
        )
    elif missing := missing_parts(checkpoint, head):
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        problem = f"the MTP head lacks {missing[0]}{more}"
    else:
        problem = judgement.head_problem
    if problem is not None:
        remedy = remedies.of_head()
        yield f"{problem}: {remedy}" if remedy else problem
