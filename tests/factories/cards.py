"""Facts of a release, the cards that are made of them, and hostile cards of a base."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from html.parser import HTMLParser
from typing import Any

import yaml
from markdown_it import MarkdownIt

from requant.tasks.card.card import make_card
from requant.tasks.card.facts import CardFacts, FileFacts
from requant.tasks.hub.revision import Revision
from requant.tasks.recipe.loader import parse_recipe
from requant.tasks.recipe.recipe import Gates, Recipe
from requant.tasks.record import StageRecord
from requant.tasks.serving.result import BenchmarkResult
from requant.tasks.validating.gates import judge
from requant.tasks.validating.measured import Measured
from tests.factories.measured import GOOD

SHA = "0123456789abcdef0123456789abcdef01234567"


MEASURED: dict[str, Any] = {
    **GOOD,
    "packed": 13,
    "kept": 40,
    "head": 15,
    "tokens": 12288,
    "text": "builtin:python-evaluation",
    "perplexity": 3.14159,
    "perplexity_interval": [3.0, 3.3],
    "base_perplexity": 3.0,
    "perplexity_increase_interval": [0.005, 0.015],
    "mtp_acceptance_by_position": [0.871, 0.7],
    "base_mtp_acceptance_by_position": [0.894, 0.72],
    "greedy_acceptance_by_position": [0.91],
    "base_greedy_acceptance_by_position": [],
    "mtp_acceptance": 0.871,
    "base_mtp_acceptance": 0.894,
}


def recipe(**changes: Any) -> Recipe:
    return parse_recipe({"base": {"repo_id": "Qwen/Qwen3.6-27B"}, "publish": {"repo_id": "me/q-int4"}, **changes})


FACTS = CardFacts(
    recipe=recipe(),
    base=Revision("Qwen/Qwen3.6-27B", SHA, ()),
    files=FileFacts(
        digest="d" * 64,
        weights_bytes=18_000_000_000,
        base_weights_bytes=54_000_000_000,
        kept_names=("model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight", "mtp.fc.weight"),
        packing="auto_round:auto_gptq",
    ),
    measured=Measured.from_json(MEASURED),
    gates=judge(Measured.from_json(MEASURED), Gates()),
    benchmark=BenchmarkResult(engine="none"),
    provenance={
        "quantize": StageRecord({"seconds": 12.34, "tools": {"auto-round": "0.16.1"}, "settings": {"device": "H200"}})
    },
    version="0.1.0",
)


def facts_of(**changes: Any) -> CardFacts:
    """Change FACTS: fields of its own, or those of its files. `measured` and `benchmark` are given as documents."""
    if "measured" in changes:
        changes["measured"] = Measured.from_json(changes["measured"])
    if "benchmark" in changes:
        changes["benchmark"] = BenchmarkResult.model_validate(changes["benchmark"])
    files = {field.name for field in fields(FileFacts)} & changes.keys()
    of_files = {name: changes.pop(name) for name in files}
    return replace(FACTS, files=replace(FACTS.files, **of_files), **changes)


def card_of(base_card: str = "", **changes: Any) -> tuple[dict[str, Any], str]:
    """Front matter as the Hub reads it, and the text behind it."""
    card = make_card(facts_of(base_card=base_card, **changes))
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert match is not None
    document = yaml.safe_load(match[1])
    assert isinstance(document, dict)
    return document, card[match.end() :]


def base_card(front: str, body: str = "# Base") -> str:
    return f"---\n{front}\n---\n{body}\n"


HOSTILE = {
    "a script": base_card('license: "<script>alert(1)</script>"'),
    "a closing fence": base_card('license: "mit\\n---\\n# injected"'),
    "a line break": base_card('license: "mit\\nbase_model: evil/model"'),
    "a link in markdown": base_card('license: "[mit](javascript:alert(1))"'),
    "a mapping": base_card("license: {name: mit}"),
    "a list of mappings": base_card("license: [{a: b}]"),
    "an empty list": base_card("license: []"),
    "a number": base_card("license: 5"),
    "a date": base_card("license: 2020-01-01"),
    "null": base_card("license:"),
    "200 characters": base_card(f"license: {'a' * 200}"),
    "a python object": base_card("license: !!python/object/apply:os.system ['id']"),
    "a tag of its own": base_card("license: !secret mit"),
    "an impossible bool": base_card("license: !!bool perhaps"),
    "an empty integer": base_card("license: !!int ''"),
    "an impossible timestamp": base_card("license: !!timestamp x"),
    "an impossible date": base_card("license: 2020-13-45"),
    "an endless integer": base_card("license: " + "9" * 5000),
    "an unknown anchor": base_card("license: *x"),
    "a mapping in itself": base_card("a: &a {b: *a}\nlicense: *a"),
    "aliases that grow": base_card(
        "\n".join(["x0: &x0 [a, a, a, a]", *(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]" for i in range(1, 12))])
        + "\nlicense: *x11"
    ),
    "nested lists": base_card("license: " + "[" * 600),
    "not YAML": base_card("{{{{"),
    "a list as document": base_card("- license\n- mit"),
    "a word as document": base_card("license"),
    "not closed": "---\nlicense: mit\n",
    "in the text": "# Base\n---\nlicense: mit\n---\n",
    "100 kB": base_card("junk: " + "x" * 100_000 + "\nlicense: mit"),
    "control characters": base_card("license: \x07mit"),
    "NUL bytes": "\0" * 1000,
    "HTML": "<script>alert(1)</script><!-- --- -->",
    "nothing": "",
}


SECTIONS = [
    "Serving", "Quality", "Speed", "Pictures", "MTP head", "Known limits", "How it was made", "License and citation",
]  # fmt: skip


TAGS = {
    "h1", "h2", "p", "a", "code", "pre", "table", "thead", "tbody", "tr", "th", "td", "img", "details", "summary",
}  # fmt: skip


class Page(HTMLParser):
    """What a page is made of: its tags, headings, and where its links and pictures lead."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.headings: list[str] = []
        self.code: list[str] = []
        self.links: set[str] = set()
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links |= {value or "" for name, value in attrs if name in {"href", "src"}}
        self._inside = tag
        if tag == "h2":
            self.headings.append("")
        if tag == "pre":
            self.code.append("")

    def handle_data(self, data: str) -> None:
        if self._inside == "h2":
            self.headings[-1] += data
        if self._inside == "code" and self.code:
            self.code[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""


def page_of(card: str) -> Page:
    """A card as the Hub shows it: without its front matter, HTML in it as HTML."""
    body = card.split("\n---\n", 1)[1]
    return Page(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(body))


def row(mtp: bool, speed: float, **changes: Any) -> dict[str, Any]:
    drafted = {"drafted_tokens": 50, "accepted_tokens": 40, "acceptance": 0.8} if mtp else {"acceptance": None}
    return {
        "set": "card", "name": "a|b", "mtp": mtp, "sampling": "greedy", "concurrency": 1, "tokens": 100,
        "tokens_per_second": speed, "first_token_seconds": 0.1, "inter_token_seconds": {"median": 0.01, "p99": None},
        **drafted, **changes,
    }  # fmt: skip


MEASURED_IN_VLLM: dict[str, Any] = {
    "engine": "vllm",
    "version": "vLLM 0.32.0",
    "hardware": "NVIDIA H100",
    "draft_tokens": 1,
    "sampling": {"greedy": {"temperature": 0.0}, "sampled": {"temperature": 0.7}},
    "prompts": [row(False, 50.0), row(True, 100.0), row(False, 40.0, sampling="sampled")],
    "commands": [
        {"mtp": False, "words": ["vllm", "serve", "MODEL", "--dtype", "half"]},
        {"mtp": True, "words": ["vllm", "serve", "MODEL", "--dtype", "half", "--speculative-config", '{"a":1}']},
    ],
}


SUMMARY = {
    "tokens": 100, "tokens_per_second": 100.0, "first_token_seconds": 0.1, "inter_token_seconds": 0.01,
    "acceptance": 0.8,
}  # fmt: skip


COMPARED_IN_VLLM: dict[str, Any] = {**MEASURED_IN_VLLM, "mtp": {"speedup": 2.0, "on": SUMMARY, "off": SUMMARY}}
