"""The forms that rows of data sets have, and what is read of each: a text, or the messages of a chat.

A row may have the columns of several forms. The first form of FORMS whose columns are filled is read, so a row with a
`text` is a text whatever else it has. A recipe can name one column instead (`field`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from requant.tasks.checkpoint.untrusted import shown

# The columns of each form by precedence, and of each column the names that data sets give it. All columns of a form
# must be filled but those in OPTIONAL.
Form = tuple[tuple[str, ...], ...]
FORMS: Mapping[str, Form] = {
    "text": (("text",),),
    "messages": (("messages",),),
    "conversations": (("conversations", "conversation"),),
    "prompt": (("prompt",), ("completion", "response")),
    "instruction": (("instruction",), ("output", "response")),
    "question": (("question",), ("answer", "answers", "response")),
}
# What the user adds to an instruction, and what stands before a chat: a system prompt, and schemas of tools.
INPUT = ("input", "context")
SYSTEM = ("system", "system_prompt")
TOOLS = "tools"
DOMAIN = "domain"
COLUMNS = tuple(dict.fromkeys(name for form in FORMS.values() for names in form for name in names))
READ_COLUMNS = (*COLUMNS, *INPUT, *SYSTEM, TOOLS, DOMAIN)
FORM_WORDS = "text, messages, conversations, prompt and completion, instruction and output, or question and answer"
# Authors of ShareGPT's conversations, in the words of the data sets that follow it. `function_call` is a call in JSON.
AUTHORS = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "model": "assistant", "bot": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
SURROGATES = re.compile("[\ud800-\udfff]")
MAX_SHOWN_COLUMNS = 20
MAX_MESSAGES = 10_000
MAX_TOOLS = 1_000


@dataclass(frozen=True)
class Message:
    """A message of a chat. A chat template gets `fields`, which may have more keys than `role` and `content`."""

    fields: Mapping[str, Any]

    @property
    def role(self) -> str:
        """The role of its author, for instance `user`."""
        return str(self.fields["role"])

    @property
    def text(self) -> str:
        """Its content, or of a content in several parts those that are text."""
        content = self.fields.get("content")
        if isinstance(content, list):
            parts = (part.get("text") for part in content if isinstance(part, dict))
            return "".join(part for part in parts if isinstance(part, str))
        return content if isinstance(content, str) else ""


@dataclass(frozen=True)
class Row:
    """A document: a text, or the messages of a chat and the schemas of its tools; and its domain, if it names one."""

    text: str = ""
    messages: Sequence[Message] = ()
    domain: str = ""
    tools: Sequence[Mapping[str, Any]] = ()

    @property
    def characters(self) -> int:
        """The length of the text or of all messages, without what a chat template adds."""
        return len(self.text) + sum(len(message.text) for message in self.messages)

    @property
    def size(self) -> int:
        """The length of all that a chat template may write, as JSON: also tool calls and tools."""
        return len(json.dumps([[dict(message.fields) for message in self.messages], [*self.tools]], default=str))


def form_of(columns: Collection[str]) -> str | None:
    """Return the first form whose columns are all among these; None if there is none."""
    return next((form for form, parts in FORMS.items() if all(set(names) & set(columns) for names in parts)), None)


def is_chat(columns: Mapping[str, Any], field: str | None = None) -> bool:
    """Check whether a row would be read as a chat: it fills a form of FORMS other than text before it has a text."""
    if field is not None:
        return isinstance(columns.get(field), list)
    return form_of([name for name, value in columns.items() if not _empty(value)]) not in {None, "text"}


def parse_row(columns: Mapping[str, Any], field: str | None = None, *, chats: bool = True) -> Row | None:
    """Read a row as the first form that it fills, or its column `field`; return None if there is nothing in it.

    Without `chats`, a row that is a chat is passed over too. Raises ValueError for a value of a wrong type: what was
    expected, and what there is.
    """
    if not chats and is_chat(columns, field):
        return None
    domain = columns.get(DOMAIN)
    domain = domain if isinstance(domain, str) else ""
    if field is not None:
        value = columns.get(field)
        return None if _empty(value) else _text_or_chat(field, value, columns, domain)
    for form, parts in FORMS.items():
        values = [_filled(columns, names) for names in parts]
        if any(value is None for value in values):
            continue
        match form:
            case "text":
                return Row(text=_string("text", values[0]), domain=domain)
            case "messages" | "conversations":
                return _chat(_messages(form, values[0]), columns, domain)
            case "prompt":
                return _chat([*_turns("prompt", values[0], "user"), *_turns("completion", values[1], "assistant")],
                             columns, domain)  # fmt: skip
            case "instruction":
                more = _filled(columns, INPUT)
                asked = [_string("instruction", values[0]), *([_string("input", more)] if more is not None else [])]
                return _question_and_answer("\n\n".join(asked), _string("output", values[1]), columns, domain)
            case "question":
                return _question_and_answer(_string(form, values[0]), _answer(values[1]), columns, domain)
    return None


def explain_unusable(
    name: str, columns: Sequence[str], field: str | None = None, *, skipped_chats: bool = False
) -> str:
    """Say in a sentence why no row of a text with these columns can be used.

    `skipped_chats` says that there are messages, and that the text was not read as chats.
    """
    if not columns:
        return f"{name} is empty: name a text with rows of {FORM_WORDS}"
    names = ", ".join(shown(column) for column in columns[:MAX_SHOWN_COLUMNS])
    if len(columns) > MAX_SHOWN_COLUMNS:
        names += f" and {len(columns) - MAX_SHOWN_COLUMNS} more"
    if field is not None and field not in columns:
        return f"the rows of {name} have the columns {names}, and none is called {shown(field)}: correct field"
    if skipped_chats:
        return (
            f"the rows of {name} (columns {names}) hold no text, and their messages are not read: a data set has "
            "chats if the first row of its first file has messages and no text column: mend that row, or "
            "name another text"
        )
    if field is not None or form_of(columns) is not None:
        wanted = shown(field) if field is not None else " or ".join(_columns_read(columns))
        return f"the rows of {name} (columns {names}) hold nothing in {wanted}: name another text"
    return (
        f"the rows of {name} have the columns {names}; a row needs {FORM_WORDS}: "
        "name one column with field, rename a column, or name another text"
    )


def plain_chat(messages: Sequence[Message]) -> str:
    """Write a chat without a chat template: `role: content`, with empty lines between the messages."""
    return "\n\n".join(f"{message.role}: {message.text}" for message in messages)


def _columns_read(columns: Collection[str]) -> list[str]:
    return [name for name in COLUMNS if name in columns]


def _empty(value: object) -> bool:
    """Check whether there is nothing in a value; nor is there in {"text": [], ...}, as SQuAD 2 has it for no answer."""
    if isinstance(value, dict):
        return all(map(_empty, value.values()))
    return value is None or value in ("", [])


def _filled(columns: Mapping[str, Any], names: Sequence[str]) -> Any:
    """Return the first value that is not empty of the columns with these names; None if there is none."""
    return next((columns[name] for name in names if not _empty(columns.get(name))), None)


def _string(column: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"a row has {type(value).__name__} as {shown(column)}, not a string")
    return value


def _answer(value: object) -> str:
    """Return an answer: a string, the first of a list, or the first `text` of SQuAD's {"text": [...]}."""
    if isinstance(value, dict):
        value = value.get("text")
    if isinstance(value, list) and value:
        value = value[0]
    return _string("answer", value)


def _text_or_chat(column: str, value: object, columns: Mapping[str, Any], domain: str) -> Row:
    if isinstance(value, list):
        return _chat(_messages(column, value), columns, domain)
    return Row(text=_string(column, value), domain=domain)


def _question_and_answer(question: str, answer: str, columns: Mapping[str, Any], domain: str) -> Row:
    return _chat([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], columns, domain)


def _turns(column: str, value: object, role: str) -> list[dict[str, Any]]:
    """Return a prompt or completion as messages: it is one already, or a string that `role` said."""
    return _messages(column, value) if isinstance(value, list) else [{"role": role, "content": _string(column, value)}]


def _chat(messages: list[dict[str, Any]], columns: Mapping[str, Any], domain: str) -> Row:
    system = _filled(columns, SYSTEM)
    if isinstance(system, str) and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return Row(messages=tuple(map(Message, messages)), domain=domain, tools=_tools(columns.get(TOOLS)))


def _messages(column: str, value: object) -> list[dict[str, Any]]:
    """Return messages as chat templates take them, from OpenAI's form or ShareGPT's."""
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise ValueError(f'{shown(column)} of a row must be a list of {{"role": ..., "content": ...}}')
    if len(value) > MAX_MESSAGES:
        raise ValueError(f"a row has {len(value):,} messages, and at most {MAX_MESSAGES:,} are read")
    return [_message(column, entry) for entry in value]


def _message(column: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return one message. Keys without a value are left out: Parquet gives every message the keys of all."""
    if isinstance(entry.get("role"), str):
        message = {key: value for key, value in entry.items() if value is not None or key == "content"}
        calls = message.get("tool_calls")
        if isinstance(calls, list):
            message["tool_calls"] = [_tool_call(call) for call in calls]
        return message
    author = entry.get("from")
    if not isinstance(author, str):
        raise ValueError(f'{shown(column)} of a row must be a list of {{"role": ..., "content": ...}}')
    if author not in AUTHORS:
        raise ValueError(f"a message is from {shown(author)}, and known are {', '.join(AUTHORS)}")
    said = entry.get("value")
    content = said if isinstance(said, str) else ""
    call = _json(content) if author == "function_call" else None
    if isinstance(call, dict | list):
        calls = call if isinstance(call, list) else [call]
        return {"role": "assistant", "content": "", "tool_calls": [_tool_call(one) for one in calls]}
    return {"role": AUTHORS[author], "content": content}


def _tool_call(call: object) -> object:
    """Return a tool call in OpenAI's form, with its arguments as an object, which every template can write.

    Templates of Llama 3 and Qwen 3 write an object as JSON, and those of Qwen 3 Coder and Qwen 3.5 iterate over it.
    """
    if not isinstance(call, dict):
        return call
    call = {key: value for key, value in call.items() if value is not None}
    function = call.get("function")
    inner = dict(function) if isinstance(function, dict) else {k: call[k] for k in ("name", "arguments") if k in call}
    given = inner.get("arguments")
    if isinstance(given, str) and isinstance(arguments := _json(given), dict):
        inner["arguments"] = arguments
    elif isinstance(given, dict):
        inner["arguments"] = _filled_only(given)
    kept = {key: value for key, value in call.items() if key not in {"name", "arguments"}}
    return {"type": "function", **kept, "function": inner}


def _tools(value: object) -> tuple[Mapping[str, Any], ...]:
    """Return the schemas of a chat's tools in OpenAI's form. Data sets hold them as a list or as JSON."""
    tools = _json(value)
    if _empty(tools):
        return ()
    tools = [*map(_json, tools)] if isinstance(tools, list) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("tools of a row must be a list of schemas, or the JSON of one")
    if len(tools) > MAX_TOOLS:
        raise ValueError(f"a row has {len(tools):,} tools, and at most {MAX_TOOLS:,} are read")
    filled = map(_filled_only, tools)
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in filled)


def _filled_only(value: Any) -> Any:
    """Return a JSON value without the keys that have none: Parquet gives every object of a column the same keys."""
    if isinstance(value, dict):
        return {key: _filled_only(inner) for key, inner in value.items() if inner is not None}
    return [_filled_only(inner) for inner in value] if isinstance(value, list) else value


def _json(value: object) -> object:
    """Return what a string has as JSON; any other value, and a string that is none, as it is."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return without_surrogates(json.loads(value))
    except (ValueError, RecursionError):
        return value


def without_surrogates(value: Any) -> Any:
    """Return a JSON value with U+FFFD for every half of a surrogate pair, which no file and no tokenizer takes.

    JSON can escape such a half alone. It is what remains of an emoji whose string was cut.
    """
    match value:
        case str():
            try:
                value.encode()
            except UnicodeEncodeError:
                return SURROGATES.sub("\ufffd", value)
            return value
        case dict():
            return {without_surrogates(key): without_surrogates(inner) for key, inner in value.items()}
        case list():
            return [without_surrogates(inner) for inner in value]
    return value
