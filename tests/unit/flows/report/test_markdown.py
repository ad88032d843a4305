"""The report in markdown: every measured number is there, and no name from outside becomes markup."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from requant.flows.cli.report_files import write_report
from requant.flows.report.markdown import markdown
from requant.flows.report.report import RunReport
from requant.tasks.plots import Picture
from tests.factories.pictures import HOSTILE, prompt
from tests.factories.reports import PUBLISHED, RECIPE, finished

MEASURED: dict[str, Any] = {
    "perplexity": 3.14159, "base_perplexity": 3.0, "perplexity_interval": [3.1, 3.2], "perplexity_increase": 0.0472,
    "perplexity_increase_interval": [0.04, 0.055], "kl_divergence": 0.0123, "top1_agreement": 0.951,
    "mtp_acceptance": 0.871, "base_mtp_acceptance": 0.894,
    "blocks": [{"block": i, "kind": "full_attention", "error": 0.01 * (i % 7), "drift": 0.1} for i in range(20)],
    "matrices": [
        {"name": f"layers.{i}.up_proj", "bits": 4, "slope": 1 - 0.01 * i, "offset": 0.0, "error": 0.1} for i in range(9)
    ],
}  # fmt: skip
PICTURE = Picture("losses", "Tuning made the loss of a block 2 times smaller (median).", b"<svg/>", b"png")


def told(report: RunReport) -> str:
    return markdown(report, lambda picture: f"there/{picture.name}.svg")


def sections(text: str) -> dict[str, list[str]]:
    """The lines below each heading."""
    parts = re.split(r"^### (.*)$", text, flags=re.MULTILINE)
    return {
        "": parts[0].split("\n"),
        **{k: v.strip().split("\n") for k, v in zip(parts[1::2], parts[2::2], strict=True)},
    }


def test_a_run_has_a_headline_its_stages_gates_and_where_it_was_published() -> None:
    text = told(finished())
    assert text.startswith("## published: Qwen/Qwen3.6-27B@0123456 -> W4A16 g128")
    assert "| quantize | ran | 75.5 | 18.00 GB |" in text
    assert "| top1_agreement | not measured | 0.85 | FAILED | could not be measured |" in text
    assert f"[me/x]({PUBLISHED.url}): published, tag v1" in text


def test_a_failed_run_is_reported_with_its_sentence() -> None:
    assert told(RunReport(RECIPE, error="the disk is full")) == (
        "## failed: Qwen/Qwen3.6-27B: nothing made\n\nthe disk is full\n"
    )


def test_quality_stands_beside_the_bases_with_its_interval() -> None:
    lines = sections(told(finished(measured=MEASURED)))["Quality"]
    assert lines[2:] == [
        "| perplexity | 3.0000 | 3.1416 | 3.1000 to 3.2000 |",
        "| perplexity against the base's |  | +4.72% | +4.00% to +5.50% |",
        "| KL divergence, nats |  | 0.0123 |  |",
        "| same next token |  | 95.10% |  |",
        "| draft acceptance rate, first draft | 89.4% | 87.1% |  |",
    ]


PAIRED = {
    "items": 1400,
    "difference": -0.01,
    "interval": [-0.024, 0.004],
    "recovery": 0.98,
    "recovery_interval": [0.952, 1.009],
    "lost": 30,
    "gained": 16,
    "p_value": 0.05,
    "margin": 0.02,
    "verdict": "cannot tell",
    "more_items": 2100,
}


def test_tasks_stand_with_the_share_of_the_bases_score() -> None:
    tasks = {
        "gsm8k": {"metric": "exact_match", "base": 0.8, "ours": 0.79, "recovery": 0.9875},
        "hard": {"metric": "acc", "base": 0.0, "ours": 0.0, "recovery": None},
        "paired": {"metric": "acc", "base": 0.5, "ours": 0.49, "recovery": 0.98, "samples": 1400, "paired": PAIRED},
    }
    lines = sections(told(finished(measured={**MEASURED, "tasks": tasks})))["Tasks"]
    assert lines[2:] == [
        "| `gsm8k` | exact_match | 0.8 | 0.79 | 98.8% | - | - | - |",
        "| `hard` | acc | 0 | 0 | none | - | - | - |",
        "| `paired` | acc | 0.5 | 0.49 | 98.0% (95.2% to 100.9%) | 1,400 | 30, 16 | cannot tell: 2,100 more samples |",
    ]


def test_the_worst_layers_are_named_worst_first() -> None:
    lines = sections(told(finished(measured=MEASURED)))["Worst layers"][2:]
    assert lines[0] == "| block 6, `full_attention` | 6.00% |  |  |" and len(lines) == 10
    assert lines[5] == "| `layers.8.up_proj` | 10.00% | 0.9200 | 4 |"


def test_a_layer_that_is_no_number_is_the_worst() -> None:
    blocks = [*MEASURED["blocks"], {"block": 99, "kind": "x", "error": float("nan"), "drift": 0.0}]
    assert (
        "| block 99, `x` | nan% |"
        in sections(told(finished(measured={**MEASURED, "blocks": blocks})))["Worst layers"][2]
    )


def test_values_that_could_not_be_measured_are_left_out() -> None:
    text = told(finished(measured={"blocks": None, "matrices": None, "perplexity": None}))
    assert "Quality" not in text and "Worst" not in text


DOMAIN = {
    "tokens": 8192, "base_perplexity": 10.0, "perplexity": 10.5, "perplexity_increase": 0.05,
    "perplexity_increase_interval": [0.04, 0.061], "kl_divergence": 0.0675, "kl_divergence_interval": [0.0611, 0.0745],
    "kl_divergence_p99": 0.54, "kl_noise_floor": 0.00026, "top1_agreement": 0.83, "base_mtp_acceptance": 0.55,
    "mtp_acceptance_ratio": 0.99, "mtp_acceptance_ratio_interval": [0.981, 1.003],
}  # fmt: skip


def test_quality_by_domain_has_a_row_for_each_with_its_intervals() -> None:
    lines = sections(told(finished(measured={**MEASURED, "domains": {"code": DOMAIN, "odd|one": DOMAIN}})))
    (*_, code, odd) = [line for line in lines["Quality by domain"] if line.startswith("|")]
    assert code == (
        "| code | 8,192 | 10.00 | +5.0% (+4.0 to +6.1) | 0.0675 (0.0611 to 0.0745) | 0.54 | 0.0003 | 83.0% | 55.0% "
        "| 0.990 (0.981 to 1.003) |"
    )
    assert odd.startswith("| odd\\|one | 8,192 |")
    assert "Quality by domain" not in sections(told(finished(measured=MEASURED)))


def test_speed_has_the_medians_of_each_setting_and_each_prompt_of_the_first() -> None:
    times = {"first_token_seconds": 0.125, "inter_token_seconds": {"median": 0.02, "p99": 0.05}}
    prompts = [
        prompt(f"p{i}", mtp=mtp, speed=50.0 + 40 * mtp + i, sampling=sampling, **times)
        for i in range(3)
        for mtp in (False, True)
        for sampling in ("greedy", "sampled")
    ]
    lines = sections(told(finished(benchmark={"engine": "vLLM 0.32", "prompts": prompts})))["Speed"]
    assert "| greedy | 1 | off | 51.0 | 0.125 | 20.0 | 50.0 |  |" in lines
    assert "| sampled | 1 | on | 91.0 | 0.125 | 20.0 | 50.0 | 80.0% |" in lines
    assert "| `card` `p2` | on | 92.0 | 0.125 | 20.0 | 50.0 | 80.0% |" in lines
    assert len([line for line in lines if line.startswith("| `card`")]) == 6
    assert "Each prompt, greedy, one request at a time:" in lines


def test_transformers_alone_is_a_sentence_and_no_engine_nothing() -> None:
    assert "transformers 5 on CPU, 2 cores: 1000 tokens per second of prompt, 50.0 decoded." in told(finished())
    assert "Speed" not in told(finished(benchmark={"engine": "none"}))


def test_a_picture_is_linked_with_its_caption() -> None:
    lines = sections(told(finished(pictures=[PICTURE])))["Pictures"]
    assert lines == [f"![{PICTURE.caption}](there/losses.svg)", "", PICTURE.caption]


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add(tag)
        self.links += [value or "" for name, value in attrs if name in {"href", "src"}]


@pytest.mark.parametrize(
    "name", [*HOSTILE, "[click](javascript:alert(1))", "![x](http://evil/x.png)", "`a` | b\n\n# c"]
)
def test_a_hostile_name_becomes_no_markup(name: str) -> None:
    matrices = [{"name": name, "bits": 4, "slope": 2.0, "offset": 0.0, "error": 0.1}]
    measured = {
        **MEASURED,
        "matrices": matrices,
        "blocks": [{"block": 0, "kind": name, "error": 1.0, "drift": 1.0}],
        "tasks": {name: {"metric": "acc", "base": 1.0, "ours": 1.0, "recovery": 1.0}},
    }
    speed = {"engine": name, "prompts": [prompt(name, mtp=True, set=name, sampling=name)]}
    report = finished(measured=measured, benchmark=speed, pictures=[Picture("losses", name, b"", b"")])
    page = Tags(MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(told(report)))
    assert page.found <= {"h2", "h3", "p", "a", "code", "table", "thead", "tbody", "tr", "th", "td", "img"}
    assert {html.unescape(link) for link in page.links} == {PUBLISHED.url, "there/losses.svg"}


def test_a_report_is_a_document_a_markdown_file_and_a_folder_of_pictures(tmp_path: Path) -> None:
    path = tmp_path / "my report.json"
    write_report(finished(pictures=[PICTURE]), path)
    assert (tmp_path / "my report-pictures" / "losses.svg").read_bytes() == b"<svg/>"
    assert "](my%20report-pictures/losses.svg)" in (tmp_path / "my report.md").read_text()
    write_report(finished(), path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["my report-pictures", "my report.json", "my report.md"]
