"""Chats through the base's chat template, which a stranger wrote: in a process of its own, within bounds."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from requant.tasks.errors import CheckpointError, RecipeError, StageTimeout
from requant.tasks.texts import rendering, rendering_child
from requant.tasks.texts.documents import Document, read_documents
from requant.tasks.texts.forms import Message, Row
from requant.tasks.texts.rendering import ReadingLimit, Rendered, render
from requant.tasks.texts.rendering_child import RenderingJob, Template, TemplateTimeout
from tests.factories.paths import TINY
from tests.factories.sites import give_secrets, secrets_given

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
MESSAGES = Row(messages=tuple(map(Message, CHAT)))
PLAIN = "user: hi\n\nassistant: ho"


class Jinja:
    """A tokenizer of one token a character, with transformers' own sandbox behind its chat template."""

    def __init__(self, template: str) -> None:
        self.chat_template = template

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert add_special_tokens is False, "a template writes the special tokens itself"
        return {"input_ids": [ord(c) for c in text]}

    def apply_chat_template(self, messages: list[dict[str, Any]], tokenize: bool, tools: Any = None) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        assert tokenize is False
        (text,), _ = render_jinja_template([messages], tools=tools, chat_template=self.chat_template)
        return str(text)


def rendered(folder: Path, *rows: Any, model: Path = TINY, **options: Any) -> tuple[Rendered, list[str]]:
    """What the process makes of these rows: its answer, and the documents."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = render(model, [path], folder / "work", name="my text", **options)
    return found, [json.loads(line)["text"] for line in found.path.read_text().splitlines()]


def test_chats_become_what_the_bases_template_makes_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, as in a run. It does not wait for torch, which a tokenizer has no use for."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "torch.py").write_text("raise SystemExit('torch was imported')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    found, documents = rendered(tmp_path, {"text": "x = 1", "domain": "code"}, {"messages": CHAT, "domain": "chat"})
    assert documents == ["x = 1", "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>\n"]
    assert (found.templated, found.plain) == (1, 0) and "through the base's chat template" in found.summary
    assert found.tokens.keys() == {"code", "chat"}
    assert found.tokens["chat"] < len(documents[1]) / 2  # a special token is one token


@pytest.mark.usefixtures("quick_rendering")
def test_a_base_without_a_template_has_plain_chats_and_it_is_said(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY / name, model / name)
    found, documents = rendered(tmp_path, {"messages": CHAT}, model=model)
    assert documents == [PLAIN]
    assert found.summary.endswith("1 as plain `role: content` (the base has no chat template)")


@pytest.mark.usefixtures("quick_rendering")
def test_what_is_wrong_with_rows_or_tokenizer_is_told_by_the_process(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the rows of my text have the columns words"):
        rendered(tmp_path, {"words": "a"})
    (tmp_path / "model").mkdir()
    with pytest.raises(CheckpointError, match="the tokenizer of the base cannot be loaded"):
        rendered(tmp_path, {"text": "a"}, model=tmp_path / "model")


def test_the_process_has_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give_secrets(tmp_path, monkeypatch)
    with pytest.raises(CheckpointError, match="ended early"):
        rendered(tmp_path, {"messages": CHAT})
    assert secrets_given(tmp_path / "work") == []


HOSTILE = {
    "refuses": ("{{ raise_exception('roles must alternate') }}", "refuses it: TemplateError: roles must alternate"),
    "reaches for Python": ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "is no template": ("{% if", "TemplateSyntaxError"),
    "makes nothing": ("", "no chat template"),
    "makes blanks": ("   ", "makes nothing of a chat"),
    "makes far too much": ("{{ 'a' * 1000000 }}", "makes 1,000,000 characters of a chat"),
    "names what is not there": ("{{ messages[99].content.text }}", "UndefinedError"),
    "moves the cursor": ("{{ raise_exception('\x1b[2J') }}", "'\\x1b[2J'"),
}


@pytest.mark.parametrize(("template", "reason"), HOSTILE.values(), ids=HOSTILE)
def test_a_template_that_fails_leaves_a_plain_chat_and_a_reason(template: str, reason: str) -> None:
    tokenizer = Jinja(template)
    found = Template(tokenizer, rendering_child._explain_missing(tokenizer))
    assert found.chat(MESSAGES) == PLAIN
    assert (found.templated, found.plain) == (0, 1)
    assert reason in found.reason and found.reason.isprintable()


def test_one_chat_that_the_template_refuses_is_plain_and_the_others_are_not() -> None:
    found = Template(Jinja("{% if messages|length != 2 %}{{ raise_exception('odd') }}{% endif %}<2>"))
    short = replace(MESSAGES, messages=MESSAGES.messages[:1])
    assert [found.chat(chat) for chat in (MESSAGES, short, MESSAGES)] == ["<2>", "user: hi", "<2>"]
    assert (found.templated, found.plain) == (2, 1)


def test_a_template_that_does_not_end_is_left_out_for_every_chat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering_child, "CHAT_LIMIT_S", 0.2)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer = Jinja("{% if messages|length == 1 %}" + loop + "{% endif %}fine")
    with pytest.raises(TemplateTimeout):
        Template(tokenizer).chat(replace(MESSAGES, messages=MESSAGES.messages[:1]))
    assert Template(tokenizer).chat(MESSAGES) == "fine"
    monkeypatch.setattr(rendering_child, "_tokenizer", lambda folder, remote_code: tokenizer)
    monkeypatch.setattr(rendering_child.resource, "setrlimit", lambda *_: None)  # this is not a process of its own
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in (CHAT, CHAT[:1])))
    job = RenderingJob("m", [str(rows)], str(tmp_path / "out"), "t", chats=True, remote_code=False)
    answer = rendering_child.render_text(job)
    assert (answer.templated, answer.plain) == (0, 2) and "took over 0.2 s" in answer.reason
    assert [json.loads(line)["text"] for line in (tmp_path / "out").read_text().splitlines()] == [PLAIN, "user: hi"]


def test_chats_that_take_the_template_too_long_together_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0.0, rendering_child.TEXT_LIMIT_S * 0.6)  # is read before a chat and after it
    monkeypatch.setattr(rendering_child.time, "process_time", lambda: next(clock))
    found = Template(Jinja("fine"))
    assert [found.chat(MESSAGES) for _ in range(2)] == ["fine"] * 2
    with pytest.raises(TemplateTimeout):
        found.chat(MESSAGES)


class Frozen(Jinja):
    """A tokenizer whose process stands still in the middle of every chat, as on a machine that swaps."""

    def apply_chat_template(self, messages: list[dict[str, Any]], tokenize: bool) -> str:
        threading.Event().wait(0.1)
        return super().apply_chat_template(messages, tokenize)


@pytest.mark.parametrize("limit", ["CHAT_LIMIT_S", "TEXT_LIMIT_S"])
def test_a_machine_that_stands_still_makes_no_chat_plain(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Jinja("fine").apply_chat_template(CHAT, tokenize=False)  # what is loaded once takes no part of the time
    monkeypatch.setattr(rendering_child, limit, 0.05)
    found = Template(Frozen("fine"))
    assert [found.chat(MESSAGES) for _ in range(3)] == ["fine"] * 3
    assert (found.templated, found.plain) == (3, 0)


def test_a_process_that_the_clock_ends_is_tried_again_and_makes_nothing_plain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "TIMEOUT_S", 0.01)
    with pytest.raises(StageTimeout, match=r"reading my text took over 0\.01 s") as caught:
        rendered(tmp_path, {"messages": CHAT})
    assert caught.value.retryable and not (tmp_path / "work" / "documents.jsonl").exists()


SCHEMA = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.mark.usefixtures("quick_rendering")
def test_tools_beside_a_chat_go_to_the_bases_template(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY / name, model / name)
    (model / "chat_template.jinja").write_text(
        "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{{ messages|length }}"
    )
    rows = {"messages": CHAT, "tools": json.dumps([SCHEMA])}, {"messages": CHAT}
    found, documents = rendered(tmp_path, *rows, model=model)
    assert documents == [f"{json.dumps(SCHEMA)}2", "2"] and found.templated == 2


@pytest.mark.usefixtures("quick_rendering")
def test_a_chat_longer_than_a_sample_is_known_by_its_turns(tmp_path: Path) -> None:
    def documents(limit: int) -> list[Document]:
        rows = {"messages": CHAT * 3}, {"text": "x " * 99}
        found, _ = rendered(tmp_path, *rows, limit=ReadingLimit(sample_tokens=limit))
        return list(read_documents(found.path))

    whole, text = documents(1000)
    assert whole.chat and whole.turns == () and not text.chat and len(whole.tokens) == 1
    cut, text = documents(10)
    assert cut.text == whole.text and text.turns == ()
    assert [piece.startswith("<|im_start|>") for piece in cut.pieces] == [True] * 6
    assert sum(cut.tokens) == whole.tokens[0]


def test_a_template_that_writes_earlier_turns_otherwise_has_fewer_of_them() -> None:
    """As templates do that take the thoughts out of all answers but the last one."""
    last = "{% for m in messages %}<{{ m.role }}>{% if loop.last %}!{% endif %}{{ m.content }}{% endfor %}"
    row = Row(messages=tuple(map(Message, CHAT * 3)))
    always = Template(Jinja("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"))
    text = always.chat(row)
    assert [text[at:].startswith("<") for at in always.turns(row, text)] == [True] * 5
    other = Template(Jinja(last))
    assert other.turns(row, other.chat(row)) == () and other.reason == ""
    plain = Template(Jinja(""), "no template")
    text = plain.chat(row)
    assert [text[at:][:8] for at in plain.turns(row, text)] == ["\n\nassist", "\n\nuser: "] * 2 + ["\n\nassist"]


def test_the_turns_of_a_chat_of_thousands_of_messages_are_few() -> None:
    row = Row(messages=tuple(map(Message, CHAT * 2000)))
    template = Template(Jinja("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"))
    assert len(template.turns(row, template.chat(row))) == rendering_child.MAX_TURNS - 1
