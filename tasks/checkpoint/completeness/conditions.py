"""Values of a config: formulas for sizes and conditions for optional parts, as the data of architectures have them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property

from requant.tasks.checkpoint.config import JsonObject, ModelConfig

FACTOR = re.compile(r"([*/]?)(len\()?([\w.]+)\)?")
PER_LAYER = re.compile(r"(.+)\[i\] == (.+)")
FROM_LAYER = re.compile(r"i (<|>=) (.+)")
INDEXER_TYPES = "indexer_types"
SCHEDULE = ("index_topk_pattern", "index_topk_freq", "index_skip_topk_offset")
LETTERS = {"F": "full", "S": "shared"}
UNSTATED = object()
Default = bool | int | str | None


@dataclass(frozen=True)
class Values:
    """What a config says under dotted paths, or what transformers takes if it says nothing.

    `defaults`: constants and formulas by path. `aliases`: other names of a key. `kinds`: the known values of lists with
    one for each layer.
    """

    config: JsonObject
    defaults: Mapping[str, Default] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    kinds: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @cached_property
    def _sizes(self) -> dict[str, int | None]:
        return {}

    def states(self, path: str) -> bool:
        """Check whether the config itself has a value there that is not null."""
        return self.stated(path) not in (None, UNSTATED)

    def stated(self, path: str) -> object:
        """Return the config's own value, or UNSTATED."""
        *parents, key = path.split(".")
        part = self.config
        for parent in parents:
            # a flat config has the text's keys at the top
            child = ModelConfig(part).text if parent == "text_config" else part.child(parent)
            if child is None:
                return UNSTATED
            part = child
        return part.get(key, part.get(self.aliases.get(path, ""), UNSTATED))

    def size(self, formula: str) -> int | None:
        """Return the value of a formula as `2*a*b + c/d`; None if the config does not say it as a whole number."""
        if formula not in self._sizes:
            self._sizes[formula] = self._computed(formula)
        return self._sizes[formula]

    def _computed(self, formula: str) -> int | None:
        total = Fraction(0)
        for term in formula.split(" + "):
            product = Fraction(1)
            for operator, is_length, word in FACTOR.findall(term):
                factor = self._factor(word, bool(is_length))
                if factor is None or (operator == "/" and not factor):
                    return None
                product = product / factor if operator == "/" else product * factor
            total += product
        return int(total) if total.denominator == 1 and 0 <= total < 1 << 40 else None

    @staticmethod
    def words(formula: str) -> list[str]:
        """Return the keys in a formula, without those whose lists it only counts."""
        return [word for _, length, word in FACTOR.findall(formula) if not word.isdigit() and not length]

    def _factor(self, word: str, is_length: bool) -> int | None:
        if word.isdigit():
            return int(word)
        value = self.stated(word)
        if is_length:
            return len(value) if isinstance(value, list) else None
        default = self.defaults.get(word)
        if value in (None, UNSTATED) and isinstance(default, str):
            return self.size(default)
        value = default if value is UNSTATED else value
        return value if type(value) is int else None

    def _kind(self, path: str, layer: int) -> object:
        """Return the entry for a layer of a list with one for each; None if the config does not say."""
        kinds = self.stated(path)
        if kinds in (None, UNSTATED) and path.endswith(INDEXER_TYPES):
            return self._indexer_kind(path.removesuffix(INDEXER_TYPES), layer)
        return kinds[layer] if isinstance(kinds, list) and layer < len(kinds) else None

    def _indexer_kind(self, part: str, layer: int) -> object:
        """Return the kind of a layer's indexer from the pattern or schedule in a part of the config.

        Source: transformers 5.23.0, GlmMoeDsaConfig.__post_init__; those of GLM-5-Next and Mistral Large 4 are alike.
        """
        pattern, frequency, offset = (self.stated(part + key) for key in SCHEDULE)
        if pattern not in (None, UNSTATED):
            listed = [LETTERS.get(letter) for letter in pattern] if isinstance(pattern, str) else pattern
            return listed[layer] if isinstance(listed, list) and layer < len(listed) else None
        if type(frequency) is not int:
            return None
        first = offset if type(offset) is int else 2
        return "shared" if max(layer - first + 1, 0) % max(frequency, 1) else "full"

    def holds(self, condition: str, layer: int) -> bool | None:
        """Check a condition for a layer; None if the config does not say."""
        if match := PER_LAYER.fullmatch(condition):
            kind = self._kind(match[1], layer)
            known = isinstance(kind, str) and kind in self.kinds.get(match[1], ())
            return kind == match[2] if known else None
        if match := FROM_LAYER.fullmatch(condition):
            bound = self._factor(match[2], False)
            return None if bound is None else layer < bound if match[1] == "<" else layer >= bound
        path = condition.removeprefix("not ")
        value = self.stated(path)
        if value is UNSTATED:
            if path not in self.defaults:
                return None
            value = self.defaults[path]
            value = self.size(value) if isinstance(value, str) else value
        if not isinstance(value, bool | int | float | None):
            return None
        return bool(value) != condition.startswith("not ")
