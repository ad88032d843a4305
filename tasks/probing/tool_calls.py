"""The tool calls in an answer, in the forms in which chat templates teach models to write them.

The raw text is read, not what a server's parser makes of it: so the model is judged, and no flag of a server. Sources:
the parsers of vLLM 0.32 in vllm/tool_parsers (hermes, qwen3coder, glm4_moe, llama, mistral, deepseekv3, deepseekv31,
kimi_k2, openai).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

NAME = r"[\w.\-/:]{1,200}"
HERMES = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
QWEN_FUNCTION = re.compile(rf"<function=({NAME})>(.*?)(?P<end></function>|\Z)", re.DOTALL)
QWEN_PARAMETER = re.compile(r"<parameter=([^>\n]{1,200})>\n?(.*?)\n?</parameter>", re.DOTALL)
GLM_NAME = re.compile(rf"\s*({NAME})\s*(?=<arg_key>|\Z)")
GLM_ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
MISTRAL_NAMED = re.compile(rf"({NAME})(?:\[CALL_ID\][^\[]{{0,80}})?(?:\[ARGS\])?\s*(?=\{{)")
# DeepSeek's marks are written with a full-width bar and a low block.
CALL_BEGIN, CALL_END, SEPARATOR = (
    f"<\uff5ctool\u2581{word}\uff5c>" for word in ("call\u2581begin", "call\u2581end", "sep")
)
DEEPSEEK = re.compile(
    rf"{CALL_BEGIN}(?:function{SEPARATOR})?({NAME})(?:{SEPARATOR}|\n```json\n|\s)(.*?)(?:{CALL_END}|\Z)", re.DOTALL
)
KIMI = re.compile(
    rf"<\|tool_call_begin\|>\s*({NAME})\s*<\|tool_call_argument_begin\|>(.*?)(?:<\|tool_call_end\|>|\Z)", re.DOTALL
)
HARMONY = re.compile(rf"to=functions\.({NAME}).{{0,80}}?<\|message\|>(.*?)(?:<\|call\|>|\Z)", re.DOTALL)
FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*(?:```|\Z)", re.DOTALL)
ARGUMENT_KEYS = ("arguments", "parameters")
DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class ToolCall:
    """A call that an answer has.

    name: of the function; arguments: by parameter, None if the call is malformed; as_text: whether the form writes all
    arguments as text, so that the types are the schema's.
    """

    name: str
    arguments: Mapping[str, Any] | None
    as_text: bool = False


MALFORMED = ToolCall("", None)


def read_calls(text: str) -> list[ToolCall]:
    """Read all calls of an answer, which has no thought. A call that is begun and not well formed has no arguments."""
    for marker, read in FORMS.items():
        if marker in text:
            return read(text)
    return _bare(text)


def _hermes(text: str) -> list[ToolCall]:
    """Read `<tool_call>{"name": ..., "arguments": ...}</tool_call>`, and what Qwen3-Coder and GLM write in the tag."""
    calls: list[ToolCall] = []
    for body in HERMES.findall(text):
        if "<function=" in body:
            calls += _qwen_coder(body)
        elif body.lstrip().startswith("{"):
            calls.append(_from_object(_json(body)))
        else:
            name = GLM_NAME.match(body)
            calls.append(ToolCall(name[1], dict(GLM_ARGUMENT.findall(body)), as_text=True) if name else MALFORMED)
    return calls


def _qwen_coder(text: str) -> list[ToolCall]:
    found = QWEN_FUNCTION.findall(text)
    return [
        ToolCall(name, dict(QWEN_PARAMETER.findall(body)), as_text=True) if end else MALFORMED
        for name, body, end in found
    ] or [MALFORMED]


def _mistral(text: str) -> list[ToolCall]:
    """Read `[TOOL_CALLS][{...}, ...]`, and `[TOOL_CALLS]name[ARGS]{...}` of later tokenizers."""
    calls: list[ToolCall] = []
    for body in text.split("[TOOL_CALLS]")[1:]:
        named = MISTRAL_NAMED.match(body.strip())
        if named:
            calls.append(ToolCall(named[1], _mapping(_json(body.strip()[named.end() :]))))
        else:
            listed = _json(body)
            calls += [_from_object(one) for one in listed] if isinstance(listed, list) else [_from_object(listed)]
    return calls


def _llama(text: str) -> list[ToolCall]:
    return _objects(text.replace("<|python_tag|>", ""))


def _pairs(pattern: re.Pattern[str]) -> Callable[[str], list[ToolCall]]:
    """Return the reader of a form that writes the name and then a JSON object."""

    def read(text: str) -> list[ToolCall]:
        found = pattern.findall(text)
        return [ToolCall(_plain_name(name), _mapping(_json(_unfenced(body)))) for name, body in found] or [MALFORMED]

    return read


# By the text that begins a call in each form. The first one that an answer has is read.
FORMS: dict[str, Callable[[str], list[ToolCall]]] = {
    "<tool_call>": _hermes,
    "<function=": _qwen_coder,
    "[TOOL_CALLS]": _mistral,
    CALL_BEGIN: _pairs(DEEPSEEK),
    "<|tool_call_begin|>": _pairs(KIMI),
    "to=functions.": _pairs(HARMONY),
    "<|python_tag|>": _llama,
}


def _bare(text: str) -> list[ToolCall]:
    """Read an answer that is nothing but JSON objects with a name and arguments, as Llama 3 writes calls."""
    stripped = _unfenced(text.strip())
    return _objects(stripped) if stripped.startswith(("{", "[")) and '"name"' in stripped else []


def _objects(text: str) -> list[ToolCall]:
    """Read JSON objects that follow each other, with or without semicolons, or a list of them."""
    calls: list[ToolCall] = []
    rest = text.strip()
    while rest:
        try:
            value, end = DECODER.raw_decode(rest)
        except (ValueError, RecursionError):
            return calls or [MALFORMED]  # words behind calls are no call
        calls += [_from_object(one) for one in value] if isinstance(value, list) else [_from_object(value)]
        rest = rest[end:].lstrip("; \n\t,")
    return calls


def _from_object(value: Any) -> ToolCall:
    """Make a call of an object with a name and arguments."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return MALFORMED
    arguments = next((value[key] for key in ARGUMENT_KEYS if key in value), None)
    if isinstance(arguments, str):
        arguments = _json(arguments)
    return ToolCall(value["name"], _mapping(arguments))


def _json(text: str) -> Any:
    """Read the JSON value at the beginning of a text; None if there is none."""
    try:
        return DECODER.raw_decode(text.strip())[0]
    except (ValueError, RecursionError):
        return None


def _mapping(value: Any) -> Mapping[str, Any] | None:
    return value if isinstance(value, dict) else None


def _unfenced(text: str) -> str:
    fenced = FENCE.match(text.strip())
    return fenced[1] if fenced else text


def _plain_name(name: str) -> str:
    """Return a name without the prefix and the number that Kimi writes: `functions.NAME:0`."""
    return re.sub(r":\d{1,6}$", "", name.removeprefix("functions."))
