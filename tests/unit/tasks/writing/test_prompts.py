"""What rows begin with: shipped prompts in the base's own template, or beginnings of texts."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from requant.tasks.errors import RecipeError
from requant.tasks.texts.rows import read_rows
from requant.tasks.validating.model import load_tokenizer
from requant.tasks.writing.prompts import NO_PROMPT, PROMPTS, find_starts
from requant.tasks.writing.rows import Start
from tests.factories.paths import TINY

ROWS = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
CHATS = [row for row in ROWS if "messages" in row]


def starts(base: Path, folder: Path, row_tokens: int = 1024) -> tuple[list[Start], str]:
    return find_starts(base, load_tokenizer(base), folder, row_tokens=row_tokens)


def with_template(folder: Path, template: str | None) -> Path:
    """The tiny base's tokenizer and config with another chat template, or none."""
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY / name, folder / name)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return folder


def test_the_shipped_prompts_cover_every_domain_and_are_rows_that_are_read() -> None:
    assert 150 <= len(CHATS) <= 300 and PROMPTS.stat().st_size < 60_000
    assert len(list(read_rows([PROMPTS], chats=True))) == len(ROWS)
    counts = Counter(row["domain"] for row in CHATS)
    assert counts.keys() == {"prose", "code", "math", "chat", "languages", "tools"} and min(counts.values()) >= 25
    assert counts.keys() - {"tools"} == {row["domain"] for row in ROWS if "text" in row}
    assert len({json.dumps(row) for row in ROWS}) == len(ROWS)
    assert all(row["tools"] for row in CHATS if row["domain"] == "tools")
    assert all(row["messages"][-1]["role"] in {"user", "tool"} for row in CHATS), "the base has the next word"


@pytest.mark.usefixtures("quick_rendering")
def test_chats_end_where_the_base_is_to_answer_in_its_own_template(tmp_path: Path) -> None:
    found, summary = starts(TINY, tmp_path)
    tokenizer = load_tokenizer(TINY)
    texts = [tokenizer.decode(start.tokens) for start in found]
    assert summary == f"{len(CHATS)} chats through the base's chat template"
    assert len(texts) == len(CHATS) and all(text.endswith("<|im_start|>assistant\n") for text in texts)
    assert {start.domain for start in found} == {row["domain"] for row in CHATS}


@pytest.mark.usefixtures("quick_rendering")
def test_a_template_gets_the_schemas_of_tools(tmp_path: Path) -> None:
    template = "{% if tools %}TOOLS {{ tools | tojson }}{% endif %}{{ messages[-1].content }}"
    found, _ = starts(with_template(tmp_path / "base", template), tmp_path / "work", row_tokens=4096)
    tokenizer = load_tokenizer(TINY)
    tools = [tokenizer.decode(start.tokens) for start in found if start.domain == "tools"]
    assert len(tools) == 28 and all("get_weather" in text or text.startswith("TOOLS") for text in tools)
    assert not any(tokenizer.decode(s.tokens).startswith("TOOLS") for s in found if s.domain != "tools")


@pytest.mark.usefixtures("quick_rendering")
def test_chats_that_the_template_refuses_are_left_out(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
        "[{{ m.content }}]{% endfor %}"
    )
    found, summary = starts(with_template(tmp_path / "base", template), tmp_path / "work")
    refused = sum(any(m["role"] == "tool" for m in row["messages"]) for row in CHATS)
    assert refused and len(found) == len(CHATS) - refused
    assert f"its template refuses {refused} more" in summary


@pytest.mark.usefixtures("quick_rendering")
def test_a_base_without_a_template_goes_on_with_beginnings_and_with_nothing(tmp_path: Path) -> None:
    base = with_template(tmp_path / "base", None)
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["bos_token_id"] = 1
    (base / "config.json").write_text(json.dumps(config))
    found, summary = starts(base, tmp_path / "work")
    assert summary == "beginnings" and found[-1] == Start(NO_PROMPT, (1,))
    texts = {load_tokenizer(TINY).decode(start.tokens) for start in found[:-1]}
    assert "The harbor was quiet when" in texts and not any("<|im_start|>" in text for text in texts)


@pytest.mark.usefixtures("quick_rendering")
def test_rows_too_short_for_any_prompt_are_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"quantize.seqlen 8 leaves no room .* raise it"):
        starts(TINY, tmp_path, row_tokens=8)
