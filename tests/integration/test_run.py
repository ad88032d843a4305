"""`requant run` as its users meet it: what runs, what is reused, what is published, what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import httpx
import numpy as np
import pytest
from huggingface_hub import HfApi

from infra.dev.hub.launch import HubStandIn
from requant.tasks.checkpoint.audit import account
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.header import read_header
from requant.tasks.download import download
from requant.tasks.hub.revision import resolve
from requant.tasks.store import open_store
from tests.factories.requant import LAYERS, Outcome, Requant

STAGES = ["download", "quantize", "mtp_fix", "validate", "benchmark", "publish"]
THEIRS = ("README.md", "requant.json", ".gitattributes", "notes.md")  # files of a user's own
Finished = tuple[Requant, Outcome]


@pytest.fixture(scope="module")
def again(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The same run for the second time, with a report."""
    requant = finished[0].copy(tmp_path_factory.mktemp("again"))
    return requant, requant.run("--report", str(requant.folder / "told.json"))


@pytest.fixture(scope="module")
def rejected(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run with a limit that its result does not keep, laid by force into a folder that holds files of the user's."""
    requant = finished[0].copy(tmp_path_factory.mktemp("rejected"))
    folder = requant.folder / "laid"
    folder.mkdir()
    for name in THEIRS:
        (folder / name).write_text("before")
    changes = {"gates": {"min_top1_agreement": 1.0}, "publish": {"repo_id": "me/rejected"}}
    return requant, requant.run("--checkout", str(folder), "--force", **changes)


def test_a_first_run_runs_every_stage_and_publishes(finished: Finished) -> None:
    _, outcome = finished
    document = outcome.document
    assert list(document)[:7] == ["status", "base", "artifact", "stages", "gates", "benchmark", "published"]
    assert document["status"] == "published"
    assert [(s["name"], s["state"]) for s in document["stages"]] == [(name, "ran") for name in STAGES]
    assert all(gate["passed"] for gate in document["gates"])


def test_the_result_is_whole_lossless_and_has_the_head_bit_for_bit(finished: Finished, base: Path) -> None:
    requant, _ = finished
    result = Checkpoint.open(requant.folder / "checkout").sound()
    assert not result.problems
    found = account(result, Checkpoint.open(base), with_head=True)
    assert (found.unaccounted, found.altered, found.not_finite, found.files) == ([], [], [], [])
    # Six matrices in a linear-attention block besides in_proj_a and in_proj_b, seven in a full one.
    assert found.packed == 6 * (LAYERS - 1) + 7
    head = read_header(result.folder / "model-mtp.safetensors")
    source = Checkpoint.open(base).tensors
    assert set(head) == {n for n in source if n.startswith("mtp.")}
    assert all(t.read() == source[n].read() and t.dtype == source[n].dtype for n, t in head.items())


def test_config_and_index_of_the_result_say_the_truth(finished: Finished) -> None:
    requant, _ = finished
    folder = requant.folder / "checkout"
    config = json.loads((folder / "config.json").read_text())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert config["quantization_config"] == json.loads((folder / "quantization_config.json").read_text())
    assert config["quantization_config"]["extra_config"][".*mtp.*"]["bits"] == 16
    assert config["quantization_config"]["extra_config"]["mtp.fc"]["bits"] == 16
    held = {n: t for shard in folder.glob("*.safetensors") for n, t in read_header(shard).items()}
    assert set(held) == set(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in held.values())


def test_what_is_published_is_the_artifact_with_a_card_and_a_tag(finished: Finished, hub: HubStandIn) -> None:
    requant, outcome = finished
    api = HfApi(endpoint=hub.url, token=hub.token)
    names = set(api.list_repo_files("me/pico"))
    folder = requant.folder / "checkout"
    checkout = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert names == checkout | {".gitattributes"}
    refs = api.list_repo_refs("me/pico")
    published = outcome.document["published"]
    assert [b.name for b in refs.branches] == ["main"]
    sha, digest = outcome.document["base"]["sha"], outcome.digest
    assert [(t.name, t.target_commit) for t in refs.tags] == [(f"{sha[:7]}-{digest[:7]}", published["commit"])]
    card = (requant.folder / "checkout" / "README.md").read_text()
    assert "license: apache-2.0" in card and "base_model: demo/pico" in card and digest in card
    shown = re.findall(r"!\[[^\]]+\]\((.+?)\)", card)
    assert "pictures/block-errors.png" in shown and set(shown) <= names
    assert "pictures/losses.png" in names and "pictures/losses.png" not in shown  # It is in report.md alone.


def test_a_report_that_would_be_its_own_markdown_is_refused(requant: Requant) -> None:
    outcome = requant.run("--report", str(requant.folder / "told.md"))
    assert outcome.status == 2 and "name the JSON document" in outcome.stderr
    assert not (requant.folder / "told.md").exists()


def test_dropping_the_head_reuses_quantize(requant: Requant) -> None:
    outcome = requant.run("--checkout", str(requant.folder / "out"), mtp="drop", publish=None)
    assert outcome.status == 0, outcome.stderr
    assert outcome.states == {
        **dict.fromkeys(STAGES[:2], "reused"),
        **dict.fromkeys(STAGES[2:5], "ran"),
    }
    result = Checkpoint.open(requant.folder / "out").sound()
    assert result.head is None and not result.problems
    assert result.text_config["mtp_num_hidden_layers"] == 0
    assert "mtp" not in json.dumps(result.config["quantization_config"])


def test_a_model_that_requant_did_not_make_is_not_replaced(requant: Requant, hub: HubStandIn, base: Path) -> None:
    sha = hub.seed("me/precious", base)
    outcome = requant.run(publish={"repo_id": "me/precious"})
    assert outcome.status == 1
    assert "me/precious holds a model that Requant did not make" in outcome.document["error"]
    assert HfApi(endpoint=hub.url, token=hub.token).model_info("me/precious").sha == sha


def test_a_second_run_reuses_every_stage_and_makes_no_commit(
    finished: Finished, again: Finished, hub: HubStandIn
) -> None:
    _, outcome = again
    assert outcome.status == 0, outcome.stderr
    assert set(outcome.states.values()) == {"reused"}
    first = finished[1].document["published"]["commit"]
    assert outcome.document["published"]["commit"] == first
    assert HfApi(endpoint=hub.url, token=hub.token).list_repo_commits("me/pico")[0].commit_id == first


def test_a_reused_stage_says_so_in_prefect(again: Finished, prefect_server: str) -> None:
    body = {"task_runs": {"state": {"name": {"any_": ["Reused"]}}}, "limit": 200}
    runs = httpx.post(f"{prefect_server}/task_runs/filter", json=body).raise_for_status().json()
    assert any(run["name"].startswith("quantize") for run in runs)


def test_a_report_lies_beside_its_markdown_and_pictures(again: Finished) -> None:
    requant, outcome = again
    document = json.loads((requant.folder / "told.json").read_text())
    assert document == outcome.document
    assert document["status"] == "published" and document["measured"]["perplexity"] > 0
    links = re.findall(r"!\[[^\]]+\]\((.+?)\)", (requant.folder / "told.md").read_text())
    assert "told-pictures/losses.svg" in links and all((requant.folder / link).is_file() for link in links)


def test_a_changed_limit_measures_nothing_again_and_a_failed_gate_publishes_nothing(
    rejected: Finished, hub: HubStandIn
) -> None:
    _, outcome = rejected
    assert outcome.status == 1
    assert outcome.document["status"] == "rejected"
    assert outcome.document["published"] is None
    assert outcome.states == dict.fromkeys(STAGES[:4], "reused")  # nor is its speed measured
    assert [g["name"] for g in outcome.document["gates"] if not g["passed"]] == ["top1_agreement"]
    assert not HfApi(endpoint=hub.url, token=hub.token).repo_exists("me/rejected")


def test_a_rejected_run_forced_into_a_users_folder_takes_no_file_of_theirs_away(rejected: Finished) -> None:
    folder = rejected[0].folder / "laid"
    assert Checkpoint.open(folder).tensors
    left = {(folder / name).read_text() for name in THEIRS}
    assert left == {"before"}, "a rejected result has no card that would take the place of theirs"


def test_a_folder_that_holds_a_users_files_is_refused_without_force(requant: Requant) -> None:
    (requant.folder / "laid").mkdir()
    (requant.folder / "laid" / "README.md").write_text("before")
    assert requant.run("--checkout", str(requant.folder / "laid"), publish=None).status == 2
    assert [path.read_text() for path in (requant.folder / "laid").iterdir()] == ["before"]


def test_a_new_readme_in_the_base_quantizes_and_publishes_nothing_again(
    requant: Requant, hub: HubStandIn, base: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "edited"
    shutil.copytree(base, folder)
    (folder / "README.md").write_text("# pico, better described\n")
    sha = hub.seed("demo/pico", folder, revision="described")
    hub.reset_traffic()
    outcome = requant.run(base={"revision": "described"})
    assert outcome.status == 0, outcome.stderr
    assert outcome.document["base"]["sha"] == sha
    assert outcome.states == {"download": "ran", **dict.fromkeys(STAGES[1:], "reused")}
    fetched = [t["path"] for t in hub.traffic() if t["method"] == "GET" and "/demo/pico/resolve/" in t["path"]]
    assert [path.rsplit("/", 1)[1] for path in fetched] == ["README.md"]


def test_a_new_shard_in_the_base_moves_that_shard_alone(
    requant: Requant, hub: HubStandIn, hub_here: None, base: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "retrained"
    shutil.copytree(base, folder)
    name = "model-00002-of-00002.safetensors"
    norm = next(t for t in read_header(folder / name).values() if t.name == "mtp.norm.weight")
    with (folder / name).open("r+b") as stream:
        stream.seek(norm.begin)
        stream.write(np.full(norm.nbytes // 2, 0x3F80, "<u2").tobytes())  # 1.0 in BF16
    hub.seed("demo/shard", folder)
    hub.reset_traffic()
    assert download(open_store(requant.environment["REQUANT_STORE"]), resolve("demo/shard")).state == "ran"
    fetched = {t["path"].rsplit("/", 1)[1] for t in hub.traffic() if t["method"] == "GET" and "/resolve/" in t["path"]}
    assert fetched == {name}
    planned = requant("plan", str(requant.write_recipe(base={"repo_id": "demo/shard"}, publish=None)), "--json")
    states = {stage["name"]: stage["state"] for stage in planned.document["stages"]}
    assert states == {"download": "reused", **dict.fromkeys(STAGES[1:5], "run")}
