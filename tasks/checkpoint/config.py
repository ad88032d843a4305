"""The configs of a checkpoint, with typed access to the fields that Requant reads.

A config may come from anywhere, and each of its fields may be missing or hold anything. The classes are dictionaries:
unknown keys survive when a config is written back, and the rules in `compat` can check raw values as the engines do.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

# Keys that count MTP layers, of the language model's config or of an object in the config, as Inkling's mtp_config.
LAYER_COUNTS = (
    "mtp_num_hidden_layers", "num_nextn_predict_layers", "num_mtp_modules", "num_mtp_layers", "n_mtp_layers",
)  # fmt: skip
HeadPrecision = Literal["keep", "int8", "int4"]  # keep: the head of the base, unchanged
HEAD_BITS = {"int8": 8, "int4": 4}  # the precisions that an MTP head can be quantized to


Scalar = bool | int | str | None  # a value that a config states, whatever type the field should have


class JsonObject(dict[str, Any]):
    """A JSON object from a file of a checkpoint."""

    def integer(self, key: str) -> int | None:
        """Return the integer under a key, or None. A boolean is not an integer here."""
        value = self.get(key)
        return value if type(value) is int else None

    def string(self, key: str) -> str | None:
        """Return the string under a key, or None."""
        value = self.get(key)
        return value if isinstance(value, str) else None

    def child(self, key: str) -> JsonObject | None:
        """Return the object under a key, or None."""
        value = self.get(key)
        return JsonObject(value) if isinstance(value, dict) else None


@dataclass(frozen=True)
class ConfigScheme:
    """Bits of a weight, group size and symmetry as a config says; None where it says nothing, or several values."""

    bits: Scalar
    group_size: Scalar
    sym: Scalar


class QuantizationConfig(JsonObject):
    """The quantization config of a checkpoint; empty if the checkpoint has none."""

    @property
    def method(self) -> str:
        """The value of `quant_method` in vLLM's spelling; empty if there is none.

        A config that ModelOpt wrote to a file of its own names its producer and no method.
        """
        stated = (self.string("quant_method") or "").lower().replace("compressed_tensors", "compressed-tensors")
        by_modelopt = (self.child("producer") or JsonObject()).get("name") == "modelopt"
        return "modelopt" if by_modelopt and not stated else stated

    @property
    def scheme(self) -> ConfigScheme:
        """The scheme of most layers, whatever the method calls its fields."""
        if self.method == "compressed-tensors":
            groups = (self.child("config_groups") or JsonObject()).values()
            weights = [g["weights"] for g in groups if isinstance(g, dict) and isinstance(g.get("weights"), dict)]
            keys = ("num_bits", "group_size", "symmetric")
            return ConfigScheme(*(_common([w.get(key) for w in weights]) for key in keys))
        sym = self.get("sym")
        if sym is None and type(self.get("zero_point")) is bool:  # AWQ's field
            sym = not self["zero_point"]
        bits = self.get("bits", self.get("w_bit"))
        group_size = self.get("group_size", self.get("q_group_size"))
        return ConfigScheme(_common([bits]), _common([group_size]), _common([sym]))


def _common(values: Iterable[object]) -> Scalar:
    """Return the only integer or string among some values, or None."""
    plain = {value for value in values if isinstance(value, int | str)}
    return plain.pop() if len(plain) == 1 else None


class ModelConfig(JsonObject):
    """The `config.json` of a checkpoint."""

    @property
    def text(self) -> JsonObject:
        """The language model's part of a multimodal model, otherwise the config itself."""
        return JsonObject(self[self.text_key]) if self.text_key else self

    @property
    def text_key(self) -> str:
        """The key of the language model's part; empty if there is none.

        Both vLLM 0.32.0 (transformers_utils/config.py) and transformers read `llm_config` as `text_config`.
        """
        return next((key for key in ("text_config", "llm_config") if isinstance(self.get(key), dict)), "")

    @property
    def mtp_layers(self) -> int:
        """The number of MTP layers that the config promises; 0 if it says nothing."""
        places = (self.text, self.child("mtp_config") or JsonObject())
        counts = (place.integer(key) for place in places for key in LAYER_COUNTS)
        return max((count for count in counts if count is not None), default=0)

    @property
    def quantization(self) -> QuantizationConfig:
        """The quantization config, wherever in the file engines and transformers look for it."""
        place = self._place_of_quantization
        return QuantizationConfig(place[0].child(place[1]) or {}) if place else QuantizationConfig()

    @property
    def _place_of_quantization(self) -> tuple[JsonObject, str] | None:
        """The part of the config with the quantization config, and its key there."""
        places = ((part, key) for part in (self, self.text) for key in ("quantization_config", "compression_config"))
        return next(((part, key) for part, key in places if part.child(key) is not None), None)

    @property
    def fp8_block(self) -> tuple[int, int] | None:
        """Rows and columns that share one FP8 scale; None if the config does not say."""
        for part in (self, self.text):
            size = (part.child("quantization_config") or JsonObject()).get("weight_block_size")
            if isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size):
                return size[0], size[1]
        return None

    def with_quantization(self, quantization: QuantizationConfig) -> ModelConfig:
        """Return a copy with another quantization config, at the place of the old one."""
        part, key = self._place_of_quantization or (self, "quantization_config")
        changed = {**part, key: quantization}
        return ModelConfig(changed if part is self else {**self, "text_config": changed})

    def without_quantization(self) -> ModelConfig:
        """Return a copy without a quantization config."""
        bare = ModelConfig({key: value for key, value in self.items() if key != "quantization_config"})
        if self.text_key:
            bare[self.text_key] = {key: value for key, value in self.text.items() if key != "quantization_config"}
        return bare

    def with_mtp_layers_of(self, base: ModelConfig) -> ModelConfig:
        """Return a copy that promises as many MTP layers as the base's config, if that says anything."""
        counts = {key: base.text[key] for key in LAYER_COUNTS if key in base.text}
        if self.text_key and base.text_key:
            return ModelConfig({**self, self.text_key: {**self.text, **counts}})
        return ModelConfig({**self, **counts})

    def with_count(self, key: str, count: int) -> ModelConfig:
        """Return a copy with another number of MTP layers, which stands at `key`; `.` leads to a key of an object."""
        config = copy.deepcopy(self)
        outer, _, inner = key.rpartition(".")
        for part in (config.get(config.text_key), config):
            place = part.get(outer) if outer and isinstance(part, dict) else part
            if isinstance(place, dict) and inner in place:
                place[inner] = count
                break
        return config

    def without_mtp_layers(self) -> ModelConfig:
        """Return a copy that promises no MTP head: every count of MTP layers is 0."""
        config = copy.deepcopy(self)
        for part in (config, *(value for value in config.values() if isinstance(value, dict))):
            part.update({key: 0 for key in LAYER_COUNTS if key in part})
        return config
