"""Comparing two checkpoints of one base: which one is closer to it, and when that is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner

from requant.flows import api
from requant.flows.cli.main import cli
from requant.flows.report.comparison import answer_sentence, comparison_text
from requant.tasks import compare
from requant.tasks.compare import Distances, compare_checkpoints, compare_distances, overall
from requant.tasks.errors import CheckpointError
from requant.tasks.plots import comparison as pictures
from requant.tasks.validating.comparison import Answer, ComparisonDocument
from requant.tasks.validating.domains import MIN_WINDOWS
from requant.tasks.validating.measure import measure, run_settings
from tests.factories.checkpoints import write_quantized
from tests.factories.measured import measuring_little
from tests.factories.pico import pico_base

WINDOWS, DOMAINS = 16, ("prose", "code", "chat")


def distances(scale: float = 1.0, *, seed: int = 0, drafts: bool = False) -> Distances:
    """A checkpoint whose divergence is `scale` times 0.1 nats in the mean, with texts that differ much."""
    random = np.random.default_rng(0)
    kl = 0.1 * random.lognormal(sigma=0.4, size=WINDOWS * len(DOMAINS))
    own = np.random.default_rng(seed + 1).normal(1.0, 0.05, kl.shape)
    return Distances(
        domains=tuple(name for name in DOMAINS for _ in range(WINDOWS)),
        kl=kl * own * scale,
        nll=1 + kl,
        top1=1 - kl,
        accepted=1 - kl * own if drafts else None,
    )


def answers(a: Distances, b: Distances) -> set[Answer | None]:
    return {row.kl_divergence.answer for row in compare_distances(a, b, 512).values()}


def test_a_checkpoint_is_not_different_from_itself() -> None:
    rows = compare_distances(distances(drafts=True), distances(drafts=True), 512)
    for row in rows.values():
        assert row.mtp_acceptance is not None
        for part in (row.kl_divergence, row.mtp_acceptance):
            assert (part.difference, part.answer) == (0, "no difference")
            assert part.interval is not None and part.interval[0] < 0 < part.interval[1]
    assert overall(list(rows.values())) == "no difference"


def test_the_closer_one_is_found_in_either_order() -> None:
    near, far = distances(1.0), distances(1.3, seed=1)
    assert answers(near, far) == {"a"} and answers(far, near) == {"b"}
    one, other = compare_distances(near, far, 512), compare_distances(far, near, 512)
    assert all(
        one[name].kl_divergence.difference == -other[name].kl_divergence.difference and one[name].tokens == 8192
        for name in DOMAINS
    )
    assert one["code"].kl_divergence.difference == pytest.approx(1 - 1 / 1.3, abs=0.03)


def test_two_seeds_of_a_recipe_are_called_different_as_seldom_as_promised() -> None:
    """Each seed has a spread of its own in each domain, as large as was measured for real ones."""
    random = np.random.default_rng(5)
    wrong = 0
    for _ in range(400):
        spread = np.repeat(random.normal(1, compare.SEED_SPREAD, (2, len(DOMAINS))), WINDOWS, axis=1)
        one, other = (replace(distances(), kl=distances().kl * spread[i]) for i in (0, 1))
        wrong += answers(one, other) != {"no difference"}
    assert wrong / 400 <= compare.ERROR_RATE + 0.02  # two standard errors of 400 tries


def test_a_domain_with_few_windows_and_a_value_that_is_no_number_are_not_judged() -> None:
    few = compare_distances(distances().up_to(MIN_WINDOWS - 1), distances(2.0), 512)
    assert [(row.kl_divergence.interval, row.kl_divergence.answer) for row in few.values()] == [(None, None)]
    assert overall(list(few.values())) is None
    kl = distances().kl
    kl[0] = np.nan
    rows = compare_distances(replace(distances(), kl=kl), distances(2.0), 512)
    assert [row.kl_divergence.answer for row in rows.values()] == [None, "a", "a"]
    written = rows["prose"].kl_divergence.to_json()
    assert (written["a"], written["difference"], written["interval"]) == (None, None, None)


def test_a_checkpoint_of_losses_that_are_no_numbers_has_no_acceptance_to_compare(
    pair: tuple[Path, Path], text: Path
) -> None:
    """It chooses token 0 everywhere, and so do its drafts."""
    base, _ = pair
    measured = measure(base, text, run_settings(base), 512)
    kl = np.zeros_like(measured.nll)
    assert Distances.of(measured, measured, kl).accepted is not None
    broken = replace(measured, nll=np.full_like(measured.nll, np.nan))
    assert Distances.of(broken, measured, kl).accepted is None


def test_each_may_be_better_somewhere() -> None:
    better_at_code = distances()
    worse_at_code = replace(better_at_code, kl=better_at_code.kl * np.repeat([0.5, 2.0, 1.0], WINDOWS))
    rows = compare_distances(worse_at_code, better_at_code, 512)
    document = ComparisonDocument(a="x", b="y", base="z", text="t", answer=overall(list(rows.values())), domains=rows)
    assert document.answer == "mixed"
    assert answer_sentence(document) == "A is better in prose; B is better in code; no difference in chat"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A pico base, and the same with its body rounded to 4 bits."""
    folder = tmp_path_factory.mktemp("pair")
    base = pico_base(folder / "base")
    with measuring_little(windows=8, length=64, probe=16, prompts=1, generated=4, longest=64):
        yield base, write_quantized(base, folder / "rounded")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    words = {
        "code": "def add(a, b):\n    return a + b\n" * 200,
        "prose": "The sea was calm and the night was long. " * 200,
    }
    path.write_text("".join(json.dumps({"domain": name, "text": 200 * value}) + "\n" for name, value in words.items()))
    return path


def test_the_base_is_closer_to_itself_than_its_rounding_is(pair: tuple[Path, Path], text: Path) -> None:
    base, rounded = pair
    rows = compare_checkpoints(rounded, base, base, text, 512)
    assert set(rows) == {"code", "prose"} and overall(list(rows.values())) == "b"
    for row in rows.values():
        assert (row.kl_divergence.b, row.kl_divergence.difference) == (0, -1)
        assert row.top1_agreement[1] == 1 and row.mtp_acceptance is not None


def test_a_checkpoint_of_another_base_is_refused_in_a_sentence(
    pair: tuple[Path, Path], text: Path, tmp_path: Path
) -> None:
    base, rounded = pair
    other = shutil.copytree(rounded, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["vocab_size"] = 1000
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"other is of another base .*has 1000 tokens, and the base's has 2048"):
        compare_checkpoints(rounded, other, base, text)


def test_the_command_prints_a_table_draws_a_picture_and_has_a_document(
    pair: tuple[Path, Path], text: Path, tmp_path: Path
) -> None:
    base, rounded = pair
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base: {{repo_id: a/b}}\nvalidation: {{text: {text}, tokens: 512}}\n")
    options = ["--base", str(base), "--recipe", str(recipe)]
    picture = tmp_path / "new" / "picture.svg"
    done = CliRunner().invoke(
        cli, ["compare", str(base), str(rounded), *options, "--picture", str(picture), "--json"], catch_exceptions=False
    )
    assert done.exit_code == 0 and "A is 100 % lower" in picture.read_text()
    printed = json.loads(done.stdout)
    jsonschema.validate(printed, ComparisonDocument.model_json_schema(mode="serialization"))
    assert (printed["a"], printed["answer"]) == (str(base), "a")
    assert "A is better in code, prose" in comparison_text(ComparisonDocument.model_validate(printed))
    refused = CliRunner().invoke(cli, ["compare", str(base), str(rounded), *options, "--picture", "picture.jpg"])
    assert refused.exit_code == 2 and "ends in .png or .svg" in refused.output


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments of a command that compares, whose document was measured before."""
    rows = compare_distances(distances(), distances(1.3), 512)
    document = ComparisonDocument(a="x", b="y", base="z", text="t", answer=overall(list(rows.values())), domains=rows)
    monkeypatch.setattr(api, "compare", lambda *_, **__: document)
    return ["compare", "x", "y", "--base", "z", "--picture"]


def test_a_picture_that_cannot_be_drawn_leaves_the_table(
    compared: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(document: ComparisonDocument) -> None:
        raise ValueError("Axis limits cannot be NaN or Inf")

    monkeypatch.setattr(pictures, "comparison", fail)
    done = CliRunner().invoke(cli, [*compared, str(tmp_path / "new.png")])
    assert done.exit_code == 0 and "A is better in prose, code, chat" in done.stdout
    assert "no picture: ValueError: Axis limits" in done.stderr and not (tmp_path / "new.png").exists()


def test_a_picture_that_cannot_be_written_is_an_error(compared: list[str], tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, [*compared, str(tmp_path / f"{'x' * 300}.png")])
    assert done.exit_code == 1 and "File name too long" in str(done.exception)
