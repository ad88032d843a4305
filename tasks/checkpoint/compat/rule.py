"""The words in which engines' rules are written: layers, schemes, refusals, and patterns that cannot run away."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import regex  # type: ignore[import-untyped, unused-ignore]

LINEAR, LM_HEAD, EXPERTS = "linear", "lm_head", "experts"
PLAIN_STORAGE, INTEGER, COMPRESSED, SCALED = "plain", "integer", "compressed", "scaled"  # Module.storage has the same

InvalidPattern = regex.error
Fused = Mapping[str, tuple[str, ...]]  # an engine's fused layer -> the checkpoint's modules it is made of


class NotLoadable(Exception):
    """The engine raises an error here. The text says of which field and why, as a part of a sentence."""


@dataclass(frozen=True)
class Layer:
    """A layer of an engine's module tree: its name there, its class, and the checkpoint's modules it is loaded from."""

    name: str
    kind: str = LINEAR
    cls: str = "ColumnParallelLinear"
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class EngineScheme:
    """What an engine makes of a layer. `because` names the config field that decided; `layout`: integer storage is
    laid out as `gptq` or as `awq`."""

    storage: str = PLAIN_STORAGE
    bits: Any = 16
    group_size: Any = -1
    sym: Any = True
    because: str = field(default="", compare=False)
    layout: str = field(default="gptq", compare=False)

    @property
    def quantized(self) -> bool:
        return self.storage != PLAIN_STORAGE


class Rule(Protocol):
    """One quantization config, as one engine reads it."""

    def scheme(self, layer: Layer) -> EngineScheme:
        """What the engine makes of a layer. Raises Refused where it raises."""
        ...


@dataclass(frozen=True)
class Renames:
    """Prefixes that an engine replaces in names from config and checkpoint (vLLM's `hf_to_vllm_mapper`)."""

    prefixes: tuple[tuple[str, str], ...] = ()

    def of(self, name: Any, where: str) -> str:
        """A name from a config, as the engine calls it. Raises Refused if it is no text."""
        if not isinstance(name, str):
            raise NotLoadable(f"{where} holds {shorten(name)}, which is no name")
        renamed = name
        for old, new in self.prefixes:
            if renamed.startswith(old):
                renamed = new + renamed[len(old) :]
        return renamed

    def of_module(self, module: str) -> str:
        """A module of the checkpoint, whose tensors' names have one more component."""
        return self.of(f"{module}.", "").removesuffix(".")

    def of_list(self, names: Any, where: str) -> list[str]:
        if not isinstance(names, list):
            raise NotLoadable(f"{where} is {shorten(names)}, and no list of names")
        return [self.of(name, where) for name in names]


@dataclass
class Patterns:
    """Regular expressions from a config, run with vLLM's own regex module, each try and all together bounded in time.

    They come from files of anybody. One that is too long, or takes too long, is remembered in `hostile`, and everything
    that depends on it is refused: an engine, which has no limits, would hang there.
    """

    seconds_each: float = 0.05
    seconds: float = 1.5
    longest: int = 1000
    hostile: list[str] = field(default_factory=list)
    _spent: float = 0.0
    _compiled: dict[str, Any] = field(default_factory=dict)

    def search(self, pattern: str, name: str) -> bool:
        """re.search. Raises Refused (hostile) and InvalidPattern (no pattern at all)."""
        return self._run("search", pattern, name)

    def match(self, pattern: str, name: str) -> bool:
        """re.match; an invalid pattern is refused, as engines do not catch it there."""
        try:
            return self._run("match", pattern, name)
        except InvalidPattern as error:
            raise NotLoadable(f"the pattern {shorten(pattern)} is no regular expression ({error})") from error

    def fullmatch(self, pattern: str, name: str) -> bool:
        """re.fullmatch. Raises as search does."""
        return self._run("fullmatch", pattern, name)

    def _run(self, how: str, pattern: str, name: str) -> bool:
        if pattern in self.hostile:
            raise NotLoadable(_hangs(pattern))
        if self._spent > self.seconds:
            raise NotLoadable("its patterns take too long to match the names of all layers")
        began = time.perf_counter()
        try:
            return getattr(self._compile(pattern), how)(name, timeout=self.seconds_each) is not None
        except (TimeoutError, RecursionError, MemoryError, OverflowError) as error:
            self.hostile.append(pattern)
            raise NotLoadable(_hangs(pattern)) from error
        finally:
            self._spent += time.perf_counter() - began

    def _compile(self, pattern: str) -> Any:
        if pattern not in self._compiled:
            if len(pattern) > self.longest:
                raise OverflowError
            try:
                self._compiled[pattern] = regex.compile(pattern, cache_pattern=False)
            except InvalidPattern as error:
                self._compiled[pattern] = error
        compiled = self._compiled[pattern]
        if isinstance(compiled, InvalidPattern):
            raise compiled
        return compiled


def _hangs(pattern: str) -> str:
    return f"the pattern {shorten(pattern)} does not end in sensible time: take it out"


@dataclass(frozen=True)
class Substrings:
    """Whether any of many names lies within a text, without trying them one by one: an MoE has 100,000."""

    names: frozenset[str]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, names: Iterable[str]) -> Substrings:
        held = frozenset(names)
        return cls(held, tuple(sorted({len(name) for name in held})))

    def within(self, text: str) -> bool:
        return any(
            text[start : start + length] in self.names
            for length in self.lengths
            if length <= len(text)
            for start in range(len(text) - length + 1)
        )


def expand(name: str, fused: Fused, whole: bool = True) -> list[str]:
    """The names of a fused layer's parts, or the name itself where its last component is no fused one."""
    leaf = name.rpartition(".")[2]
    if whole and leaf in fused:
        return [name.replace(leaf, part) for part in fused[leaf]]
    return [name]


def required(quantization: Mapping[str, Any], *keys: str) -> Any:
    """The first of these fields that is there. Raises Refused if none is."""
    for key in keys:
        if key in quantization:
            return quantization[key]
    raise NotLoadable(f"quantization_config has no {keys[-1]}")


def shorten(value: Any) -> str:
    """A value from a file in words of bounded length."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
