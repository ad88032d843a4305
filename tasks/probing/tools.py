"""The set `tools`: is a call well formed, does it fit the schema, is it the one that was asked for?

The rows are a selection of the Berkeley Function Calling Leaderboard: questions/README.md.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from requant.tasks.probing.outcome import Outcome
from requant.tasks.probing.question import Json, Question, Reply
from requant.tasks.probing.thought import split_thought
from requant.tasks.probing.tool_calls import ToolCall, read_calls

ROWS = Path(__file__).parent / "questions" / "tools.jsonl"
MAX_TOKENS = 1024
# Differences in which two texts are equal, as in bfcl_eval 2026.3.23: eval_checker/ast_eval/ast_checker.py.
INSIGNIFICANT = re.compile(r"[ ,./\-_*^]")

# What may be the value of each parameter of a function. An empty text among the values: it may be absent.
Expected = Mapping[str, Mapping[str, Sequence[Any]]]


@dataclass(frozen=True)
class ToolRow:
    """A row: messages, the tools to choose from, and the expected calls in any order; none where no tool fits."""

    id: str
    category: str
    messages: tuple[Json, ...]
    tools: tuple[Json, ...]
    calls: tuple[Expected, ...]

    @property
    def question(self) -> Question:
        tools = tuple({"type": "function", "function": tool} for tool in self.tools)
        return Question(self.id, self.id, self.messages, MAX_TOKENS, tools=tools)


@functools.cache
def load_rows() -> tuple[ToolRow, ...]:
    """Load the rows that are part of the package."""
    return tuple(to_row(json.loads(line)) for line in ROWS.read_text(encoding="utf-8").splitlines())


def to_row(row: Json) -> ToolRow:
    return ToolRow(row["id"], row["category"], tuple(row["messages"]), tuple(row["tools"]), tuple(row["calls"]))


def judge_reply(row: ToolRow, reply: Reply) -> Outcome:
    """Judge the answer to a row.

    `tool_calls_valid`, where a tool fits: there is a call, and every call is well formed, names a function that exists
    and fits its schema. `tool_calls_right`: the calls are the expected ones; where no tool fits, there is none
    in an answer that ends.
    """
    calls = read_calls(split_thought(reply).answer)
    typed = [_typed(row, call) for call in calls]
    problem = next((words for words in (call_problem(row, call) for call in typed) if words), "")
    if not row.calls:
        reason = "a call where no tool fits" if calls else "" if reply.ended else "unfinished answer"
        return Outcome(question=row.id, group=row.id, measures={"tool_calls_right": not reason}, reason=reason)
    valid = bool(calls) and not problem
    right = valid and are_expected(typed, row.calls)
    reason = "" if right else problem or ("other arguments, function or number of calls" if calls else "no call")
    measures = {"tool_calls_valid": valid, "tool_calls_right": right}
    return Outcome(question=row.id, group=row.id, measures=measures, reason=reason)


def plain(name: str) -> str:
    """Return a function's name as it is compared: models are taught names without dots."""
    return re.sub(r"[^A-Za-z0-9]", "_", name)


def _tool(row: ToolRow, call: ToolCall) -> Json | None:
    return next((tool for tool in row.tools if plain(tool["name"]) == plain(call.name)), None)


def _typed(row: ToolRow, call: ToolCall) -> ToolCall:
    """Return the call with the arguments in the types of the schema, if its form writes all of them as text."""
    tool = _tool(row, call)
    if not call.as_text or call.arguments is None or tool is None:
        return call
    properties = tool["parameters"].get("properties", {})
    read = {name: _from_text(value, properties.get(name, {})) for name, value in call.arguments.items()}
    return ToolCall(call.name, read)


def _from_text(value: str, schema: Json) -> Any:
    if schema.get("type") == "string":
        return value
    try:
        return json.loads(value.strip().lower() if schema.get("type") == "boolean" else value)
    except (ValueError, RecursionError):
        return value


def call_problem(row: ToolRow, call: ToolCall) -> str:
    """Say what is wrong with a call; empty if it can be made."""
    if call.arguments is None:
        return "malformed call"
    tool = _tool(row, call)
    if tool is None:
        return "unknown function"
    properties = tool["parameters"].get("properties", {})
    if any(name not in properties for name in call.arguments):
        return "unknown parameter"
    import jsonschema  # A plan reads the questions of probes, and would wait for this import.

    try:
        jsonschema.validate(call.arguments, tool["parameters"])
    except jsonschema.ValidationError as error:
        return f"against the schema: {error.validator}"
    return ""


def are_expected(calls: Sequence[ToolCall], expected: Sequence[Expected]) -> bool:
    """Check whether each expected call is there once, in any order, and no other."""
    if len(calls) != len(expected):
        return False
    left = list(calls)
    for wanted in expected:
        found = next((call for call in left if _is_expected(call, wanted)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def _is_expected(call: ToolCall, wanted: Expected) -> bool:
    ((name, parameters),) = wanted.items()
    return call.arguments is not None and plain(call.name) == plain(name) and _fits(call.arguments, parameters)


def _fits(arguments: Json, parameters: Mapping[str, Sequence[Any]]) -> bool:
    """Check that each argument has one of the possible values, and that only those are absent that may be."""
    absent_is_wrong = (name for name, values in parameters.items() if "" not in values)
    return all(name in arguments for name in absent_is_wrong) and all(
        name in parameters and any(_equal(value, possible) for possible in parameters[name])
        for name, value in arguments.items()
    )


def _equal(value: Any, possible: Any) -> bool:
    """Check whether a value is a possible one. An object's possible values are lists, as those of parameters are."""
    if isinstance(value, str) and isinstance(possible, str):
        return _standard(value) == _standard(possible)
    if isinstance(value, dict) and isinstance(possible, dict):
        return _fits(value, {name: v if isinstance(v, list) else [v] for name, v in possible.items()})
    if isinstance(value, list) and isinstance(possible, list):
        return len(value) == len(possible) and all(map(_equal, value, possible))
    return isinstance(value, bool) == isinstance(possible, bool) and bool(value == possible)


def _standard(text: str) -> str:
    return INSIGNIFICANT.sub("", text).lower().replace("'", '"')
