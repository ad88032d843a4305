"""Turns the models that were built of one architecture into the data that Requant keeps of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from typing import Any

from infra.dev.architectures.formulas import fit
from infra.dev.architectures.probing import Probe

MAX_CONDITIONS = 2
Name = tuple[str, ...]  # the components of a tensor's name, "#" for an index that a key counts
Index = tuple[int, ...]
Numbers = dict[Name, dict[int, dict[Index, set[int]]]]  # of the items by container, probe and indices before them


@dataclass
class Kind:
    """The tensors of one name but for their indices: their shapes by probe and index."""

    name: Name
    shapes: dict[int, dict[Index, tuple[int, ...]]] = field(default_factory=lambda: defaultdict(dict))


@dataclass(frozen=True)
class Description:
    """What the probes of an architecture say, the first probe with the usual config."""

    probes: Sequence[Probe]

    @cached_property
    def literal(self) -> set[Name]:
        """What contains items whose numbers no key changes, such as the layers of a small network in a row.

        Their numbers are parts of names.
        """
        literal: set[Name] = set()
        while True:  # what lies in something else can be told only once that is known to be counted or not
            numbers = self._numbers(literal)
            fixed = {c for c, by_probe in numbers.items() if len({_items(v) for v in by_probe.values()}) == 1}
            outermost = {c for c in fixed if not any(c[: len(o)] == o for o in fixed if o != c)}
            if not outermost:
                return literal
            literal |= outermost

    @cached_property
    def counted(self) -> dict[Name, str]:
        """The formulas for the numbers of items, by the name of what contains them."""
        formulas: dict[Name, str] = {}
        for container, by_probe in self._numbers(self.literal).items():
            counts = {number: max(max(items) for items in v.values()) + 1 for number, v in by_probe.items()}
            whole = all(items == set(range(counts[number])) for number, v in by_probe.items() for items in v.values())
            formula = self._fit(counts) if whole else None
            if formula is not None:
                formulas[container] = formula
        return formulas

    def _numbers(self, literal: set[Name]) -> Numbers:
        numbers: Numbers = defaultdict(lambda: defaultdict(lambda: defaultdict(set)))
        for probe_number, probe in enumerate(self.probes):
            for name in probe.shapes:
                for container, outer, number in _containers(name, literal):
                    numbers[container][probe_number][outer].add(number)
        return numbers

    @cached_property
    def kinds(self) -> list[Kind]:
        """All tensors by name, without those in containers whose numbers of items are not known."""
        formulas = self.counted
        kinds: dict[Name, Kind] = {}
        for probe_number, probe in enumerate(self.probes):
            for full, shape in probe.shapes.items():
                name, index, known = _general(full, self.literal, formulas)
                if known:
                    kinds.setdefault(name, Kind(name)).shapes[probe_number][index] = shape
        return list(kinds.values())

    def document(self) -> dict[str, Any]:
        """Return groups of tensors and the pairs of groups one of which each layer has."""
        members: dict[tuple[Name, frozenset[tuple[int, int]]], list[Kind]] = defaultdict(list)
        for kind in self.kinds:
            layers = _layers_of(kind.name)
            places = frozenset((n, i[0] if layers else 0) for n, by_index in kind.shapes.items() for i in by_index)
            members[layers, places].append(kind)
        groups, presences = [], []
        for (layers, places), kinds in members.items():
            prefix = f"{'.'.join(layers)}.{{{self.counted[layers]}}}." if layers else ""
            rest = len(layers) + 1 if layers else 0
            tensors = {self._name(kind.name, rest): self._shape(kind) for kind in kinds}
            groups.append({"layers": prefix, "when": self._when(layers, places), "tensors": tensors})
            presences.append((layers, places))
        pairs = [
            (a, b)
            for (a, (la, pa)), (b, (lb, pb)) in combinations(enumerate(presences), 2)
            if la and la == lb and not pa & pb and pa | pb == self._everywhere(la)
        ]
        return {"groups": groups, "one_of": pairs}

    def _name(self, name: Name, start: int) -> str:
        parts = [
            f"{{{self.counted[name[:at]]}}}" if part == "#" else part for at, part in enumerate(name) if at >= start
        ]
        return ".".join(parts)

    def _everywhere(self, layers: Name) -> frozenset[tuple[int, int]]:
        """Return all probes and layers."""
        if not layers:
            return frozenset((number, 0) for number in range(len(self.probes)))
        places = {
            (n, i[0])
            for kind in self.kinds
            if kind.name[: len(layers)] == layers and kind.name[len(layers)] == "#"
            for n, by_index in kind.shapes.items()
            for i in by_index
        }
        return frozenset(places)

    def _shape(self, kind: Kind) -> list[str | None] | None:
        """Return the sides of a tensor as formulas, as far as they are the same in all layers."""
        if 0 not in kind.shapes and kind.name[-1] == "bias":
            return self._bias_shape(kind)
        ranks = {len(shape) for by_index in kind.shapes.values() for shape in by_index.values()}
        if len(ranks) != 1 or 0 not in kind.shapes:
            return None
        sides: list[str | None] = []
        for side in range(ranks.pop()):
            found = {n: {shape[side] for shape in by_index.values()} for n, by_index in kind.shapes.items()}
            same = all(len(numbers) == 1 for numbers in found.values())
            sides.append(self._fit({n: min(numbers) for n, numbers in found.items()}) if same else None)
        return sides if any(sides) else None

    def _bias_shape(self, kind: Kind) -> list[str | None] | None:
        """Return the shape of an optional bias: the first side of the matrix beside it."""
        weight = next((k for k in self.kinds if k.name == (*kind.name[:-1], "weight")), None)
        if weight is None or 0 not in weight.shapes:
            return None
        pairs = [(shape, weight.shapes[n].get(i)) for n, own in kind.shapes.items() for i, shape in own.items()]
        fits = all(whole is not None and own == whole[:1] for own, whole in pairs)
        sides = self._shape(weight) if fits else None
        return sides[:1] if sides else None

    def _fit(self, numbers: dict[int, int]) -> str | None:
        """Find the formula for numbers by probe. The first probe must have one."""
        if 0 not in numbers:
            return None
        keys = {
            key
            for n, number in numbers.items()
            for key in self.probes[n].changed
            if number != numbers[0] and self.probes[n].minimal
        }
        rows = [
            ({key: _integer(self.probes[n].values.get(key)) for key in keys}, number) for n, number in numbers.items()
        ]
        usable = [
            ({k: v for k, v in row.items() if v is not None}, number)
            for row, number in rows
            if None not in row.values()
        ]
        if any(value is None for value in rows[0][0].values()):
            return None
        lists = {key: f"len({key})" for key in keys if isinstance(self.probes[0].values.get(key), list)}
        named = [({lists.get(k, k): v for k, v in row.items()}, number) for row, number in usable]
        return fit(named, sorted(lists.get(key, key) for key in keys))

    def _when(self, layers: Name, places: frozenset[tuple[int, int]]) -> list[str] | None:
        """Return the conditions that hold exactly where a group is; None if none are found."""
        everywhere = sorted(self._everywhere(layers))
        wanted = [place in places for place in everywhere]
        if all(wanted):
            return []
        held: dict[tuple[bool, ...], str] = {}
        for condition, answers in self._conditions(everywhere, bool(layers)):
            held.setdefault(tuple(answers), condition)
        fitting = [
            (answers, c) for answers, c in held.items() if all(a or not w for a, w in zip(answers, wanted, strict=True))
        ]
        for count in range(1, MAX_CONDITIONS + 1):
            for chosen in combinations(fitting, count):
                if [all(row) for row in zip(*(answers for answers, _ in chosen), strict=True)] == wanted:
                    return [condition for _, condition in chosen]
        return None

    def _conditions(self, places: Sequence[tuple[int, int]], layered: bool) -> Iterable[tuple[str, list[bool]]]:
        """Yield conditions with their answers at all places."""
        values = [self.probes[n].values for n, _ in places]
        for key, first in self.probes[0].values.items():
            column: list[Any] = [v.get(key) for v in values]
            if all(isinstance(value, bool | int | float | None) for value in column):
                truths = [bool(value) for value in column]
                if len(set(truths)) == 2:
                    yield key, truths
                    yield f"not {key}", [not truth for truth in truths]
            if layered and isinstance(first, list) and all(isinstance(value, list) for value in column):
                for kind in sorted({item for value in column for item in value if isinstance(item, str)}):
                    yield (
                        f"{key}[i] == {kind}",
                        [i < len(v) and v[i] == kind for v, (_, i) in zip(column, places, strict=True)],
                    )
            if layered and all(type(value) is int for value in column) and len(set(column)) > 1:
                yield f"i >= {key}", [i >= value for value, (_, i) in zip(column, places, strict=True)]
                yield f"i < {key}", [i < value for value, (_, i) in zip(column, places, strict=True)]


def _integer(value: object) -> int | None:
    return len(value) if isinstance(value, list) else value if type(value) is int and value else None


def _items(by_outer: dict[Index, set[int]]) -> frozenset[int]:
    """Return the numbers that occur in a container."""
    return frozenset(number for numbers in by_outer.values() for number in numbers)


def _containers(full: str, literal: set[Name]) -> Iterable[tuple[Name, Index, int]]:
    """Yield what contains numbered items on the way to a tensor, the indices before it, and the item's number."""
    name: Name = ()
    index: Index = ()
    for part in full.split("."):
        if part.isdigit() and name not in literal:
            yield name, index, int(part)
            name, index = (*name, "#"), (*index, int(part))
        else:
            name = (*name, part)


def _general(full: str, literal: set[Name], counted: dict[Name, str]) -> tuple[Name, Index, bool]:
    """Return a tensor's name with "#" for indices, the indices, and whether all of their numbers are known."""
    name: Name = ()
    index: Index = ()
    known = True
    for part in full.split("."):
        if part.isdigit() and name not in literal:
            known = known and name in counted
            name, index = (*name, "#"), (*index, int(part))
        else:
            name = (*name, part)
    return name, index, known


def _layers_of(name: Name) -> Name:
    """Return what contains the layer of a tensor, or ()."""
    return name[: name.index("#")] if "#" in name else ()
