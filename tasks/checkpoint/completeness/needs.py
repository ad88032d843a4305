"""What an architecture needs: data that `python -m infra.dev.architectures` takes from transformers."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from requant.tasks.checkpoint.completeness.conditions import PER_LAYER, Default, Values
from requant.tasks.checkpoint.config import JsonObject, ModelConfig

FOLDER = Path(__file__).parent / "architectures"
COUNT = re.compile(r"\{([^}]+)\}")
CLASS_NAME = re.compile(r"\w{1,100}", re.ASCII)
# Keys that a config must state where the architecture has them.
ESSENTIAL = ("hidden_size", "num_hidden_layers", "num_attention_heads")


class Group(BaseModel):
    """Tensors that are there or not there together.

    `layers`: the prefix of their layers and the number of these, as `model.layers.{num_hidden_layers}.`, or "".
    `when`: the conditions for them, all of which must hold; None: transformers knows, and the tensors themselves say
    so. `tensors`: their shapes as formulas by name; null where that is not known. A name may count too, as
    `mlp.experts.{num_experts}.up_proj.weight`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: str
    when: list[str] | None
    tensors: dict[str, list[str | None] | None]


class Needs(BaseModel):
    """The parameters of one class of transformers, as `save_pretrained` names them.

    `model_types`: of configs that it is made for. `parts`: the model types that it was described with of parts that may
    be any model, by their keys in the config. `layers`: as that of the decoder layers' groups. `output`: the weight
    of the output layer. `tied`: whether that is the embedding if a config says nothing. `keys`: what transformers takes
    for keys that a config leaves out. `aliases`: other names of keys. `one_of`: pairs of groups one of which each layer
    has.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str
    source: str
    model_types: list[str]
    parts: dict[str, str]
    layers: str
    output: str | None
    tied: bool
    keys: dict[str, Default]
    aliases: dict[str, str]
    groups: list[Group]
    one_of: list[tuple[int, int]]

    @classmethod
    def of(cls, config: ModelConfig) -> Needs | None:
        """Return what the architecture of a config needs; None if it is not known.

        It counts as not known too if the config lacks a key that every model of the architecture states, since what
        transformers takes instead is another model, and if a part of the config is another model than described.
        """
        architectures = config.get("architectures")
        name = architectures[0] if isinstance(architectures, list) and len(architectures) == 1 else None
        needs = _read(name) if isinstance(name, str) and CLASS_NAME.fullmatch(name) else None
        if needs is None or config.get("model_type") not in needs.model_types:
            return None
        if any(_model_type(config, part) not in (None, known) for part, known in needs.parts.items()):
            return None
        values, text = needs.values(config), needs.text_path
        used = [path for path in needs.keys if path.removeprefix(text) in ESSENTIAL and path.startswith(text)]
        return needs if all(values.states(path) for path in used) else None

    @property
    def text_path(self) -> str:
        """The path of the language model's part of the config, as `text_config.`, or ""."""
        count = split_layers(self.layers)[1]
        return count[: count.rfind(".") + 1]

    @property
    def names(self) -> list[str]:
        """The names of all tensors, those of the layers without a number."""
        return [f"{split_layers(group.layers)[0]}{name}" for group in self.groups for name in group.tensors]

    def values(self, config: JsonObject) -> Values:
        """Return the values of a config of this architecture."""
        kinds: dict[str, set[str]] = {}
        for group in self.groups:
            for condition in group.when or ():
                if match := PER_LAYER.fullmatch(condition):
                    kinds.setdefault(match[1], set()).add(match[2])
        known = {path: frozenset(names) for path, names in kinds.items()}
        return Values(config, self.keys, self.aliases, known)


def _model_type(config: ModelConfig, part: str) -> object:
    child = config.child(part)
    return None if child is None else child.get("model_type")


def split_layers(layers: str) -> tuple[str, str]:
    """Split `model.layers.{num_hidden_layers}.` into the prefix `model.layers.` and the formula of the number."""
    prefix, _, count = layers.partition("{")
    return prefix, count.partition("}")[0]


@cache
def _read(name: str) -> Needs | None:
    path = FOLDER / f"{name}.json"
    return Needs.model_validate(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
