"""Compares the parameters that a checkpoint has with what its architecture needs."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from requant.tasks.checkpoint.completeness.conditions import Values
from requant.tasks.checkpoint.completeness.names import Shape, Stored, kind_of, without_leading
from requant.tasks.checkpoint.completeness.needs import COUNT, Group, Needs, split_layers

MAX_LAYERS = 10_000
MAX_EXPERTS = 100_000
SPLIT_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
FUSED_OF = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "w1": "gate_up_proj", "w3": "gate_up_proj"}
FUSED_OF |= {"down_proj": "down_proj", "w2": "down_proj"}
LOWEST_MATCH = 0.5  # of the kinds of tensors of a part; with fewer, they have other names, and nothing is said


@dataclass(frozen=True)
class Lack:
    """A parameter that is missing or, with `needed` and `there`, has another shape."""

    name: str
    needed: tuple[int | None, ...] | None = None
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
            if part_of(group.layers or next(iter(group.tensors))) not in foreign and self._is_stated(group):
                for layer in range(self._layers(group)):
                    if self._needed(number, layer):
                        found += self._lacking(group, layer)
        return found

    def _foreign_parts(self) -> set[str]:
        """Return the parts of the model whose tensors have other names."""
        known: dict[str, list[bool]] = defaultdict(list)
        present = {kind_of(name) for name in self.stored.shapes if is_first_expert(name)} | self._fused_forms
        for group in self.needs.groups:
            if group.when is None:
                continue
            prefix = split_layers(group.layers)[0]
            for name in group.tensors:
                short = without_leading(f"{prefix}0.{name}" if prefix else name)
                kind = kind_of(COUNT.sub("0", short))
                known[part_of(group.layers or name)].append(kind in present)
        there = {part_of(name) for name in self.stored.shapes}
        foreign = {part for part, seen in known.items() if part in there and sum(seen) < LOWEST_MATCH * len(seen)}
        if there - known.keys() - HEADS:  # a part of another name may be the one that seems to be missing
            foreign |= known.keys() - there - {""}
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
        return any(short in self._present for short, _, _ in self._expanded(self.needs.groups[number], layer))

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

    def _lacking(self, group: Group, layer: int) -> Iterator[Lack]:
        for short, usual, shape in self._expanded(group, layer):
            if short not in self._present:
                yield Lack(self.stored.full_name(short, usual))
                continue
            there = self.stored.shapes.get(short)
            if shape and there and not _fits(shape, there):
                yield Lack(self.stored.full_name(short, usual), shape, there)

    def _expanded(self, group: Group, layer: int) -> Iterator[tuple[str, str, tuple[int | None, ...]]]:
        """Yield the tensors of a group in a layer: their short names, names and shapes."""
        prefix = split_layers(group.layers)[0]
        lead = f"{prefix}{layer}." if prefix else ""
        for name, formulas in group.tensors.items():
            shape = tuple(self.values.size(f) if f else None for f in formulas or ())
            counted = COUNT.search(name)
            if counted is None:
                full = lead + name
                split = self._split_of(full, shape)
                if split is None:
                    yield without_leading(full), full, shape
                else:
                    yield from split
                continue
            count = min(self.values.size(counted[1]) or 0, MAX_EXPERTS)
            before, after = lead + name[: counted.start()], name[counted.end() :]
            short = without_leading(before)
            for item in range(count):
                yield f"{short}{item}{after}", f"{before}{item}{after}", shape

    def _split_of(self, full: str, shape: Shape | tuple[int | None, ...]) -> Iterator[tuple[str, str, Shape]] | None:
        """Return the matrices of fused experts, if the checkpoint has them one by one; None otherwise."""
        stem, _, fused = full.rpartition(".")
        short = without_leading(stem)
        experts = self._split_experts.get(short)
        if experts is None or fused not in FUSED_OF.values() or f"{short}.{fused}" in self.stored.shapes:
            return None
        count = min((shape[0] if shape else None) or max(experts) + 1, MAX_EXPERTS)
        matrices = [name for name in ("gate_proj", "up_proj", "down_proj") if FUSED_OF[name] == fused]
        names = (f"{e}.{matrix}.weight" for e in range(count) for matrix in matrices)
        return ((f"{short}.{name}", f"{stem}.{name}", ()) for name in names)

    @cached_property
    def _split_experts(self) -> Mapping[str, set[int]]:
        """The numbers of the experts that are there one by one, by the name of all."""
        experts: dict[str, set[int]] = defaultdict(set)
        for name in self.stored.shapes:
            if ".experts." in name and (match := SPLIT_EXPERT.fullmatch(name)) and len(match[2]) < 7:
                experts[match[1]].add(int(match[2]))
        return experts

    @cached_property
    def _present(self) -> set[str]:
        """The short names that are there, those of the matrices in fused experts too."""
        names = set(self.stored.shapes)
        for name in self.stored.shapes:
            stem, _, fused = name.rpartition(".")
            if fused in FUSED_OF.values() and stem.endswith(".experts"):
                shape = self.stored.shapes[name]
                count = min(shape[0], MAX_EXPERTS) if shape else self._expert_count
                matrices = [matrix for matrix, its in FUSED_OF.items() if its == fused]
                names |= {f"{stem}.{e}.{matrix}.weight" for e in range(count) for matrix in matrices}
        return names

    @cached_property
    def _expert_count(self) -> int:
        """The largest number of experts that the architecture's names count."""
        formulas = {match for group in self.needs.groups for name in group.tensors for match in COUNT.findall(name)}
        return min(max((self.values.size(f) or 0 for f in formulas), default=0), MAX_EXPERTS)

    @cached_property
    def _fused_forms(self) -> set[str]:
        """The kinds of names that the experts would have in the other of the two forms."""
        forms = set[str]()
        for name in self.stored.shapes:
            stem, _, fused = name.rpartition(".")
            if fused in FUSED_OF.values() and stem.endswith(".experts"):
                forms |= {kind_of(f"{stem}.0.{matrix}.weight") for matrix, its in FUSED_OF.items() if its == fused}
        for stem in self._split_experts:
            forms |= {kind_of(f"{stem}.{fused}") for fused in FUSED_OF.values()}
        return forms


def is_first_expert(name: str) -> bool:
    """Check whether a tensor is that of no single expert, or of the first: the others have the same names."""
    _, several, rest = name.partition(".experts.")
    return not several or not rest[:1].isdigit() or rest.startswith("0.")


def part_of(name: str) -> str:
    """Return the part of the model that a tensor belongs to: the name of a tower, or "" for the language model."""
    first = without_leading(name).partition(".")[0]
    return "" if first in TEXT_PARTS else first


HEADS = frozenset({"mtp", "mtp_layers", "mtp_block"})  # what a checkpoint may have beside the model
TEXT_PARTS = frozenset({
    "layers", "h", "blocks", "embed_tokens", "embeddings", "wte", "word_embeddings", "embed_in", "norm", "norm_f",
    "ln_f", "final_layernorm", "lm_head", "embed_out",
})  # fmt: skip


def _fits(needed: tuple[int | None, ...], there: Shape) -> bool:
    """Check a shape. Where a side is not known, any fits."""
    return len(needed) == len(there) and all(n in (None, t) for n, t in zip(needed, there, strict=True))
