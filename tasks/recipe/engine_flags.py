"""An engine's flags: from a recipe's mapping to arguments, and to the command that a person types."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

FLAG_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,79}(\.[A-Za-z0-9_-]{1,40}){0,4}")
NEGATIVE_NUMBER = re.compile(r"-\d+(\.\d+)?")
MODEL = "MODEL"  # stands for the checkpoint in recorded commands
SPECULATION = "speculative-config"
SPECULATIVE = (SPECULATION, "spec-method", "spec-model", "spec-tokens")  # what vLLM calls its parts
# Which model is served, where, under which name and to whom is the benchmark's to say.
FLAGS_SET_BY_REQUANT = {
    "model": "the checkpoint is what is measured", "model-tag": "the checkpoint is what is measured",
    "served-model-name": "the benchmark names the model", "host": "the benchmark listens on loopback",
    "port": "the benchmark finds a free port", "uds": "the benchmark listens on loopback",
    "api-key": "secrets do not belong into a recipe", "hf-token": "secrets do not belong into a recipe",
    "config": "write the flags themselves", "headless": "the benchmark asks over HTTP",
    "grpc": "the benchmark asks over HTTP", "ssl-certfile": "the benchmark asks over HTTP",
    "ssl-keyfile": "the benchmark asks over HTTP",
    "trust-remote-code": "set allow_remote_code in the recipe",
}  # fmt: skip
# Flags that name Python code to import.
CODE = (
    "middleware", "tool-parser-plugin", "reasoning-parser-plugin", "io-processor-plugin", "logits-processors",
    "worker-cls", "worker-extension-cls", "scheduler-cls", "model-class-overrides", "logging-config",
    "log-config-file", "kv-transfer-config", "ec-transfer-config", "weight-transfer-config",
)  # fmt: skip

WHOLE = "reasoning-parser"  # a flag itself, and the beginning of one that is refused


def check_flags(flags: Mapping[str, Any]) -> None:
    """Raise ValueError, with a sentence, for what is no flag of an engine or is not a recipe's to set."""
    seen: dict[str, str] = {}
    for name, value in flags.items():
        plain = name.replace("_", "-").lower()
        if not FLAG_NAME.fullmatch(name):
            raise ValueError(f"{name[:80]!r} is not a flag: write it as the engine does, without the dashes")
        if plain in seen:
            raise ValueError(f"{name} and {seen[plain]} are one flag: write it once")
        seen[plain] = name
        first = plain.removeprefix("no-").split(".")[0]
        for taken, why in (*FLAGS_SET_BY_REQUANT.items(), *((code, "it names Python code to run") for code in CODE)):
            if taken.startswith(first) and first != WHOLE:  # engines complete what is cut short
                raise ValueError(f"{name} cannot be set here: {why}")
        for item in value if isinstance(value, list) else [value]:
            _check_value(name, item)


def _check_value(name: str, value: Any) -> None:
    if value is None or isinstance(value, list):
        raise ValueError(f"{name} needs a text, a number, true, false, a mapping, or a list of these")
    if isinstance(value, str) and (
        (value.startswith("-") and not NEGATIVE_NUMBER.fullmatch(value)) or not value.isprintable()
    ):
        raise ValueError(f"{name}: {value[:80]!r} would be read as another flag: values do not begin with a dash")


def arguments(flags: Mapping[str, Any]) -> list[str]:
    """The flags as arguments: true stands alone, false as --no-NAME, a mapping as JSON, a list as several."""
    made: list[str] = []
    for name, value in flags.items():
        if isinstance(value, bool):
            made.append(f"--{name}" if value else f"--no-{name}")
        else:
            made += [f"--{name}", *(_word(item) for item in (value if isinstance(value, list) else [value]))]
    return made


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def speculates(name: str) -> bool:
    """Whether a flag asks for speculative decoding."""
    return name.split(".")[0].replace("_", "-") in SPECULATIVE


def with_drafts(flags: Mapping[str, Any], draft_tokens: int) -> dict[str, Any]:
    """The flags with the one that makes vLLM draft with the MTP head, unless they have one of their own."""
    if any(map(speculates, flags)):
        return dict(flags)
    return {**flags, SPECULATION: {"method": "mtp", "num_speculative_tokens": draft_tokens}}


def without_drafts(flags: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if not speculates(name)}


def command_line(words: Sequence[str], model: str) -> str:
    """A recorded command as a person types it, one flag a line."""
    lines: list[str] = []
    for word in (model if word == MODEL else word for word in words):
        if word.startswith("--") or not lines:
            lines.append(shlex.quote(word))
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return " \\\n  ".join(lines)
