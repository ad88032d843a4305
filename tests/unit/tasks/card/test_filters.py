"""What a stranger wrote is escaped wherever a template renders it, also where nobody thought of a filter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from jinja2 import UndefinedError

from requant.tasks.card.card import environment, make_card
from requant.tasks.card.facts import CardFacts
from requant.tasks.card.filters import Markdown, cell, escape, named, table
from requant.tasks.planning.document import EngineVerdict
from requant.tasks.plots import Picture
from requant.tasks.record import StageRecord
from requant.tasks.validating.gates import Gate
from tests.factories.cards import (
    COMPARED_IN_VLLM,
    FACTS,
    MEASURED,
    MEASURED_IN_VLLM,
    SECTIONS,
    SHA,
    TAGS,
    facts_of,
    page_of,
)

EVIL = "x`](https://evil)[click](https://evil)<b>*x*</b>|![i](https://evil)\n\n# evil\n```\n"
VERDICT = EngineVerdict(loads=True, mtp=True, reason="none", version="0.32.0")
WHOLE: dict[str, Any] = {
    "measured": {**MEASURED, "tasks": {"a": {"metric": "acc", "base": 1.0, "ours": 1.0, "recovery": 1.0}}},
    "benchmark": COMPARED_IN_VLLM,
    "provenance": {
        "quantize": StageRecord(
            {
                "seconds": 1.0,
                "tools": {"auto-round": "0.16.1"},
                "settings": {"device": "H200", "torch": "2.11"},
                "machine": {"python": "3.12", "cpus": 8},
                "calibration": "builtin:mixed",
            }
        )
    },
    "engines": {"vllm": VERDICT, "sglang": VERDICT, "transformers": VERDICT},
    "gates": [Gate("structure", 0.0, 0.0, True)],
    "pictures": [Picture("block-errors", "Errors, block by block.", b"", b"")],
    "kept_reasons": {"model.layers.0.input_layernorm": "kept"},
}


def hostile(value: Any) -> Any:
    """Put a stranger's text in the place of each text in a value, and keep the structure."""
    if isinstance(value, dict):
        return {key: hostile(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(hostile, value))
    if isinstance(value, EngineVerdict):
        return value.model_copy(update={"reason": EVIL})
    if isinstance(value, StageRecord):
        return StageRecord(hostile(value.document))
    return EVIL if isinstance(value, str) else value


def check(facts: CardFacts) -> None:
    """Assert that the sections, tags and links of a card are ours."""
    page = page_of(make_card(facts))
    assert page.headings == SECTIONS and page.tags <= TAGS
    assert page.links == {"https://huggingface.co/Qwen/Qwen3.6-27B", "pictures/block-errors.png"}


@pytest.mark.parametrize(
    "source",
    [
        "{{ evil }}", "{{ evil ~ evil }}", "{{ evil + '' }}", "{{ [evil, evil] | join }}", "{{ '%s' | format(evil) }}",
        "{{ evil | safe }}", "{{ evil | upper }}", "{{ [evil] }}", "{{ {evil: evil} }}", "{{ evil if true else '' }}",
        "{% set copy = evil %}{{ copy }}", "{% set block %}{{ evil }}{% endset %}{{ block }}",
        "{% macro shown(value) %}{{ value }}{% endmacro %}{{ shown(evil) }}", "{{ (evil | named) ~ evil }}",
        "{% for value in [evil] %}{{ value }}{% endfor %}", "{{ '{}'.format(evil) }}",
        "{{ evil | named | replace('x', evil) }}",
    ],
)  # fmt: skip
def test_no_way_of_rendering_a_value_leaves_it_as_it_is(source: str) -> None:
    text = environment().from_string(source).render(evil=EVIL)
    assert text and not set(text) & set("`[]<>|!*#\n/")


def test_markdown_is_rendered_as_it_is_and_loses_its_type_with_any_change() -> None:
    assert environment().from_string("{{ name }}").render(name=named("a*b")) == "`a*b`"
    changed = (named("a") + "b", f"{named('a')}", named("a").upper(), " ".join([named("a")]), Markdown("%s") % "b")
    assert not any(isinstance(text, Markdown) for text in changed)


def test_a_value_that_is_missing_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="nothing"):
        environment().from_string("{{ facts.nothing }}").render(facts=FACTS)


def test_a_cell_shows_what_it_is_given_and_nothing_else() -> None:
    page = page_of(f"\n---\n{table(('one', 'two'), [(EVIL, '_x_ a_b')])}")
    assert page.tags == {"table", "thead", "tbody", "tr", "th", "td"} and not page.links
    assert cell("a_b") == "a_b" and cell(escape("_x_")) == "_x_"


@pytest.mark.parametrize("name", WHOLE)
def test_whatever_text_of_the_facts_is_a_strangers_the_page_is_ours(name: str) -> None:
    known = {"benchmark": ("engine", "sampling", "prompts", "commands")}  # what the card decides by, or tested below
    value = WHOLE[name]
    if name == "gates":
        changed: Any = [replace(gate, name=EVIL, note=EVIL) for gate in FACTS.gates]
    elif name == "pictures":
        changed = [replace(picture, caption=EVIL) for picture in WHOLE["pictures"]]
    else:
        changed = {key: part if key in known.get(name, ()) else hostile(part) for key, part in dict(value).items()}
    check(facts_of(**{**WHOLE, name: changed}))


def test_names_that_the_facts_are_listed_by_are_escaped_too() -> None:
    prompts = [{**prompt, "set": EVIL, "name": EVIL} for prompt in MEASURED_IN_VLLM["prompts"]]
    sampling = {"greedy": {}, "sampled": {EVIL: 0.7}}
    commands = [{**one, "words": [*one["words"], EVIL]} for one in MEASURED_IN_VLLM["commands"]]
    benchmark = {**WHOLE["benchmark"], "prompts": prompts, "sampling": sampling, "commands": commands}
    provenance = {EVIL: StageRecord({"tools": {EVIL: EVIL}}), **WHOLE["provenance"]}
    measured = {**MEASURED, "tasks": {EVIL: WHOLE["measured"]["tasks"]["a"]}}
    check(facts_of(**{**WHOLE, "benchmark": benchmark, "provenance": provenance, "measured": measured}))


@pytest.mark.parametrize("name", ["digest", "packing", "kept_names"])
def test_what_is_read_of_the_files_is_escaped(name: str) -> None:
    check(facts_of(**{**WHOLE, name: (EVIL,) if name == "kept_names" else EVIL}))


def test_a_commit_and_a_version_are_escaped() -> None:
    base = replace(FACTS.base, sha=EVIL)
    assert SHA not in make_card(facts_of(**{**WHOLE, "base": base}))
    check(facts_of(**{**WHOLE, "base": base, "version": EVIL, "commit": EVIL}))
