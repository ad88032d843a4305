"""acceptance: when drafts are compared, what the keys read, and what a gate says of private servers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from requant.tasks.acceptance import acceptance_key, drafts_in, serves_base, without_addresses
from requant.tasks.artifact import File, Manifest
from requant.tasks.benchmark import benchmark_key
from requant.tasks.recipe.loader import parse_recipe
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.serving.drafts import CONTEXT_LENGTH, places
from requant.tasks.texts.text import Text

A, B = "a" * 64, "b" * 64
BASE = Manifest.of(File(path, 1, A) for path in ("config.json", "model.safetensors", "README.md"))
MADE = Manifest.of([File("model.safetensors", 2, B)])
TEXT = Text("builtin:mixed-evaluation", A)


def recipe(**benchmark: Any) -> Recipe:
    return parse_recipe({"base": {"repo_id": "a/b"}, "benchmark": benchmark})


def changed_base(path: str) -> Manifest:
    return Manifest.of(replace(file, sha256=B) if file.path == path else file for file in BASE.files)


def key(asked: Recipe | None = None, base: Manifest = BASE, text: Text = TEXT, engine: str = "vllm") -> str:
    return acceptance_key(asked or recipe(), base, MADE, text, engine)


def test_an_engine_compares_drafts_if_it_drafts_and_can_serve_the_base() -> None:
    own, server = recipe().benchmark, "url:http://127.0.0.1:8000"
    eagle = recipe(flags={"speculative-config": {"method": "eagle3"}}).benchmark
    assert drafts_in("vllm", own, head=True) and drafts_in(server, own, head=True)
    assert drafts_in("vllm", eagle, head=False)
    assert not any(drafts_in(engine, own, head=True) for engine in ("torch", "none"))
    assert not drafts_in("vllm", own, head=False)
    assert serves_base("vllm", own) and not serves_base(server, own)
    assert serves_base(server, recipe(engine=server, base_engine="url:http://127.0.0.1:8001").benchmark)


@pytest.mark.parametrize(
    "changed",
    [
        key(recipe(flags={"dtype": "bfloat16"})),
        key(recipe(draft_tokens=2)),
        key(recipe(acceptance_precision=0.02)),
        key(recipe(base_engine="url:http://a:1")),
        key(engine="url:http://a:1"),
        key(text=Text("mine.txt", B)),
        key(base=changed_base("config.json")),
    ],
)
def test_whatever_changes_the_counts_changes_the_key(changed: str) -> None:
    assert changed != key()


def test_a_limit_a_card_of_the_base_and_the_speed_that_is_measured_change_nothing() -> None:
    limited = parse_recipe({"base": {"repo_id": "a/b"}, "gates": {"min_mtp_acceptance_ratio": 0.9}})
    assert (
        key()
        == key(base=changed_base("README.md"))
        == key(limited)
        == key(recipe(prompts=["code"], concurrency=2, max_tokens=9))
    )


def test_how_drafts_are_compared_measures_no_speed_again() -> None:
    asked = recipe(engine="vllm", acceptance_precision=0.02, base_engine="url:http://a:1")
    assert benchmark_key(asked, MADE) == benchmark_key(recipe(engine="vllm"), MADE)


def test_a_gates_note_names_neither_servers_nor_folders() -> None:
    asked = recipe(engine="url:http://gpu7.customer.example:8000/v1", base_engine="url:http://gpu8.customer.example")
    sentence = "http://gpu8.customer.example fails, and http://gpu7.customer.example:8000 too (log: /home/x/a.log)"
    told = without_addresses(sentence, asked.benchmark)
    assert told == "the server fails, and the server too (log: a.log)"


def test_any_number_of_places_is_spread_evenly_over_the_text() -> None:
    text = "".join(f"{number:05d}" for number in range(4000))
    after = places(text)
    starts = [text.index(next(after)) for _ in range(64)]
    assert all(len(place) == CONTEXT_LENGTH for place, _ in zip(places(text), range(9), strict=False))
    gaps = [later - earlier for earlier, later in zip(sorted(starts), sorted(starts)[1:], strict=False)]
    assert max(gaps) < 2.7 * len(text) / 64 and len(set(starts)) == 64
    assert [next(places("short")) for _ in range(2)] == ["short", "short"]
