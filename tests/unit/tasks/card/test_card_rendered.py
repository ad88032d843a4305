"""The card as a browser gets it: every section and link is ours, whatever the base's card, names and texts hold."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from requant.tasks.card.base_card import MAX_CITATION, cited
from requant.tasks.card.card import make_card
from requant.tasks.card.pinned import recipe_text
from requant.tasks.hub.revision import Revision
from requant.tasks.plots import Picture
from requant.tasks.recipe.loader import parse_recipe
from requant.tasks.recipe.recipe import Gates
from requant.tasks.record import StageRecord
from requant.tasks.validating.gates import judge
from requant.tasks.validating.measured import Measured
from tests.factories.cards import (
    COMPARED_IN_VLLM,
    HOSTILE,
    MEASURED,
    MEASURED_IN_VLLM,
    SECTIONS,
    SHA,
    TAGS,
    base_card,
    card_of,
    facts_of,
    page_of,
    recipe,
)

COMMANDS: list[dict[str, Any]] = MEASURED_IN_VLLM["commands"]
BIBTEX = "@misc{qwen3,\n  title = {Qwen3 {\\&} friends},\n  url = {https://qwen.ai/blog}\n}"


def rich(**changes: Any) -> str:
    """A card with everything in it."""
    pictures = (Picture("block-errors", "Errors, block by block.", b"", b""),)
    speed = COMPARED_IN_VLLM
    return make_card(facts_of(**{"pictures": pictures, "benchmark": speed, **changes}))


def test_every_section_is_there_in_its_order_and_nothing_is_no_tag_of_ours() -> None:
    page = page_of(rich(base_card=base_card("license: mit", f"# Base\n```bibtex\n{BIBTEX}\n```")))
    assert page.headings == SECTIONS
    assert page.tags == TAGS and page.attributes == {"href", "src", "alt", "class"}
    assert page.links == {"https://huggingface.co/Qwen/Qwen3.6-27B", "pictures/block-errors.png"}


def test_the_first_table_has_sizes_memory_quality_and_speed() -> None:
    _, body = card_of(benchmark=COMPARED_IN_VLLM, cache_bytes={8192: 10**9, 32768: 4 * 10**9})
    rows = [line for line in body.split("## Serving")[0].splitlines() if line.startswith("|")]
    assert rows[0] == "|  | base | this model |" and rows[2:] == [
        "| weights | 54.00 GB | 18.00 GB |",
        "| weights and the cache of 8,192 tokens | 55.00 GB | 19.00 GB |",
        "| weights and the cache of 32,768 tokens | 58.00 GB | 22.00 GB |",
        "| perplexity | 3.0000 | 3.1416 (+1.0%) |",
        "| KL divergence, nats |  | 0.0200 |",
        "| same next token as the base |  | 95.0% |",
        "| first draft accepted | 89.4% | 87.1% |",
        "| output tokens per second |  | 50.0 |",
        "| output tokens per second, with MTP |  | 100.0 |",
    ]
    assert "2.00 times as fast as without" in body and "80% of the drafted tokens are accepted" in body


def test_what_was_not_measured_has_no_row_in_the_first_table() -> None:
    top = card_of(measured={"head_kept": False})[1].split("## Serving")[0]
    assert [line.split(" | ")[0] for line in top.splitlines() if line.startswith("| ")][2:] == ["| weights"]
    assert "cache" not in top


def test_the_sampling_that_the_base_recommends_is_told() -> None:
    assert "recommends temperature 0.6, top_k 20." in card_of(sampling={"temperature": 0.6, "top_k": 20})[1]
    assert "recommends" not in card_of()[1]


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_base_card_renders_to_our_page(text: str) -> None:
    page, ours = page_of(rich(base_card=text)), page_of(rich())
    assert (page.headings, page.tags, page.links) == (ours.headings, ours.tags, ours.links)


CITATIONS = {
    "a script": "@misc{a, title={<script>alert(1)</script>}}",
    "a fence inside": "@misc{a,\n``\n````\n<script>x</script>}",
    "a fence that closes and goes on": "@misc{a}\n```\n# evil <img src=x onerror=1>",
    "line separators": "@misc{a,\u2028```\u2029# evil\u0085## evil}",
    "a heading": "@misc{a,\n# evil\n## evil\n}",
    "control characters": "@misc{a, \x1b[2J\x00\u202e}",
    "front matter": "@misc{a}\n---\nlicense: evil\n---",
}


@pytest.mark.parametrize("text", CITATIONS.values(), ids=CITATIONS)
@pytest.mark.parametrize("fence", ["```", "~~~", "`````"])
def test_a_citation_cannot_leave_its_block(text: str, fence: str) -> None:
    card = rich(base_card=base_card("license: mit", f"# Base\n{fence}bibtex\n{text}\n{fence}\n"))
    page, ours = page_of(card), page_of(rich())
    assert page.headings == SECTIONS and page.tags == ours.tags and page.links == ours.links
    assert "license: mit\n" in card.split("\n---\n")[0] and "evil" not in card.split("\n---\n")[0]
    assert all(c.isprintable() for line in card.split("\n") for c in line)


def test_a_citation_is_taken_over_as_it_is() -> None:
    card = base_card("license: mit", f"# Base\n```python\n@decorated\n```\n\n~~~\n{BIBTEX}\n~~~\n```\n@late{{x}}\n```")
    assert cited(card) == f"```bibtex\n{BIBTEX}\n```"
    assert page_of(rich(base_card=card)).code[-1] == BIBTEX + "\n"


@pytest.mark.parametrize(
    "text", ["", "```\nprint(1)\n```", "```bibtex\n@misc{a}", f"```\n@misc{{{'a' * MAX_CITATION}}}\n```", "@misc{a}"]
)
def test_what_is_no_block_of_bibtex_is_not_cited(text: str) -> None:
    assert cited(text) is None


def test_a_card_of_fences_alone_is_read_in_one_pass() -> None:
    assert cited("```bibtex\n@a{\n" * 60_000) is None and cited("`" * 1_000_000) is None


def test_hostile_names_texts_and_records_render_to_our_page() -> None:
    evil = "x`](javascript:1)<script>alert(1)</script>|\n# evil\n```\n"
    measured = {**MEASURED, "text": evil, "tasks": {evil: {"metric": evil, "base": 1, "ours": 1, "recovery": 1.0}}}
    record = {"seconds": 1.0, "tools": {evil: evil}, "settings": {"device": evil, "torch": evil}, "calibration": evil}
    chats = {"templated": 1, "plain": 1, "reason": evil}
    record["sources"] = [{"source": evil, "license": evil, "samples": {evil: 1}, "rows": evil, "chats": chats}, evil]
    card = rich(
        measured=measured,
        gates=judge(Measured.from_json({**measured, "worst_task_recovery": 1.0}), Gates()),
        provenance={
            "quantize": StageRecord(record),
            "validate": StageRecord({"machine": {"python": evil, "cpus": evil}}),
        },
        kept_names=(evil, f"mtp.{evil}"),
        packing=evil,
        base=Revision("Qwen/Qwen3.6-27B", SHA, (), left_out=(evil,)),
        recipe=recipe(quantize={"layers": {evil: {"bits": 8}}}, benchmark={"flags": {"chat-template": "<b>`x`</b>"}}),
    )
    page, ours = page_of(card), page_of(rich())
    assert page.headings == SECTIONS and page.tags <= ours.tags and page.links == ours.links


def test_one_sentence_says_which_commands_were_run() -> None:
    for benchmark, marked in ((MEASURED_IN_VLLM, 0), ({**MEASURED_IN_VLLM, "commands": COMMANDS[1:]}, 1)):
        serving = card_of(benchmark=benchmark)[1].split("## Serving")[1].split("\n## ")[0]
        assert (
            serving.count("was started as below by the pipeline") == 1 and serving.count("not run on these files") == 1
        )
        assert serving.count("vLLM, without drafts (not run):") == marked
    assert card_of()[1].count("not run") == 1


def test_sglang_drafts_with_a_head_that_it_can_load() -> None:
    _, body = card_of(recipe=recipe(benchmark={"draft_tokens": 2}))
    assert "--speculative-num-steps 2" in body and "--speculative-num-draft-tokens 3" in body
    _, packed = card_of(recipe=recipe(mtp="int8"))
    assert "sglang.launch_server" in packed and "--speculative-algorithm" not in packed


def test_a_license_of_the_recipe_replaces_the_bases() -> None:
    asked = recipe(publish={"repo_id": "me/q-int4", "license": "mit"})
    front, body = card_of(base_card("license: other\nlicense_name: qwen\nlicense_link: https://a.b/c"), recipe=asked)
    assert front["license"] == "mit" and "license_name" not in front and "mit, see the front matter" in body


def test_the_published_recipe_is_the_one_that_ran_pinned_and_without_folders() -> None:
    asked = recipe(
        quantize={"calibration": "/data/customer/mine.txt", "iters": 7},
        validation={"text": "/data/customer/other.txt"},
        benchmark={
            "engine": "url:http://gpu7.customer.example:8000",
            "base_engine": "url:http://gpu8.customer.example",
        },
    )
    text = recipe_text(facts_of(recipe=asked, measured={**MEASURED, "text": "other.txt"}))
    assert "customer" not in text and SHA in text
    again = parse_recipe(yaml.safe_load(text))
    assert again.quantize.iters == 7 and again.validation.text == "other.txt"
    _, body = card_of(recipe=asked)
    assert "is not published" in body and "customer" not in body
