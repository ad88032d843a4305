"""The built-in mixed texts: what they hold, and what their README says of it."""

from __future__ import annotations

import functools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from requant.tasks.planning.texts import MAX_CHARACTERS_PER_BUILTIN_TOKEN
from requant.tasks.texts.text import BUILTIN_FOLDER

CALIBRATION, EVALUATION = "mixed.jsonl", "mixed-evaluation.jsonl"
FILES = (CALIBRATION, EVALUATION)
DOMAINS = ("prose", "code", "math", "chat", "languages", "tools")
MAX_BYTES = {CALIBRATION: 3_000_000, EVALUATION: 450_000}
MIN_EVALUATION_TOKENS = 9_500  # of each domain, so that 8,192 can be measured with every vocabulary
PROGRAMMING = {"python", "c", "cpp", "rust", "go", "java", "javascript", "typescript", "sql", "shell", "css"}
NATURAL = {"zh", "es", "fr", "de", "ja", "ru", "ar", "pt", "hi", "ko"}
KEYS = {"domain", "language", "text", "messages", "tools"}
SHARED_WORDS = 13
# Chinese, Japanese, Korean and Thai do not separate words, so that each of their characters counts as one.
WORD = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af]|\S+")
ADDRESS = re.compile(r"[\w.+-]+@[\w-]+\.[\w.-]+")
# UTF-8 that was read as Latin-1, and characters that could not be decoded.
MOJIBAKE = re.compile("[\u00c2\u00c3][\u0080-\u00bf]|\u00e2\u20ac|[\ufffd\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


@functools.cache
def rows(name: str) -> tuple[dict[str, Any], ...]:
    return tuple(json.loads(line) for line in (BUILTIN_FOLDER / name).read_text(encoding="utf-8").splitlines())


def everything() -> list[tuple[str, int, dict[str, Any]]]:
    return [(name, number, row) for name in FILES for number, row in enumerate(rows(name), 1)]


def content(row: dict[str, Any]) -> str:
    """All that a row says, with its tools."""
    parts = [row.get("text", "")]
    for message in row.get("messages", ()):
        parts += [message.get("reasoning_content", ""), message["content"]]
        parts += [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    return "\n".join([*parts, *(json.dumps(tool, ensure_ascii=False) for tool in row.get("tools", ()))])


def calls(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [call for message in row.get("messages", ()) for call in message.get("tool_calls", ())]


def grams(text: str) -> Iterator[tuple[str, ...]]:
    words = WORD.findall(text.lower())
    return (tuple(words[i : i + SHARED_WORDS]) for i in range(len(words) - SHARED_WORDS + 1))


@pytest.mark.parametrize("name", FILES)
def test_every_domain_is_there_and_the_file_is_small(name: str) -> None:
    assert (BUILTIN_FOLDER / name).stat().st_size <= MAX_BYTES[name]
    assert set(DOMAINS) | ({"long_context"} if name == EVALUATION else set()) == {row["domain"] for row in rows(name)}


def test_no_domain_of_the_calibration_is_much_larger_than_another() -> None:
    tokens = counted()[CALIBRATION]
    assert max(tokens[domain][2] for domain in DOMAINS) < 2 * min(tokens[domain][2] for domain in DOMAINS)


@pytest.mark.parametrize("name", FILES)
def test_there_are_many_languages_and_programming_languages(name: str) -> None:
    of = defaultdict(set)
    for row in rows(name):
        of[row["domain"]].add(row.get("language"))
    assert of["code"] >= PROGRAMMING | ({"html", "json", "yaml"} if name == CALIBRATION else set())
    assert of["languages"] >= NATURAL and not of["languages"] & {"en", None}
    assert len({row["language"] for row in rows(name) if row["domain"] == "languages" and "messages" in row}) >= 5


def test_rows_have_a_text_or_messages_and_no_other_keys() -> None:
    for name, number, row in everything():
        assert set(row) <= KEYS and ("text" in row) != ("messages" in row), (name, number)
        assert ("tools" in row) == (row["domain"] == "tools"), (name, number)
        assert content(row).strip(), (name, number)


def test_roles_take_turns_as_chat_templates_expect_it() -> None:
    for name, number, row in everything():
        if "messages" not in row:
            continue
        where, messages = (name, number), row["messages"]
        roles = "".join(message["role"][0] for message in messages)
        # Each round of calls is followed by its results; a round of calls is an assistant's message too.
        assert re.fullmatch(r"s?(u(at+)*a)+", roles), (where, roles)
        for message, after in zip(messages, [*messages[1:], None], strict=True):
            assert isinstance(message["content"], str), where
            assert message["content"] or "tool_calls" in message, where
            assert ("tool_calls" in message) == (
                message["role"] == "assistant" and after is not None and after["role"] == "tool"
            )
            assert message["role"] == "assistant" or set(message) <= {"role", "content", "tool_call_id", "name"}, where


@functools.cache
def validator(schema: str) -> jsonschema.Draft202012Validator:
    """Check a schema of parameters, given as JSON, and return what checks arguments; other arguments do not fit."""
    parameters = json.loads(schema)
    jsonschema.Draft202012Validator.check_schema(parameters)
    assert parameters["type"] == "object"
    return jsonschema.Draft202012Validator({**parameters, "additionalProperties": False})


def test_calls_name_a_tool_of_their_row_with_arguments_that_fit_its_schema() -> None:
    for name, number, row in everything():
        functions = {}
        for tool in row.get("tools", ()):
            assert set(tool) == {"type", "function"} and tool["type"] == "function", (name, number)
            assert tool["function"]["description"], (name, number)
            functions[tool["function"]["name"]] = validator(json.dumps(tool["function"]["parameters"]))
        assert len(functions) == len(row.get("tools", ())), (name, number)
        for call in calls(row):
            assert call["type"] == "function" and set(call["function"]) == {"name", "arguments"}, (name, number)
            functions[call["function"]["name"]].validate(call["function"]["arguments"])


def test_every_call_has_a_result_with_its_identifier() -> None:
    """Mistral's chat templates refuse identifiers that have not nine letters and digits."""
    for name, number, row in everything():
        expected = [(call["id"], call["function"]["name"]) for call in calls(row)]
        assert all(re.fullmatch(r"[A-Za-z0-9]{9}", identifier) for identifier, _ in expected), (name, number)
        assert len({identifier for identifier, _ in expected}) == len(expected), (name, number)
        results = [m for m in row.get("messages", ()) if m["role"] == "tool"]
        assert [(m["tool_call_id"], m["name"]) for m in results] == expected, (name, number)


@pytest.mark.parametrize("name", FILES)
def test_tools_are_called_in_many_ways(name: str) -> None:
    of_tools = [row for row in rows(name) if row["domain"] == "tools"]
    kinds = Counter()
    for row in of_tools:
        rounds = [len(message["tool_calls"]) for message in row["messages"] if "tool_calls" in message]
        users = sum(message["role"] == "user" for message in row["messages"])
        kinds += Counter(none=not rounds, parallel=max(rounds, default=0) > 1, chain=len(rounds) > 1, turns=users > 1)
    assert all(kinds[kind] >= 3 for kind in ("none", "parallel", "chain", "turns")), kinds
    assert len({tool["function"]["name"] for row in of_tools for tool in row["tools"]}) >= 20


@pytest.mark.parametrize("domain", ["chat", "math", "tools"])
def test_some_answers_are_thought_about(domain: str) -> None:
    thought = [
        m
        for _, _, row in everything()
        if row["domain"] == domain
        for m in row.get("messages", ())
        if "reasoning_content" in m
    ]
    assert len(thought) >= 10 and all(m["role"] == "assistant" and m["reasoning_content"].strip() for m in thought)


def test_no_thirteen_words_in_a_row_are_in_both_texts() -> None:
    known = {hash(gram) for row in rows(CALIBRATION) for gram in grams(content(row))}
    known |= {hash(gram) for gram in grams((BUILTIN_FOLDER / "python.txt").read_text(encoding="utf-8"))}
    for number, row in enumerate(rows(EVALUATION), 1):
        shared = next((gram for gram in grams(content(row)) if hash(gram) in known), None)
        assert shared is None, (number, row["domain"], shared)


def test_the_texts_are_clean() -> None:
    for name, number, row in everything():
        said = content(row)
        assert not (found := MOJIBAKE.search(said)), (name, number, found)
        assert all("example." in address for address in ADDRESS.findall(said)), (name, number, ADDRESS.findall(said))
        assert "all rights reserved" not in said.lower(), (name, number)


def test_the_long_context_has_documents_that_fill_a_window() -> None:
    documents = [len(content(row)) for row in rows(EVALUATION) if row["domain"] == "long_context"]
    tokens = counted()[EVALUATION]["long_context"][2]
    assert 1 <= len(documents) <= 2
    assert all(length / sum(documents) * tokens >= MIN_EVALUATION_TOKENS * 0.9 for length in documents)


def counted() -> dict[str, dict[str, tuple[int, ...]]]:
    """The README's numbers of rows, bytes and tokens, by file and domain."""
    table = re.findall(r"^\| `(\w+)` \|([\d,| ]+)\|$", (BUILTIN_FOLDER / "README.md").read_text(), re.MULTILINE)
    numbers: dict[str, dict[str, tuple[int, ...]]] = {name: {} for name in FILES}
    for domain, line in table:
        cells = [cell.strip().replace(",", "") for cell in line.split("|")]
        for name, part in zip(FILES, (cells[:3], cells[3:]), strict=True):
            if all(part):
                numbers[name][domain] = tuple(map(int, part))
    return numbers


@pytest.mark.parametrize("name", FILES)
def test_the_readme_counts_what_is_there(name: str) -> None:
    found: dict[str, tuple[int, int]] = {}
    for line in (BUILTIN_FOLDER / name).read_bytes().splitlines(keepends=True):
        domain = json.loads(line)["domain"]
        count, size = found.get(domain, (0, 0))
        found[domain] = (count + 1, size + len(line))
    assert {domain: numbers[:2] for domain, numbers in counted()[name].items()} == found


@pytest.mark.parametrize("name", FILES)
def test_no_domain_has_more_characters_per_token_than_the_plan_assumes(name: str) -> None:
    characters = Counter[str]()
    for row in rows(name):
        characters[row["domain"]] += len(content(row))
    for domain, (_, _, tokens) in counted()[name].items():
        assert 1 < characters[domain] / tokens < MAX_CHARACTERS_PER_BUILTIN_TOKEN, domain


def test_each_domain_can_be_measured_on_8192_tokens() -> None:
    assert all(tokens >= MIN_EVALUATION_TOKENS for _, _, tokens in counted()[EVALUATION].values())


def test_the_readme_names_a_source_for_each_domain_and_programming_language() -> None:
    sources = (BUILTIN_FOLDER / "README.md").read_text().partition("## Sources")[2]
    for domain in (*DOMAINS, "long_context"):
        assert re.search(rf"^\| {domain}\b", sources, re.MULTILINE), domain
    licenses = (BUILTIN_FOLDER / "LICENSES.txt").read_text()
    for row in re.findall(r"^\|.*\| [^|]*(?:MIT|Apache|BSD|PostgreSQL)[^|]* \|$", sources, re.MULTILINE):
        versions = re.findall(r"\d+(?:\.\d+)*(?=[ ,;:)|])", row)
        assert all(re.search(rf" {re.escape(version)}\b", licenses) for version in versions), row
