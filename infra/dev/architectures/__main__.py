"""Write what Requant knows of architectures: `python -m infra.dev.architectures [CLASS ...]`.

All causal and image-text models of transformers are built small, on the meta device and once for each key of their
config, and described by how names and shapes change. A description that does not tell all of its own probes to be
complete is not written.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from infra.dev.architectures.describing import Description
from infra.dev.architectures.formulas import fit
from infra.dev.architectures.probing import Builder, Probe, leaves
from requant.tasks.checkpoint.completeness.conditions import Values
from requant.tasks.checkpoint.completeness.names import Stored
from requant.tasks.checkpoint.completeness.needed import Comparison
from requant.tasks.checkpoint.completeness.needs import COUNT, ESSENTIAL, FOLDER, Needs
from requant.tasks.checkpoint.config import JsonObject

MANY_ITEMS = re.compile(r"\.([4-9]|\d\d+)\.")  # numbers in names; a small network in a row has fewer
CONDITION_WORDS = re.compile(r"^not |^i (<|>=) |\[i\] == .*")
OUTPUT_NAMES = ("lm_head.weight", "language_model.lm_head.weight", "embed_out.weight", "output.weight")
# Classes whose descriptions are wrong for models of other sizes than those that are built here.
NOT_DESCRIBED = {
    "MistralLarge4ForConditionalGeneration": "a head_dim that differs from qk_rope_head_dim changes lerope.alpha",
    "RecurrentGemmaForCausalLM": "the number of heads of keys and values is a constant in its formulas",
    "UnlimitedOcrForConditionalGeneration": "its formulas ignore the width of a head",
}
SOURCE = f"transformers {transformers.__version__}"


def classes() -> dict[str, list[str]]:
    """Return the classes of language models with the model types that they are made for."""
    found: dict[str, list[str]] = {}
    tables = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    )
    for table in tables:
        for model_type, names in table.items():
            for name in [names] if isinstance(names, str) else names:
                types = found.setdefault(name, [])
                types += [model_type] if model_type not in types else []
    return found


def describe(name: str, model_types: list[str]) -> Needs:
    """Describe a class. Raises ValueError if its models cannot be built or described."""
    if name in NOT_DESCRIBED:
        raise ValueError(NOT_DESCRIBED[name])
    model_class: type[PreTrainedModel] = getattr(transformers, name)
    config_class = model_class.config_class
    own = [t for t in model_types if t in CONFIG_MAPPING and CONFIG_MAPPING[t] is config_class]
    if not own or config_class is None:
        raise ValueError("no model type has its config")
    if config_class.is_encoder_decoder or getattr(config_class, "is_decoder", True) is False:
        raise ValueError("it is no decoder")
    builder = Builder.of(config_class, model_class)
    probes = list(builder.probes())
    document = Description(probes).document()
    if any(MANY_ITEMS.search(name) for group in document["groups"] for name in group["tensors"]):
        raise ValueError("it counts items by more than one key can say")
    layers = _decoder_layers(document)
    text = layers.partition("{")[2].partition("}")[0].rpartition(".")[0]
    stated = {f"{text}.{key}" if text else key for key in ESSENTIAL}
    used = _used(document) | {key for key in stated if key in probes[0].values}
    needs = Needs(
        architecture=name,
        source=SOURCE,
        model_types=own,
        parts=_parts(config_class, probes[0].document),
        layers=layers,
        output=_output(probes),
        tied=builder.ties_by_default(),
        keys={path: _default(builder, probes[0], path) for path in sorted(used)},
        aliases=_aliases(config_class, used),
        **document,
    )
    _check(needs, probes)
    return needs


def _parts(config_class: type[PreTrainedConfig], document: Mapping[str, Any]) -> dict[str, str]:
    """Return the model types of the parts of a config that may be any model, as far as the config has them."""
    anything = [part for part, part_class in config_class.sub_configs.items() if part_class is AutoConfig]
    types = {part: (document.get(part) or {}).get("model_type") for part in sorted(anything)}
    return {part: model_type for part, model_type in types.items() if model_type}


def _decoder_layers(document: dict[str, Any]) -> str:
    """Return the layers of the language model: those with the most kinds of tensors that no tower has."""
    sizes: dict[str, int] = {}
    for group in document["groups"]:
        if group["layers"] and not any(word in group["layers"] for word in ("vision", "visual", "audio", "image")):
            sizes[group["layers"]] = sizes.get(group["layers"], 0) + len(group["tensors"])
    if not sizes:
        raise ValueError("no layers are found whose number a key gives")
    return max(sizes, key=lambda layers: sizes[layers])


def _output(probes: list[Probe]) -> str | None:
    """Return the name of the output layer's weight."""
    names = {name for probe in probes for name in probe.shapes}
    return next((name for name in OUTPUT_NAMES if name in names), None)


def _used(document: dict[str, Any]) -> set[str]:
    """Return the paths of all keys in formulas and conditions."""
    words: set[str] = set()
    for group in document["groups"]:
        formulas = [f for shape in group["tensors"].values() for f in shape or () if f]
        for name in (group["layers"], *group["tensors"]):
            formulas += COUNT.findall(name)
        for condition in group["when"] or ():
            formulas.append(CONDITION_WORDS.sub("", condition))
        for formula in formulas:
            words |= set(Values.words(formula))
    return words


def _default(builder: Builder, first: Probe, path: str) -> bool | int | str | None:
    """Return what transformers takes for a key that a config leaves out: a constant, or a formula of other keys."""
    examples = []
    sizes = {key: value for key, value in leaves(builder.base) if type(value) is int and value and key != path}
    for changed in ({}, *({key: 2 * value} for key, value in sizes.items())):
        try:
            config = builder.config(changed, without=path)
        except Exception:  # classes of configs raise errors of all kinds for what they do not take
            continue
        values = dict(leaves(config.to_dict()))
        examples.append((changed, values, values.get(path)))
    if not examples:
        return None
    usual = examples[0][2]
    if usual is None and path.endswith("head_dim"):
        parent = path.removesuffix("head_dim")
        return f"{parent}hidden_size/{parent}num_attention_heads"
    if not isinstance(usual, bool | int):
        return None
    keys = sorted({key for changed, _, value in examples for key in changed if value != usual})
    if not keys:
        return usual
    if isinstance(usual, bool):
        return None
    rows = [({key: values[key] for key in keys}, value) for _, values, value in examples if type(value) is int]
    return fit(rows, keys)


def _aliases(config_class: type[PreTrainedConfig], used: set[str]) -> dict[str, str]:
    """Return the other names of keys that transformers understands."""
    own = {key: alias for alias, key in config_class.attribute_map.items()}
    return {path: own[path] for path in sorted(used) if path in own}


def _check(needs: Needs, probes: list[Probe]) -> None:
    """Raise ValueError if one of the models that were described would be called incomplete."""
    for probe in probes:
        config = JsonObject(probe.document)
        comparison = Comparison(needs, needs.values(config), Stored.named(probe.shapes))
        lacks = comparison.lacks()
        if lacks:
            raise ValueError(f"with {sorted(probe.changed)}, {lacks[0]} of {len(lacks)}")


def as_text(needs: Needs) -> str:
    """Return the JSON document with a line for each tensor."""
    document = needs.model_dump()
    groups = document.pop("groups")
    lines = [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in document.items()]
    blocks = []
    for group in groups:
        tensors = ",\n".join(f"   {json.dumps(n)}: {json.dumps(s)}" for n, s in group["tensors"].items())
        head = f'"layers": {json.dumps(group["layers"])}, "when": {json.dumps(group["when"])}'
        blocks.append(f'  {{{head}, "tensors": {{\n{tensors}}}}}')
    return "\n".join(["{", *lines, ' "groups": [', ",\n".join(blocks), " ]", "}", ""])


def main() -> int:
    """Write the descriptions of the named classes, or of all."""
    transformers.logging.set_verbosity_error()
    chosen = sys.argv[1:]
    FOLDER.mkdir(exist_ok=True)
    for name, model_types in sorted(classes().items()):
        if chosen and name not in chosen:
            continue
        path = FOLDER / f"{name}.json"
        try:
            needs = describe(name, model_types)
        except Exception as error:
            print(f"{name}: not described: {repr(error)[:300]}", flush=True)
            path.unlink(missing_ok=True)
            continue
        path.write_text(as_text(needs), encoding="utf-8")
        print(f"{name}: {sum(len(g.tensors) for g in needs.groups)} kinds of tensors", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
