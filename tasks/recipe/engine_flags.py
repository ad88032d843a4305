"""An engine's flags: the mapping in a recipe as command-line arguments, and as a command that a reader can copy."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence

from pydantic import JsonValue

FLAG_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,79}(\.[A-Za-z0-9_-]{1,40}){0,4}")
NEGATIVE_NUMBER = re.compile(r"-\d+(\.\d+)?")
MODEL = "MODEL"  # the placeholder for the checkpoint in recorded commands
SPECULATION = "speculative-config"
SPECULATION_FLAGS = (SPECULATION, "spec-method", "spec-model", "spec-tokens")  # vLLM's flags for speculative decoding
# The benchmark itself decides which model is served, at which address and under which name.
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
CODE_FLAGS = (
    "middleware", "tool-parser-plugin", "reasoning-parser-plugin", "io-processor-plugin", "logits-processors",
    "worker-cls", "worker-extension-cls", "scheduler-cls", "model-class-overrides", "logging-config",
    "log-config-file", "kv-transfer-config", "ec-transfer-config", "weight-transfer-config",
)  # fmt: skip
REASONING_PARSER = "reasoning-parser"  # an allowed flag, and also the beginning of a refused one


def checked_flags(flags: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Return a recipe's flags. Raises ValueError for a name that is no flag or that a recipe may not set."""
    seen: dict[str, str] = {}
    for name, value in flags.items():
        normalized = name.replace("_", "-").lower()
        if not FLAG_NAME.fullmatch(name):
            raise ValueError(f"{name[:80]!r} is not a flag: write it as the engine does, without the dashes")
        if normalized in seen:
            raise ValueError(f"{name} and {seen[normalized]} are one flag: write it once")
        seen[normalized] = name
        first = normalized.removeprefix("no-").split(".")[0]
        code_flags = dict.fromkeys(CODE_FLAGS, "it names Python code to run")
        for refused, why in {**FLAGS_SET_BY_REQUANT, **code_flags}.items():
            # Engines accept a flag by its first letters too.
            if refused.startswith(first) and first != REASONING_PARSER:
                raise ValueError(f"{name} cannot be set here: {why}")
        for item in value if isinstance(value, list) else [value]:
            _check_value(name, item)
    return flags


def _check_value(name: str, value: JsonValue) -> None:
    if value is None or isinstance(value, list):
        raise ValueError(f"{name} needs a text, a number, true, false, a mapping, or a list of these")
    if isinstance(value, str) and (
        (value.startswith("-") and not NEGATIVE_NUMBER.fullmatch(value)) or not value.isprintable()
    ):
        raise ValueError(f"{name}: {value[:80]!r} would be read as another flag: values do not begin with a dash")


def arguments(flags: Mapping[str, JsonValue]) -> list[str]:
    """Turn flags into arguments: true as --NAME, false as --no-NAME, a mapping as JSON, a list as several values."""
    words: list[str] = []
    for name, value in flags.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", *(_word(item) for item in (value if isinstance(value, list) else [value]))]
    return words


def _word(value: JsonValue) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def server_address(engine: str) -> str:
    """Return the address of a server that runs already, without `url:` before and the path of the API behind it."""
    return engine.removeprefix("url:").rstrip("/").removesuffix("/v1").rstrip("/")


def speculates(name: str) -> bool:
    """Check whether a flag turns on speculative decoding."""
    return name.split(".")[0].replace("_", "-") in SPECULATION_FLAGS


def with_drafts(flags: Mapping[str, JsonValue], draft_tokens: int) -> dict[str, JsonValue]:
    """Add the flag that makes vLLM draft with the MTP head, unless the flags set up speculative decoding themselves."""
    if any(map(speculates, flags)):
        return dict(flags)
    return {**flags, SPECULATION: {"method": "mtp", "num_speculative_tokens": draft_tokens}}


def without_drafts(flags: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Leave out the flags for speculative decoding."""
    return {name: value for name, value in flags.items() if not speculates(name)}


def command_line(words: Sequence[str], model: str) -> str:
    """Format a recorded command for a shell, with one flag per line and `model` in place of the placeholder MODEL."""
    lines: list[str] = []
    for word in (model if word == MODEL else word for word in words):
        if word.startswith("--") or not lines:
            lines.append(shlex.quote(word))
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return " \\\n  ".join(lines)
