"""Two outputs of one base in one run: what they share, what each has of its own, what one does to the other."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import yaml
from huggingface_hub import HfApi

from infra.dev.hub.launch import HubStandIn
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.recipe.loader import parse_recipe
from tests.factories.pico import pico_base
from tests.factories.requant import Outcome, Requant, artifacts, recipe_for, store_in

BASE = "demo/two"
FOUR, EIGHT = "W4A16G32-auto_gptq-best", "eight"
KEYS = ["w4a16g32-auto-gptq-best", "eight"]  # of Prefect's artifacts
REPOS = {FOUR: f"me/two-{FOUR}", EIGHT: "me/eight"}
FEW = {"iters": 2, "nsamples": 4, "seqlen": 64, "batch_size": 4}
OUTPUTS: list[dict[str, Any]] = [
    {"format": "auto_round:auto_gptq", "preset": "auto-round-best", **FEW},
    {"name": EIGHT, "scheme": "W8A16", "repo_id": "me/eight"},
]
STAGES = ["download", "self_calibration", "quantize", "mtp_fix", "validate", "benchmark", "publish"]


@dataclass(frozen=True)
class Two:
    """One undisturbed run of two outputs, and what others saw of it."""

    requant: Requant
    outcome: Outcome
    traffic: list[dict[str, Any]]  # what the Hub was asked
    made: dict[str, int]  # how many artifacts of each stage the store has
    shown: dict[str, list[dict[str, Any]]]  # Prefect's artifacts by key
    tasks: list[dict[str, Any]]  # the task runs of the second output


@pytest.fixture(scope="module")
def two(
    tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str], hub: HubStandIn, prefect_server: str
) -> Two:
    """The run; what others saw of it is noted before a test runs the same recipe again."""
    folder = tmp_path_factory.mktemp("two")
    hub.seed(BASE, pico_base(folder / "base", layers=2))
    recipe = {**recipe_for(BASE, "me/two"), "outputs": OUTPUTS}
    recipe["quantize"]["calibration"] = "self"
    requant = Requant(folder, {**environment, **store_in(folder)}, recipe)
    hub.reset_traffic()
    outcome = requant.run("--checkout", str(folder / "out"), "--report", str(folder / "told.json"))
    assert outcome.status == 0, outcome.stderr
    traffic = hub.traffic()
    made = {path.name: len(list(path.iterdir())) for path in (requant.store / "artifacts").iterdir()}
    keys = [f"requant-{kind}-{key}" for kind in ("gates", "report") for key in KEYS]
    shown = {key: artifacts(prefect_server, key) for key in [*keys, "requant-report"]}
    body = {"task_runs": {"name": {"like_": f"{EIGHT}-"}}}
    tasks = httpx.post(f"{prefect_server}/task_runs/filter", json=body).raise_for_status().json()
    return Two(requant, outcome, traffic, made, shown, tasks)


def by_output(outcome: Outcome) -> dict[str, dict[str, str]]:
    """The state of each stage, by output."""
    outputs = outcome.document["outputs"]
    return {each["name"]: {stage["name"]: stage["state"] for stage in each["stages"]} for each in outputs}


def commits(hub: HubStandIn) -> dict[str, list[str]]:
    api = HfApi(endpoint=hub.url, token=hub.token)
    return {repo: [commit.commit_id for commit in api.list_repo_commits(repo)] for repo in REPOS.values()}


def test_the_base_is_downloaded_and_measured_once_for_two_results(two: Two) -> None:
    document = two.outcome.document
    assert document["status"] == "published"
    states = by_output(two.outcome)
    assert list(states) == [FOUR, EIGHT]
    assert states[FOUR] == dict.fromkeys(STAGES, "ran")
    assert states[EIGHT]["download"] == "reused" and states[EIGHT]["quantize"] == "ran"
    fetched = [
        t["path"] for t in two.traffic if t["method"] == "GET" and t["status"] == 200 and "/resolve/" in t["path"]
    ]
    whole = Counter(path for path in fetched if f"/{BASE}/resolve/" in path and path.endswith(".safetensors"))
    assert whole and set(whole.values()) == {1}
    assert two.made["download"] == 1
    results = {each["artifact"]["digest"] for each in document["outputs"]}
    assert two.made["measure"] == 1 + len(results)  # the base, and each result


def test_the_base_writes_its_calibration_text_once_for_two_results(two: Two) -> None:
    """It writes it after it is downloaded, and nothing else stays of it; the records of both say so."""
    assert by_output(two.outcome)[EIGHT]["self_calibration"] == "reused" and two.made["self_calibration"] == 1
    assert "transformers" in two.outcome.stderr and "writes calibration text" in two.outcome.stderr
    assert not list((two.requant.store / "work").glob("self_calibration-*"))
    for name in (FOUR, EIGHT):
        records = json.loads((two.requant.folder / "out" / name / "requant.json").read_text())["provenance"]
        assert records["self_calibration"]["rows"] == records["quantize"]["sources"][0]["rows"] > 4
        assert records["quantize"]["sources"][0]["source"] == "self"


def test_each_result_is_what_its_line_says(two: Two) -> None:
    requant = two.requant
    for name, bits, iters in ((FOUR, 4, 2), (EIGHT, 8, 1)):
        made = Checkpoint.open(requant.folder / "out" / name).sound()
        assert not made.problems and made.head is not None
        assert made.config["quantization_config"]["bits"] == bits
        published = (requant.folder / "out" / name / "recipe.yaml").read_text()
        assert parse_recipe(yaml.safe_load(published)).quantize.iters == iters


def test_each_goes_to_a_repo_of_its_own_with_a_card_that_names_the_other(two: Two, hub: HubStandIn) -> None:
    requant, outcome = two.requant, two.outcome
    api = HfApi(endpoint=hub.url, token=hub.token)
    published = {each["name"]: each["published"] for each in outcome.document["outputs"]}
    assert {name: release["repo_id"] for name, release in published.items()} == REPOS
    for name, repo in REPOS.items():
        card = (requant.folder / "out" / name / "README.md").read_text()
        section = card.split("## Other quantizations of this base")[1].split("\n## ")[0]
        assert {other for other in REPOS.values() if f"[{other}]" in section} == set(REPOS.values()) - {repo}
        assert api.list_repo_commits(repo)[0].commit_id == published[name]["commit"]
        recipe = (requant.folder / "out" / name / "recipe.yaml").read_text()
        assert "outputs" not in recipe and f"repo_id: {repo}" in recipe


def test_the_report_compares_them_and_prefect_has_gates_and_a_report_of_each(two: Two) -> None:
    folder = two.requant.folder
    assert json.loads((folder / "told.json").read_text()) == two.outcome.document
    text = (folder / "told.md").read_text()
    links = re.findall(r"!\[[^\]]+\]\((.+?)\)", text)
    assert f"told-pictures/{EIGHT}/losses.svg" in links and all((folder / link).is_file() for link in links)
    for key in KEYS:
        (gates,) = two.shown[f"requant-gates-{key}"]
        assert "structure" in gates["data"] and len(two.shown[f"requant-report-{key}"]) == 1
    (shown,) = two.tasks
    assert (shown["state"]["type"], shown["state"]["name"]) == ("COMPLETED", "Published")
    assert any(FOUR in a["data"] and "draft acceptance" in a["data"] for a in two.shown["requant-report"])


def test_the_plan_knows_all_of_it_and_the_second_run_reuses_all(two: Two, hub: HubStandIn) -> None:
    requant = two.requant
    before = commits(hub)
    planning = requant("plan", str(requant.write_recipe()), "--json")
    assert planning.status == 0, planning.stdout
    document = planning.document
    assert {stage["state"] for stage in document["stages"]} == {"reused"}
    assert [each["repo_id"] for each in document["outputs"]] == list(REPOS.values())
    for each in document["outputs"]:
        folder = requant.folder / "out" / each["name"]
        assert all((folder / path).stat().st_size == size for path, size in each["output"]["files"].items())
    outcome = requant.run()
    assert outcome.status == 0, outcome.stderr
    assert all(set(states.values()) == {"reused"} for states in by_output(outcome).values())
    assert commits(hub) == before
    (requant.folder / "recipes").mkdir()
    requant.write_recipe().rename(requant.folder / "recipes" / "two.yaml")
    watched = requant("watch", "--once", "--recipes", str(requant.folder / "recipes"), "--json")
    assert watched.document == {"checked": 1, "started": [], "problems": []}  # the run knows itself by the whole recipe


def test_one_that_is_rejected_stops_not_the_next_and_the_run_is_as_the_worst(two: Two, hub: HubStandIn) -> None:
    """Four bits lose more than eight: the limit lies between."""
    requant, first = two.requant, two.outcome
    values = {each["name"]: each["measured"]["kl_divergence"] for each in first.document["outputs"]}
    assert values[EIGHT] < values[FOUR]
    limit = (values[EIGHT] + values[FOUR]) / 2
    outcome = requant.run(gates={"max_kl_divergence": limit})
    assert outcome.status == 1
    document = outcome.document
    assert document["status"] == "rejected"
    assert {each["name"]: each["status"] for each in document["outputs"]}[EIGHT] == "published"
    assert document["outputs"][0]["status"] == "rejected"
    assert [each["published"] is None for each in document["outputs"]] == [True, False]
    assert f"{FOUR} rejected (nothing was published: kl_divergence failed)" in outcome.stderr


def test_one_that_fails_stops_not_the_next_and_the_next_run_makes_what_is_missing(two: Two, hub: HubStandIn) -> None:
    requant = two.requant
    outputs = [{**OUTPUTS[0], "repo_id": "me/refusing"}, OUTPUTS[1]]
    hub.fault("/api/models/me/refusing/(preupload|commit)", times=None, status=403)
    outcome = requant.run(outputs=outputs)
    assert outcome.status == 1 and "Traceback" not in outcome.stderr
    document = outcome.document
    assert document["status"] == "failed" and f"{FOUR} failed (" in document["error"]
    assert [each["status"] for each in document["outputs"]] == ["failed", "published"]
    hub.clear_faults()
    again = requant.run(outputs=outputs)
    assert again.status == 0, again.stderr
    assert [states["publish"] for states in by_output(again).values()] == ["ran", "reused"]


def test_what_the_plan_refuses_in_one_stops_all_before_the_first_byte(two: Two, hub: HubStandIn) -> None:
    requant = two.requant
    outputs = [OUTPUTS[0], {**OUTPUTS[1], "group_size": 1024}]
    path = str(requant.write_recipe(outputs=outputs))
    planning = requant("plan", path, "--json")
    assert planning.status == 1
    (problem,) = planning.document["problems"]
    assert problem.startswith(f"{EIGHT}: quantize.group_size 1024 does not divide the 64 inputs of")
    outcome = requant("run", path, "--json")
    assert outcome.status == 1 and outcome.document["error"] == problem
    assert outcome.document["outputs"] == [] and outcome.document["status"] == "failed"
