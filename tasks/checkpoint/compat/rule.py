"""What the rules of engines have in common: layers, schemes, refusals, and regular expressions with a time limit."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple, Protocol

import regex  # type: ignore[import-untyped, unused-ignore]

from requant.tasks.checkpoint.config import JsonObject, QuantizationConfig
from requant.tasks.checkpoint.modules import Storage

LINEAR, LM_HEAD, EXPERTS = "linear", "lm_head", "experts"
PLAIN_STORAGE: Final = "plain"
INTEGER: Final = "integer"
COMPRESSED: Final = "compressed"
SCALED: Final = "scaled"

InvalidPattern = regex.error
PLAIN_TEXT = re.compile(r"\.\*((?:\\[^\w\s]|[\w/-])+)\.\*", re.ASCII)
Fused = Mapping[str, tuple[str, ...]]  # names of the checkpoint's modules by the name of an engine's fused layer


class NotLoadable(Exception):
    """The engine would raise an error here. The text is a part of a sentence, and names the field."""


class TooSlow(NotLoadable):
    """A regular expression of the config does not end within the limits of time, so that nothing is known."""


class NotJudged(str):
    """Why it is not known whether an engine loads a checkpoint, or drafts with its head."""

    __slots__ = ()


Finding = str | None  # None: nothing is in the way; NotJudged: that is not known; any other text: what is in the way


@dataclass(frozen=True)
class Layer:
    """A layer of an engine: its name and class there, and the checkpoint's modules from which it is loaded."""

    name: str
    kind: str = LINEAR
    cls: str = "ColumnParallelLinear"
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class EngineScheme:
    """How an engine expects the weights of a layer to be stored.

    `because` names the field of the config that decided. `layout` of integers: gptq or awq.
    """

    storage: Storage = PLAIN_STORAGE
    bits: Any = 16
    group_size: Any = -1
    sym: Any = True
    because: str = field(default="", compare=False)
    layout: str = field(default="gptq", compare=False)

    @property
    def quantized(self) -> bool:
        return self.storage != PLAIN_STORAGE


class SchemeValues(NamedTuple):
    """Values of a quantization config, which an engine may not have checked yet."""

    bits: Any
    group_size: Any
    sym: Any


class Rule(Protocol):
    """One quantization config, as one engine reads it."""

    def scheme(self, layer: Layer) -> EngineScheme:
        """Return how the engine expects a layer to be stored. Raises NotLoadable if the engine would raise."""
        ...


@dataclass(frozen=True)
class Renames:
    """Prefixes that an engine replaces in the names of config and checkpoint (vLLM's `hf_to_vllm_mapper`)."""

    prefixes: tuple[tuple[str, str], ...] = ()

    def of(self, name: Any, where: str) -> str:
        """Rename a name of a config as the engine does. Raises NotLoadable if it is not a string."""
        if not isinstance(name, str):
            raise NotLoadable(f"{where} holds {shorten(name)}, which is no name")
        renamed = name
        for old, new in self.prefixes:
            if renamed.startswith(old):
                renamed = new + renamed[len(old) :]
        return renamed

    def of_module(self, module: str) -> str:
        """Rename a module of the checkpoint as the engine does."""
        return self.of(f"{module}.", "").removesuffix(".")

    def of_list(self, names: Any, where: str) -> list[str]:
        """Rename a list of names. Raises NotLoadable if it is not a list of strings."""
        if not isinstance(names, list):
            raise NotLoadable(f"{where} is {shorten(names)}, and no list of names")
        return [self.of(name, where) for name in names]


@dataclass
class Patterns:
    """Runs regular expressions of a config with the module `regex`, as vLLM does, within limits of time.

    A config may come from anywhere. A pattern that is too long or too slow is added to `hostile`, and everything that
    depends on it is refused: an engine, which has no limits, would hang.
    """

    search_timeout_s: float = 0.05
    total_timeout_s: float = 1.5
    max_length: int = 1000
    hostile: list[str] = field(default_factory=list)
    _spent_s: float = 0.0
    _compiled: dict[str, regex.Pattern[str] | regex.error] = field(default_factory=dict)
    _literals: dict[str, str | None] = field(default_factory=dict)

    def first(self, how: Literal["search", "fullmatch"], patterns: Iterable[str], name: str) -> str | None:
        """Return the first pattern that matches, without the invalid ones. Raises NotLoadable for a hostile one.

        A model with experts has 100,000 names, and auto-round writes a pattern for the router of each layer. These are
        plain text between two `.*`, which is looked for without running a pattern.
        """
        run, one_line = getattr(self, how), "\n" not in name
        began, spent_s = time.thread_time(), self._spent_s
        for pattern in patterns:
            if pattern not in self._literals:
                self._literals[pattern] = _literal_of(pattern)
            literal = self._literals[pattern]
            if literal is not None and one_line:
                if literal in name:
                    return pattern
                continue
            with contextlib.suppress(InvalidPattern):
                if run(pattern, name):
                    return pattern
        self._spent_s = spent_s + time.thread_time() - began
        self._check_time()
        return None

    def search(self, pattern: str, name: str) -> bool:
        """Search as re.search does. Raises NotLoadable for a hostile pattern, InvalidPattern for an invalid one."""
        return self._run("search", pattern, name)

    def match(self, pattern: str, name: str) -> bool:
        """Match as re.match does. Raises NotLoadable for an invalid pattern too, as engines do not catch that error."""
        try:
            return self._run("match", pattern, name)
        except InvalidPattern as error:
            raise NotLoadable(f"the pattern {shorten(pattern)} is no regular expression ({error})") from error

    def fullmatch(self, pattern: str, name: str) -> bool:
        """Match as re.fullmatch does. Raises as `search` does."""
        return self._run("fullmatch", pattern, name)

    def _run(self, how: str, pattern: str, name: str) -> bool:
        if pattern in self.hostile:
            raise TooSlow(_hangs(pattern))
        self._check_time()
        began = time.thread_time()
        try:
            return getattr(self._compile(pattern), how)(name, timeout=self.search_timeout_s) is not None
        except (TimeoutError, RecursionError, MemoryError, OverflowError) as error:
            self.hostile.append(pattern)
            raise TooSlow(_hangs(pattern)) from error
        finally:
            self._spent_s += time.thread_time() - began

    def _check_time(self) -> None:
        """Raise TooSlow if the time is spent. It is that of the processor, which a busy machine does not lengthen."""
        if self._spent_s > self.total_timeout_s:
            raise TooSlow("its patterns take too long to match the names of all layers")

    def _compile(self, pattern: str) -> Any:
        if pattern not in self._compiled:
            if len(pattern) > self.max_length:
                raise OverflowError
            try:
                self._compiled[pattern] = regex.compile(pattern, cache_pattern=False)
            except InvalidPattern as error:
                self._compiled[pattern] = error
        compiled = self._compiled[pattern]
        if isinstance(compiled, InvalidPattern):
            raise compiled
        return compiled


def _literal_of(pattern: str) -> str | None:
    """Return the text of a pattern `.*text.*`, which matches the lines that contain the text; None for another one."""
    found = PLAIN_TEXT.fullmatch(pattern)
    return re.sub(r"\\(.)", r"\1", found[1]) if found else None


def _hangs(pattern: str) -> str:
    return f"the pattern {shorten(pattern)} does not end in sensible time: take it out"


@dataclass(frozen=True)
class Substrings:
    """Names to find within a text without trying them one by one: an MoE has 100,000."""

    names: frozenset[str]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, names: Iterable[str]) -> Substrings:
        names = frozenset(names)
        return cls(names, tuple(sorted({len(name) for name in names})))

    def within(self, text: str) -> bool:
        """Check whether a text contains one of the names."""
        return any(
            text[start : start + length] in self.names
            for length in self.lengths
            if length <= len(text)
            for start in range(len(text) - length + 1)
        )


def expand(name: str, fused: Fused) -> list[str]:
    """Return the names of a fused layer's parts; for any other layer, its own name."""
    leaf = name.rpartition(".")[2]
    if leaf in fused:
        return [name.replace(leaf, part) for part in fused[leaf]]
    return [name]


def required(quantization: QuantizationConfig, *keys: str) -> Any:
    """Return the first of some fields that is there. Raises NotLoadable if none is."""
    for key in keys:
        if key in quantization:
            return quantization[key]
    raise NotLoadable(f"quantization_config has no {keys[-1]}")


def mapping(quantization: QuantizationConfig, key: str) -> JsonObject:
    """Return the mapping under a key; empty if it is missing or null. Raises NotLoadable for anything else."""
    value = quantization.get(key)
    if value is not None and not isinstance(value, dict):
        raise NotLoadable(f"{key} is {shorten(value)}, and no mapping")
    return JsonObject(value or {})


def shorten(value: Any) -> str:
    """Return the repr of a value of a config, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
