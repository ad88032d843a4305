"""Finds lost tensors where the architecture is not known, by what the checkpoint says of itself.

Layers are compared with each other, and a language model has an embedding, a last norm and, unless it is tied, an
output layer. This finds less than the comparison with an architecture, and must not be wrong about models that nobody
has seen: a layer that differs from the others by design is rather passed over.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from requant.tasks.checkpoint.blocks import TOWERS
from requant.tasks.checkpoint.completeness.names import Stored, kind_of
from requant.tasks.checkpoint.config import ModelConfig

LAYER = re.compile(r"((?:decoder\.)?(?:layers|h|blocks))\.(\d{1,5})\.(.+)")
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
MAX_EXPERTS = 100_000
LANGUAGE_MODEL = re.compile(r"\w+(ForCausalLM|ForConditionalGeneration|LMHeadModel)")
HEAD = re.compile(r"(^|\.)(mtp|nextn|eh_proj|enorm|hnorm|shared_head)")
EMBEDDING = re.compile(r"emb|wte|wpe", re.IGNORECASE)
LAST_NORM = re.compile(r"norm|ln_f|ln_out|final_ln", re.IGNORECASE)
NORM_OF_LAYER = re.compile(r"norm|(^|\.)ln", re.IGNORECASE)
OUTPUT = re.compile(r"(^|\.)(lm_head|head|output|output_layer|unembed|embed_out|score|ff_out)(\.|$)")
# Matrices that engines load into one: where the first is, the second is too.
PARTNERS = (
    (("mlp.", "experts.#."), "gate_proj.weight", "up_proj.weight"),
    (("self_attn.",), "v_proj.weight", "q_proj.weight"),
)


@dataclass
class Layer:
    """What a layer has: kinds of tensors, with `#` for numbers, and the numbers of its experts by kind."""

    kinds: set[str] = field(default_factory=set)
    experts: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))


def lost_tensors(stored: Stored, config: ModelConfig, head: Iterable[str] = ()) -> list[str]:
    """Return the names of tensors that a checkpoint must have by what else it has. `head`: those of its MTP head."""
    prefix, layers = _layers(stored, config)
    if not layers:
        return []
    normed = any(NORM_OF_LAYER.search(kind) for layer in layers.values() for kind in layer.kinds)
    return [
        *_lost_ends(stored, config, frozenset(head), normed=normed),
        *_lost_in_layers(stored, prefix, layers, config),
    ]


def _layers(stored: Stored, config: ModelConfig) -> tuple[str, dict[int, Layer]]:
    """Return the name of the layers, and what each of the promised ones has, without those that have nothing."""
    promised = config.text.integer("num_hidden_layers")
    layers: dict[str, dict[int, Layer]] = defaultdict(lambda: defaultdict(Layer))
    for name in stored.shapes:
        match = LAYER.fullmatch(name)
        if match and (promised is None or int(match[2]) < promised):
            layer = layers[match[1]][int(match[2])]
            stem, is_expert, rest = match[3].partition(".experts.")
            number, _, part = rest.partition(".")
            if is_expert and number.isdigit() and len(number) < 7:
                kind = f"{stem}.experts.#.{part}"
                layer.experts[kind].add(int(number))
                layer.kinds.add(kind)
            else:
                layer.kinds.add(kind_of(match[3]))
    if not layers:
        return "", {}
    prefix = max(layers, key=lambda name: len(layers[name]))
    return prefix, layers[prefix]


def _lost_in_layers(stored: Stored, prefix: str, layers: dict[int, Layer], config: ModelConfig) -> Iterator[str]:
    signatures = Counter(frozenset(layer.kinds) for layer in layers.values())
    stated = [config.text.integer(key) or 0 for key in EXPERT_COUNTS]
    seen = [max(numbers) + 1 for layer in layers.values() for numbers in layer.experts.values()]
    count = min(max([*seen, *stated]), MAX_EXPERTS)
    for number, layer in sorted(layers.items()):
        lost = _lacking(frozenset(layer.kinds), signatures) | _without_partner(layer.kinds)
        for kind in sorted(lost):
            name = f"{prefix}.{number}.{kind.replace('#', '0')}"
            yield stored.full_name(name, name)
        for kind, numbers in layer.experts.items():
            before, _, after = kind.partition("#")
            for expert in sorted(set(range(count)) - numbers):
                name = f"{prefix}.{number}.{before}{expert}{after}"
                yield stored.full_name(name, name)


def _lacking(kinds: frozenset[str], signatures: Counter[frozenset[str]]) -> set[str]:
    """Return what a layer lacks that its siblings have.

    A sibling has all that the layer has and at most as much again. Several layers that lack the same are a type of
    their own, as those that share the keys and values of another layer.
    """
    if signatures[kinds] > max(1, signatures.total() // 10):
        return set()
    lacks = [
        set(other - kinds)
        for other, count in signatures.items()
        if kinds < other and count >= signatures[kinds] and len(other) <= 2 * len(kinds)
    ]
    return min(lacks, key=lambda lack: len(lack), default=set())


def _without_partner(kinds: set[str]) -> set[str]:
    """Return matrices that are missing beside others of the same module."""
    missing = set[str]()
    for modules, there, needed in PARTNERS:
        stems = {kind.removesuffix(there) for kind in kinds if kind.endswith(there)}
        missing |= {stem + needed for stem in stems if stem.endswith(modules) and stem + needed not in kinds}
    return missing


def _lost_ends(stored: Stored, config: ModelConfig, head: frozenset[str], *, normed: bool) -> Iterator[str]:
    """Find a lost embedding, last norm or output layer of a language model.

    Nothing is said of the last norm if those of the layers have no weights either, nor of the output layer if anything
    may be it under another name.
    """
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and len(architectures) == 1 else None
    if not isinstance(name, str) or not LANGUAGE_MODEL.fullmatch(name):
        return
    ends = [
        short
        for short in stored.shapes
        if not LAYER.match(short) and short not in head and not HEAD.search(short) and not TOWERS.search(short)
    ]
    prefix = stored.leading.get("layers", "model.")
    vocabulary = config.text.integer("vocab_size")
    rows = {end: (stored.shapes[end] or (None,))[0] for end in ends}
    if not any(EMBEDDING.search(end) or (rows[end] == vocabulary and not OUTPUT.search(end)) for end in ends):
        yield f"{prefix}embed_tokens.weight"
    if normed and not any(LAST_NORM.search(end) for end in ends):
        yield f"{prefix}norm.weight"
    stated = [part.get("tie_word_embeddings") for part in (config, config.text)]
    if False in stated and True not in stated and all(EMBEDDING.search(end) or LAST_NORM.search(end) for end in ends):
        yield "lm_head.weight"
