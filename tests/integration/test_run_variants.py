"""Runs that quantize anew: another base, another setting, other texts. Each of these three feeds several tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi

from infra.dev.hub.launch import HubStandIn
from requant.tasks.artifact import RECIPE
from requant.tasks.checkpoint.audit import account
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.texts.text import BUILTIN_FOLDER
from tests.factories.fp8_bases import as_fp8
from tests.factories.pico import pico_base
from tests.factories.requant import Outcome, Requant, finish, merge, recipe_for, store_in

STAGES = ["download", "quantize", "mtp_fix", "validate", "benchmark", "publish"]
Finished = tuple[Requant, Outcome]


def fresh(folder: Path, environment: dict[str, str], repo_id: str, target: str | None) -> Requant:
    """`requant` with an empty store."""
    return Requant(folder, {**environment, **store_in(folder)}, recipe_for(repo_id, target))


@pytest.fixture(scope="module")
def regrouped(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The finished run with another group size, and with the default texts."""
    requant = finished[0].copy(tmp_path_factory.mktemp("regrouped"))
    changes = {"quantize": {"calibration": "builtin:mixed", "group_size": 64}, "publish": None}
    requant.recipe = merge(
        requant.recipe, {**changes, "validation": {"text": "builtin:mixed-evaluation", "tokens": 4096}}
    )
    return requant, requant.run()


@pytest.fixture(scope="module")
def headless(environment: dict[str, str], hub: HubStandIn, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A base without a head, calibrated and measured with data sets of the Hub, its speed in torch."""
    folder = tmp_path_factory.mktemp("headless")
    hub.seed("demo/headless", pico_base(folder / "base", layers=1, head=False))
    for name, file, line in (("texts", "train", "def number_{0}():\n"), ("measured", "test", "class Number{0}:\n")):
        (folder / name).mkdir()
        lines = [json.dumps({"text": (line + "    return {0}\n").format(i) * 20}) for i in range(20)]
        (folder / name / f"{file}.jsonl").write_text("\n".join(lines))
        hub.seed(f"demo/{name}", folder / name, repo_type="dataset")
    requant = fresh(folder, environment, "demo/headless", None)
    changes = {"quantize": {"calibration": "demo/texts", "iters": 0}, "validation": {"text": "demo/measured@main"}}
    return requant, requant.run("--checkout", str(folder / "out"), benchmark={"engine": "torch"}, **changes)


@pytest.fixture(scope="module")
def fp8(
    environment: dict[str, str], hub: HubStandIn, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Requant, Path, list[Outcome]]:
    """Two runs of one recipe at once, from an empty store, on an FP8 base."""
    folder = tmp_path_factory.mktemp("fp8")
    base = as_fp8(pico_base(folder / "plain", layers=2), folder / "base")
    hub.seed("demo/pico-fp8", base)
    requant = fresh(folder, environment, "demo/pico-fp8", "me/twice")
    recipe = str(requant.write_recipe())
    out = ["--checkout", str(folder / "out")]
    both = [finish(fork) for fork in [requant.fork("run", recipe, "--json", *more) for more in (out, [])]]
    assert [each.status for each in both] == [0, 0], [each.stderr for each in both]
    return requant, base, both


def test_a_changed_quantize_setting_reuses_the_download_alone(regrouped: Finished) -> None:
    _, outcome = regrouped
    assert outcome.status == 0, outcome.stderr
    assert outcome.states == {"download": "reused", **dict.fromkeys(STAGES[1:5], "ran")}
    assert outcome.document["status"] == "validated"


def test_a_group_size_of_auto_is_the_one_that_it_comes_to(regrouped: Finished) -> None:
    """The largest group that divides 64 and 128 inputs is 64: all of it is made."""
    requant, _ = regrouped
    folder = requant.folder / "auto"
    outcome = requant.run("-v", "--checkout", str(folder), quantize={"group_size": "auto"})
    assert outcome.status == 0, outcome.stderr
    assert set(outcome.states.values()) == {"reused"} and "W4A16 g64" in outcome.stderr
    assert "W4A16, group size 64" in (folder / "README.md").read_text()
    assert yaml.safe_load((folder / RECIPE).read_text())["quantize"]["group_size"] == 64


def test_prose_code_and_chats_go_through_the_bases_template(regrouped: Finished) -> None:
    """The default texts, which are read whole."""
    _, outcome = regrouped
    for what, name in (("calibration", "mixed.jsonl"), ("validation text", "mixed-evaluation.jsonl")):
        chats = (BUILTIN_FOLDER / name).read_text(encoding="utf-8").count('"messages": [')
        assert f"{what}: {chats} chats through the base's chat template" in outcome.stderr
    measured = outcome.document["measured"]
    assert (measured["text"], measured["tokens"]) == ("builtin:mixed-evaluation", 7 * 4096)
    assert {domain["tokens"] for domain in measured["domains"].values()} == {4096}


def test_a_base_without_a_head_goes_through(headless: Finished) -> None:
    requant, outcome = headless
    assert outcome.status == 0, outcome.stderr
    assert "mtp_acceptance_ratio" not in [g["name"] for g in outcome.document["gates"]]
    result = Checkpoint.open(requant.folder / "out").sound()
    assert result.head is None and not result.problems


def test_a_hub_data_set_calibrates_pinned_to_its_commit(headless: Finished, hub: HubStandIn) -> None:
    sha = HfApi(endpoint=hub.url, token=hub.token).dataset_info("demo/texts").sha
    (record,) = (json.loads(p.read_text()) for p in headless[0].store.glob("provenance/quantize/*"))
    assert record["calibration"] == f"demo/texts@{sha}"


def test_quality_is_measured_on_a_hub_data_set_pinned_to_its_commit(headless: Finished, hub: HubStandIn) -> None:
    sha = HfApi(endpoint=hub.url, token=hub.token).dataset_info("demo/measured").sha
    measured = headless[1].document["measured"]
    assert measured["text"] == f"demo/measured@{sha}" and measured["same_tokens"] == 1.0


def test_a_run_measures_its_results_speed(headless: Finished) -> None:
    requant, outcome = headless
    assert outcome.states["benchmark"] == "ran"
    measured = outcome.document["benchmark"]
    assert measured["engine"] == "torch" and measured["tokens_per_second"] > 0 and measured["hardware"]
    assert len(measured["prompts"]) == 3 and all(row["tokens"] == 32 for row in measured["prompts"])
    assert f"{measured['tokens_per_second']:.1f}" in (requant.folder / "out" / "README.md").read_text()


def test_two_runs_of_one_recipe_at_once_do_the_work_once(fp8: tuple[Requant, Path, list[Outcome]]) -> None:
    _, _, both = fp8
    assert both[0].digest == both[1].digest
    for stage in ("download", "quantize", "mtp_fix", "validate", "publish"):
        assert sorted(each.states[stage] for each in both) == ["ran", "reused"], stage


def test_an_fp8_base_goes_through_with_its_head(fp8: tuple[Requant, Path, list[Outcome]]) -> None:
    requant, base, _ = fp8
    folder = requant.folder / "out"
    made = Checkpoint.open(folder).sound()
    found = account(made, Checkpoint.open(base), with_head=True)
    assert (found.unaccounted, found.altered, found.not_finite, found.files) == ([], [], [], [])
    assert {t.dtype for t in made.tensors.values()} == {"BF16", "I32", "F16"}
    inspected = requant("inspect", str(folder), "--json").document
    assert inspected["mtp"]["precision"] == "BF16" and not inspected["problems"]
    assert all(inspected["engines"][name]["loads"] for name in ("vllm", "sglang", "transformers"))
    assert inspected["engines"]["vllm"]["mtp"] and inspected["engines"]["sglang"]["mtp"]


@pytest.mark.slow
def test_two_threads_make_the_same_artifact_each_time(finished: Finished, tmp_path: Path) -> None:
    digests = set()
    for name in ("once", "again"):
        requant = finished[0].copy(tmp_path / name).variant(OMP_NUM_THREADS="2")
        requant.forget("quantize", "mtp_fix")
        recipe = str(requant.write_recipe(publish=None))
        outcome = requant("run", recipe, "--json", new_process=True)
        assert outcome.status == 0, outcome.stderr
        assert (outcome.states["quantize"], outcome.states["mtp_fix"]) == ("ran", "ran")
        digests.add(outcome.digest)
    assert len(digests) == 1
