"""Compares the parameters that a checkpoint has with what its architecture needs."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from requant.tasks.checkpoint.completeness.conditions import Values
from requant.tasks.checkpoint.completeness.expansion import Sides, expanded
from requant.tasks.checkpoint.completeness.names import Shape, Stored, kind_of, without_leading
from requant.tasks.checkpoint.completeness.needs import COUNT, Group, Needs, split_layers

MAX_LAYERS = 1000
MAX_LACKS = 10_000  # of a hostile config, which may promise any number of tensors
MAX_EVIDENCE = 64  # names to look for before a layer counts as without a group
ABSENT = (-1,)
LOWEST_MATCH = 0.5  # of the kinds of tensors of a part; with fewer, they have other names, and nothing is said


@dataclass(frozen=True)
class Lack:
    """A parameter that is missing or, with `needed` and `there`, has another shape."""

    name: str
    needed: Sides | None = None
    there: Shape | None = None


@dataclass(frozen=True)
class Comparison:
    """A checkpoint's parameters beside those that an architecture needs."""

    needs: Needs
    values: Values
    stored: Stored

    def lacks(self) -> list[Lack]:
        """Return what is missing or has another shape, in the order of the layers.

        A part of the model (the language model, a tower) whose tensors have other names than transformers gives them
        is passed over. One without any tensor is missing.
        """
        found: list[Lack] = []
        foreign = self._foreign_parts()
        for number, group in enumerate(self.needs.groups):
            if self._is_stated(group):
                for layer in range(self._layers(group)):
                    if len(found) < MAX_LACKS and self._needed(number, layer):
                        found += islice(self._lacking(group, layer, foreign), MAX_LACKS)
        return found

    def _foreign_parts(self) -> set[str]:
        """Return the parts of the model whose tensors have other names: most are not found, and others are there."""
        needed: dict[str, dict[str, bool]] = defaultdict(dict)
        for group in self.needs.groups:
            prefix = split_layers(group.layers)[0]
            for name in group.tensors:
                short = without_leading(f"{prefix}0.{COUNT.sub('0', name)}" if prefix else COUNT.sub("0", name))
                needed[part_of(short)][kind_of(short)] = group.when == [] and "experts." not in name
        present = {kind_of(name) for name in self.stored.shapes if ".experts." not in name}
        others = present.difference(*needed.values())
        foreign = {part for part, kinds in needed.items() if _is_foreign(part, kinds, present, others)}
        if {part_of(kind) for kind in present} - needed.keys() - HEADS:  # it may be the part that seems to be missing
            foreign |= {part for part, kinds in needed.items() if part and present.isdisjoint(kinds)}
        return foreign

    def _is_stated(self, group: Group) -> bool:
        """Check whether the config has the parts that the group's sizes are read from."""
        formulas = [f for shape in group.tensors.values() for f in shape or () if f] + [group.layers]
        parents = {match for formula in formulas for match in re.findall(r"(\w+_config)\.", formula)}
        return all(parent == "text_config" or self.values.config.child(parent) is not None for parent in parents)

    def _layers(self, group: Group) -> int:
        if not group.layers:
            return 1
        return min(self.values.size(split_layers(group.layers)[1]) or 0, MAX_LAYERS)

    def _needed(self, number: int, layer: int) -> bool:
        """Check whether a layer needs a group: the config says so or, where it does not, what is there."""
        group = self.needs.groups[number]
        if self.needs.output in group.tensors:
            return not self.tied
        answer = self._stated_need(group, layer)
        if answer is not None:
            return answer
        if self._has_some(number, layer):
            return True
        others = [b if a == number else a for a, b in self.needs.one_of if number in (a, b)]
        return any(self._is_next_best(number, other, layer) for other in others)

    def _is_next_best(self, number: int, other: int, layer: int) -> bool:
        """Check whether a layer has neither of two groups, and most layers have the first."""
        if self._has_some(other, layer) or self._stated_need(self.needs.groups[other], layer) is not None:
            return False
        ours, theirs = self._support[number], self._support[other]
        return ours > theirs or (ours == theirs and number < other)

    def _stated_need(self, group: Group, layer: int) -> bool | None:
        if group.when is None:
            return None
        answers = [self.values.holds(condition, layer) for condition in group.when]
        return False if False in answers else None if None in answers else True

    def _has_some(self, number: int, layer: int) -> bool:
        names = expanded(self.needs.groups[number], layer, self.values, self.stored)
        return any(short in self.stored.shapes for short, _, _ in islice(names, MAX_EVIDENCE))

    @cached_property
    def _support(self) -> list[int]:
        """How many layers have something of each group."""
        groups = self.needs.groups
        return [sum(self._has_some(n, i) for i in range(self._layers(g))) for n, g in enumerate(groups)]

    @property
    def tied(self) -> bool:
        """Whether the output layer is the embedding.

        If the parts of a config disagree, engines do too.
        """
        stated = [self.values.stated(f"{part}tie_word_embeddings") for part in {"", self.needs.text_path}]
        said = [value for value in stated if isinstance(value, bool)]
        return any(said) if said else self.needs.tied

    def _lacking(self, group: Group, layer: int, foreign: set[str]) -> Iterator[Lack]:
        for short, usual, shape in expanded(group, layer, self.values, self.stored):
            if part_of(short) in foreign:
                continue
            there = self.stored.shapes.get(short, ABSENT)
            if there == ABSENT:
                yield Lack(self.stored.full_name(short, usual))
            elif shape and there and not _fits(shape, there):
                yield Lack(self.stored.full_name(short, usual), shape, there)


def _is_foreign(part: str, needed: dict[str, bool], present: set[str], others: set[str]) -> bool:
    """Check whether a part has other names, which are not the same behind one more prefix.

    `needed`: the kinds of its tensors, and whether every model has them. `others`: the kinds that no part needs.
    """
    always = {kind for kind, is_always in needed.items() if is_always}
    few = len(always & present) < LOWEST_MATCH * len(always)
    named_else = any(part_of(kind) == part if part else part_of(kind) not in HEADS for kind in others)
    return few and named_else and always.isdisjoint(without_leading(kind.partition(".")[2]) for kind in others)


def part_of(name: str) -> str:
    """Return the part of the model that a tensor belongs to: the name of a tower, or "" for the language model."""
    first = without_leading(name).partition(".")[0]
    return "" if first in TEXT_PARTS else first


HEADS = frozenset({"mtp", "mtp_layers", "mtp_block"})  # what a checkpoint may have beside the model
TEXT_PARTS = frozenset({
    "layers", "h", "blocks", "embed_tokens", "embeddings", "wte", "word_embeddings", "embed_in", "norm", "norm_f",
    "ln_f", "final_layernorm", "lm_head", "embed_out",
})  # fmt: skip


def _fits(needed: Sides, there: Shape) -> bool:
    """Check a shape. Where a side is not known, any fits."""
    return len(needed) == len(there) and all(n in (None, t) for n, t in zip(needed, there, strict=True))
