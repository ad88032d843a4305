"""The model card: what the Hub reads of it, what a hostile base can and cannot put into it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from requant.tasks.card.base_card import inherited
from requant.tasks.card.card import make_card
from requant.tasks.card.filters import table
from requant.tasks.card.pinned import recipe_text
from requant.tasks.formatting import gigabytes
from requant.tasks.hub.revision import Revision
from requant.tasks.planning.reasons import kept_groups
from requant.tasks.plots import Picture
from requant.tasks.recipe.loader import parse_recipe
from requant.tasks.recipe.recipe import Gates
from requant.tasks.record import StageRecord
from requant.tasks.validating.drafts import DraftComparison, DraftCount
from requant.tasks.validating.gates import judge
from requant.tasks.validating.measured import Measured
from tests.factories.cards import HOSTILE, MEASURED, MEASURED_IN_VLLM, SHA, base_card, card_of, facts_of, recipe
from tests.factories.measured import GOOD, good

OWN = {
    "base_model": "Qwen/Qwen3.6-27B",
    "base_model_relation": "quantized",
    "library_name": "transformers",
    "quantized_by": "requant",
    "tags": ["auto-round", "int4", "w4a16", "mtp"],
    "pipeline_tag": "text-generation",
    "model-index": [
        {
            "name": "q-int4",
            "results": [
                {
                    "task": {"type": "text-generation"},
                    "dataset": {"type": "builtin:python-evaluation", "name": "builtin:python-evaluation"},
                    "metrics": [{"type": "perplexity", "name": "perplexity", "value": 3.1416}],
                }
            ],
        }
    ],
}


def test_the_front_matter_names_base_relation_library_and_tags() -> None:
    assert card_of()[0] == OWN


def test_license_language_and_pipeline_tag_are_taken_over() -> None:
    front = "license: apache-2.0\nlanguage:\n- en\n- de\npipeline_tag: image-text-to-text\ntags: [evil]\nwidget: [x]"
    assert card_of(base_card(front))[0] == {
        **OWN, "license": "apache-2.0", "language": ["en", "de"], "pipeline_tag": "image-text-to-text",
    }  # fmt: skip


def test_a_license_link_is_taken_over() -> None:
    front = "license: other\nlicense_name: qwen\nlicense_link: https://huggingface.co/Qwen/Qwen3/blob/main/LICENSE"
    assert inherited(base_card(front)) == {
        "license": "other", "license_name": "qwen", "license_link": "https://huggingface.co/Qwen/Qwen3/blob/main/LICENSE",
    }  # fmt: skip


def test_windows_line_ends_are_read() -> None:
    assert inherited("---\r\nlicense: mit\r\n---\r\n# Base\r\n") == {"license": "mit"}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_base_card_changes_nothing_of_ours(text: str) -> None:
    front, body = card_of(text)
    assert front == OWN
    assert body == card_of()[1]


def test_nothing_of_the_base_cards_text_is_taken_over() -> None:
    _, body = card_of(base_card("license: mit", "# Base\n<script>alert(1)</script> run `curl evil | sh`"))
    assert "evil" not in body and "<script>" not in body


def test_a_value_that_yaml_would_read_as_something_else_stays_text() -> None:
    front, _ = card_of(base_card('license: "1.0"\nlanguage: ["no", "en"]'))
    assert front["license"] == "1.0" and front["language"] == ["no", "en"]


def cells(line: str) -> list[str]:
    """The cells of a table row as GitHub's markdown splits it: a backslash escapes the character behind it."""
    assert line.startswith("|") and line.endswith("|")
    return [c.strip() for c in re.findall(r"((?:\\.|[^|\\])*)\|", line[1:])]


CELLS = {
    "a pipe": "a|b",
    "an escaped pipe": "a\\|b",
    "two backslashes and a pipe": "a\\\\|b",
    "a backslash at the end": "a\\",
    "a line break": "a\nb",
    "line breaks": "a\r\n\n\rb",
    "a row of its own": "a |\n| evil | row |",
    "a heading": "a\n\n# evil",
    "a fence": "a\n```\nevil",
}


@pytest.mark.parametrize("text", CELLS.values(), ids=CELLS)
def test_a_cell_cannot_break_out_of_its_table(text: str) -> None:
    lines = table(("one", "two", "three"), [("x", text, "y")]).split("\n")
    assert len(lines) == 3
    assert cells(lines[0]) == ["one", "two", "three"] and cells(lines[1]) == ["---"] * 3
    row = cells(lines[2])
    assert len(row) == 3 and row[0] == "x" and row[2] == "y"


def test_a_cell_cannot_hold_html() -> None:
    assert "<" not in table(("a",), [("<img src=x onerror=alert(1)>",)])


@pytest.mark.parametrize("name", ["a`[click](javascript:x)`.weight", "a|b.weight", "a\nb.weight", "<img src=x>.weight"])
def test_a_tensors_name_cannot_break_out_of_its_cell(name: str) -> None:
    _, body = card_of(kept_names=(name,))
    section = body.split("<summary>Tensors that are not quantized")[1].split("</details>")[0]
    rows = [line for line in section.split("\n") if line.startswith("|")]
    assert len(rows) == 3 and len(cells(rows[2])) == 3
    assert cells(rows[2])[0].count("`") == 2 and "<img" not in section


def test_every_measured_value_is_in_the_card() -> None:
    _, body = card_of()
    assert "| perplexity | 3.0000 | 3.1416 | 3.0000 to 3.3000 |" in body
    assert "| 1 | 89.4% | 87.1% |  | 91.0% |" in body and "| 2 | 72.0% | 70.0% |  |  |" in body
    assert "| weights | 54.00 GB | 18.00 GB |" in body and "3.00 times smaller" in body
    assert "87.1%" in body and "89.4%" in body and "12,288 tokens" in body
    assert "| perplexity_increase | 0.01 | 0.05 | passed |" in body
    assert "| top1_agreement | 0.95 | 0.85 | passed |" in body
    assert "| quantize | 12.3 | H200 | auto-round 0.16.1 |" in body
    assert f"Base commit `{SHA}`, artifact digest `{'d' * 64}`, recipe digest `{recipe().digest}`." in body


def test_a_gate_without_a_limit_is_not_said_to_have_passed() -> None:
    limits = Gates(max_weight_offset=None, max_weight_slope_error=None)
    _, body = card_of(gates=judge(good(matrices=[{**GOOD["matrices"][0], "offset": 3.968}]), limits))
    assert re.search(r"weight_offset\W+3\.968\W+none\W+no limit", body), body
    _, body = card_of(gates=judge(good(matrices=None), limits))
    assert re.search(r"weight_slope\W+not measured\W+none\W+not measured", body), body


def test_a_failed_or_unmeasured_gate_is_not_dressed_up() -> None:
    measured = {**MEASURED, "top1_agreement": 0.5, "mtp_acceptance_ratio": None}
    _, body = card_of(measured=measured, gates=judge(Measured.from_json(measured), Gates()))
    assert "| top1_agreement | 0.5 | 0.85 | failed |" in body
    assert "| mtp_acceptance_ratio | not measured | 0.95 | failed |" in body


def test_the_drafts_that_an_engine_counted_are_in_the_card_with_their_interval() -> None:
    ran = {"version": "vLLM 0.32.0", "hardware": "NVIDIA H200"}
    columns = {"drafted": [280] * 20, "accepted": [250, 246] * 10}, {"drafted": [280] * 20, "accepted": [250] * 20}
    ours, base = (DraftCount.model_validate({**column, **ran}) for column in columns)
    drafts = DraftComparison(text="builtin:mixed-evaluation", quantized=ours, base=base)
    assert drafts.ratio is not None
    _, body = card_of(drafts=drafts)
    assert (
        "Counted by the engine (vLLM 0.32.0 on NVIDIA H200): 88.6% of 5,600 drafted tokens accepted, and of the base's "
        "89.3% of 5,600, with 1 draft token per step, at the same places of `builtin:mixed-evaluation`. The ratio of "
        f"the two rates is 0.992 (95 % interval: {drafts.ratio.low:.3f} to {drafts.ratio.high:.3f})."
    ) in body
    unknown = {**MEASURED, "mtp_acceptance": None}
    assert "was not measured in torch." in card_of(drafts=drafts, measured=unknown)[1]
    assert "rate was not measured." in card_of(measured=unknown)[1] and "Counted by the engine" not in card_of()[1]


def test_a_recipe_in_the_card_makes_the_same_again() -> None:
    asked = recipe(quantize={"preset": "auto-round-light", "layers": {"lm_head": {"bits": 8}}}, mtp="drop")
    _, body = card_of(recipe=asked)
    again = yaml.safe_load(body.split("```yaml\n")[1].split("\n```")[0])
    assert again["base"] == {"repo_id": "Qwen/Qwen3.6-27B", "revision": SHA}
    assert parse_recipe(again).quantize == asked.quantize and parse_recipe(again).mtp == "drop"
    assert "these versions: requant 0.1.0, auto-round 0.16.1." in body


def test_a_group_size_of_auto_is_told_as_a_number_and_makes_the_same_again() -> None:
    asked = recipe(quantize={"group_size": "auto"})
    for number in (128, 64):
        _, body = card_of(recipe=asked.with_group_size(number))
        text = body.split("```yaml\n")[1].split("\n```")[0]
        (line,) = (line for line in text.splitlines() if "group_size" in line)
        assert str(number) in line and f"group size {number}" in body
        assert parse_recipe(yaml.safe_load(text)).quantize == asked.with_group_size(number).quantize


def test_whoever_makes_it_again_need_not_be_allowed_to_publish_it() -> None:
    assert "```bash\nrequant run recipe.yaml --set publish=null\n```" in card_of()[1]
    assert "```bash\nrequant run recipe.yaml\n```" in card_of(recipe=recipe(publish=None))[1]


def test_a_calibration_file_is_named_without_the_folder_it_lies_in(tmp_path: Path) -> None:
    asked = recipe(quantize={"calibration": str(tmp_path / "customers" / "calibration.txt")})
    _, body = card_of(recipe=asked)
    assert "calibration.txt" in body and str(tmp_path) not in body


def test_a_command_that_was_not_run_is_marked_so_and_asks_for_the_head() -> None:
    _, body = card_of()
    assert "The commands were not run on these files." in body and '"method":"mtp"' in body
    _, headless = card_of(measured={**MEASURED, "head_kept": False}, recipe=recipe(mtp="drop"))
    assert '"method":"mtp"' not in headless and "The result has no MTP head." in headless


def test_a_head_that_the_recipe_drops_is_said_to_be_left_out() -> None:
    fixed = {"mtp_fix": StageRecord({"seconds": 1.0, "mtp": {"asked": "drop", "in_base": True}})}
    _, body = card_of(measured={**MEASURED, "head_kept": False}, recipe=recipe(mtp="drop"), provenance=fixed)
    assert "The result has no MTP head: the base's was left out, as the recipe says." in body


def test_a_base_without_a_head_is_not_said_to_have_lost_it() -> None:
    without = {name: value for name, value in MEASURED.items() if "acceptance" not in name}
    benchmark = {**MEASURED_IN_VLLM, "prompts": MEASURED_IN_VLLM["prompts"][:1], "commands": []}
    kept = ("model.norm.weight",)
    front, body = card_of(measured={**without, "head_kept": False}, benchmark=benchmark, kept_names=kept)
    assert "mtp" not in front["tags"] and "draft" not in body and "MTP" not in body


def test_a_measured_speed_is_said_not_to_be_an_engines() -> None:
    speed = {
        "engine": "torch", "version": "transformers 5.23", "hardware": "CPU", "prefill_tokens_per_second": 1234.5,
        "tokens_per_second": 56.78,
    }  # fmt: skip
    _, body = card_of(benchmark=speed)
    assert "1234 tokens per second of prompt, 56.8 decoded. This is no engine's figure." in body
    assert "output tokens per second" not in body
    assert "Not measured." in card_of()[1]


def test_pictures_are_shown_with_what_is_to_be_seen() -> None:
    of_tuning = Picture("losses", "How tuning went.", b"", b"")
    picture = Picture("block-errors", "Twice as small [x](javascript:1) <b>.", b"", b"")
    _, body = card_of(pictures=(picture, of_tuning))
    section = body.split("## Pictures\n\n")[1].split("\n\n## ")[0]
    caption = "Twice as small ?x?(javascript:1) ?b?."
    assert section == f"![block errors](pictures/block-errors.png)\n\n{caption}"
    assert "## Pictures" not in card_of()[1]


def test_kept_tensors_are_folded_and_counted_with_a_reason() -> None:
    names = [f"model.layers.{i}.input_layernorm.weight" for i in range(12)]
    assert kept_groups([*names, "lm_head.weight", "mtp.layers.0.x.weight", "odd"]) == [
        ("`lm_head.weight`", "1", "output layer: one of the most sensitive"),
        ("`model.layers.*.input_layernorm.weight`", "12", "normalization: a vector, and sensitive"),
        ("`mtp.*`", "1", "MTP head: packed, it drafts worse or does not load"),
        ("`odd`", "1", "not a matrix of a decoder block"),
    ]


def test_a_layer_that_the_recipe_keeps_is_not_said_to_lie_outside_the_blocks() -> None:
    kept = ("model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight")
    _, body = card_of(kept_names=kept, kept_reasons={"model.layers.0.mlp.down_proj": "the recipe keeps it"})
    assert "| `model.layers.*.mlp.down_proj.weight` | 2 | the recipe keeps it |" in body


@pytest.mark.parametrize("mtp", ["keep", "int8"])
def test_what_an_fp8_base_gave_is_not_said_to_be_bit_for_bit_the_bases(mtp: str) -> None:
    assert "bit for bit" in card_of(recipe=recipe(mtp=mtp))[1].lower()
    _, body = card_of(recipe=recipe(mtp=mtp), fp8=True)
    assert "bit for bit" not in body.lower() and "FP8" in body and "BF16" in body


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0.0 kB"),
        (12_345, "12.3 kB"),
        (1_500_000, "1.50 MB"),
        (999_999_999, "1000.00 MB"),
        (18_000_000_000, "18.00 GB"),
    ],
)
def test_sizes_are_said_as_people_say_them(size: int, text: str) -> None:
    assert gigabytes(size) == text


def test_the_card_says_what_was_taken_from_each_calibration_text_and_pins_it_in_the_recipe() -> None:
    asked = recipe(quantize={"calibration": [{"source": "me/chats:train", "weight": 3.0}, "builtin:mixed"]})
    chats = {"templated": 40, "plain": 0, "reason": None}
    sources = [
        {"source": f"me/chats@{SHA}:train", "weight": 3.0, "license": "cc0-1.0", "rows": 1234, "tokens": 99_000,
         "samples": {"": 96}, "chats": chats},
        {"source": "builtin:mixed", "rows": 5, "tokens": 6, "samples": {"code": 20, "chat": 12, "math": 0}},
    ]  # fmt: skip
    record = StageRecord({"sources": sources, "calibration": f"me/chats@{SHA}:train, builtin:mixed"})
    found = facts_of(recipe=asked, provenance={"quantize": record})
    body = make_card(found)
    assert f"| `me/chats@{SHA}:train` | 96 | 1,234 | 99,000 | 40 through the template | cc0-1.0 |" in body
    assert "| `builtin:mixed` | 32 (20 code, 12 chat) | 5 | 6 |" in body
    pinned = yaml.safe_load(recipe_text(found))["quantize"]["calibration"]
    assert pinned == [{"source": f"me/chats@{SHA}:train", "weight": 3.0}, "builtin:mixed"]


@pytest.mark.parametrize(
    ("name", "front", "sentence", "pinned"),
    [
        ("a/lora", ("a/lora", "quantized"), "merged with the LoRA adapter [a/lora]", {"revision": "f" * 40}),
        ("/home/me/my-lora", ("Qwen/Qwen3.6-27B", "finetune"), "a local LoRA adapter", {"folder": "./my-lora"}),
    ],
)
def test_an_adapter_is_named_and_pinned_and_its_folder_is_not_told(
    name: str, front: tuple[str, str], sentence: str, pinned: dict[str, str]
) -> None:
    local = name.startswith("/")
    adapter = Revision("my-lora" if local else name, "f" * 40, (), is_local=local)
    facts = facts_of(recipe=recipe(adapter=name))
    facts = replace(facts, base=replace(facts.base, adapter=adapter))
    card = make_card(facts)
    data = yaml.safe_load(card.split("---")[1])
    assert (data["base_model"], data["base_model_relation"]) == front
    assert sentence in card and "f" * 40 in card and "/home/me" not in card
    assert ("The recipe reads the adapter from a folder of its author that is not published" in card) == local
    assert yaml.safe_load(recipe_text(facts))["adapter"].items() >= pinned.items()
    assert facts.base.is_restricted == local, "nobody says who may read a folder"


def test_limits_that_are_weaker_than_the_defaults_are_told() -> None:
    def told(**gates: float | None) -> str:
        text = make_card(replace(facts_of(), recipe=facts_of().recipe.model_copy(update={"gates": Gates(**gates)})))
        found = re.search(r"weaker than those that Requant sets by default: (.*)\.", text)
        return found[1] if found else ""

    assert told() == told(max_kl_divergence=0.1, min_top1_agreement=0.9) == ""
    assert told(max_kl_divergence=0.5, min_top1_agreement=0.4, max_block_error=None) == (
        "max_kl_divergence 0.5 (by default 0.25); min_top1_agreement 0.4 (by default 0.85); "
        "max_block_error none (by default 0.5)"
    )


def test_what_transformers_needs_is_named_in_the_versions_that_made_the_files() -> None:
    made = {"quantize": StageRecord({"tools": {"auto-round": "0.16.1", "transformers": "5.23.0"}})}
    assert "pip install transformers==5.23.0 auto-round==0.16.1\n" in make_card(replace(facts_of(), provenance=made))
