"""`requant run` as its users meet it: what runs, what is reused, what is published, what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import yaml
from huggingface_hub import HfApi

from infra.hub.launch import HubStandIn
from tasks.artifact import RECIPE
from tasks.checkpoint.account import account
from tasks.checkpoint.checkpoint import Checkpoint
from tasks.checkpoint.header import read_header
from tests.factories.fp8_bases import as_fp8
from tests.factories.pico import pico_base
from tests.factories.requant import LAYERS, Outcome, Requant, finish

STAGES = ["download", "quantize", "mtp_fix", "validate", "benchmark", "publish"]
Finished = tuple[Requant, Outcome]


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
    assert "pictures/losses.png" in shown and set(shown) <= names


def test_a_report_lies_beside_its_markdown_and_pictures(requant: Requant) -> None:
    assert requant.run("--report", str(requant.folder / "told.json"), publish=None).status == 0
    document = json.loads((requant.folder / "told.json").read_text())
    assert document["status"] == "validated" and document["measured"]["perplexity"] > 0
    links = re.findall(r"!\[[^\]]+\]\((.+?)\)", (requant.folder / "told.md").read_text())
    assert "told-pictures/losses.svg" in links and all((requant.folder / link).is_file() for link in links)


def test_a_report_that_would_be_its_own_markdown_is_refused(requant: Requant) -> None:
    outcome = requant.run("--report", str(requant.folder / "told.md"))
    assert outcome.status == 2 and "name the JSON document" in outcome.stderr
    assert not (requant.folder / "told.md").exists()


def test_a_second_run_reuses_every_stage_and_makes_no_commit(requant: Requant, hub: HubStandIn) -> None:
    api = HfApi(endpoint=hub.url, token=hub.token)
    before = [c.commit_id for c in api.list_repo_commits("me/pico")]
    outcome = requant.run()
    assert outcome.status == 0, outcome.stderr
    assert set(outcome.states.values()) == {"reused"}
    assert [c.commit_id for c in api.list_repo_commits("me/pico")] == before


def test_a_changed_quantize_setting_reuses_the_download_alone(requant: Requant, finished: Finished) -> None:
    outcome = requant.run(quantize={"group_size": 64}, publish=None)
    assert outcome.status == 0, outcome.stderr
    assert outcome.states == {"download": "reused", **dict.fromkeys(STAGES[1:5], "ran")}
    assert outcome.document["status"] == "validated"
    folder = requant.folder / "auto"  # the largest group that divides 64 and 128 inputs is 64: all of it is made
    outcome = requant.run("--checkout", str(folder), quantize={"group_size": "auto"}, publish=None)
    assert outcome.status == 0, outcome.stderr
    assert set(outcome.states.values()) == {"reused"} and "W4A16 g64" in outcome.stderr
    assert "W4A16, group size 64" in (folder / "README.md").read_text()
    assert yaml.safe_load((folder / RECIPE).read_text())["quantize"]["group_size"] == 64


def test_prose_code_and_chats_go_through_the_bases_template(requant: Requant) -> None:
    """The default texts."""
    texts = {"quantize": {"calibration": "builtin:mixed"}, "validation": {"text": "builtin:mixed-evaluation"}}
    outcome = requant.run("--report", str(requant.folder / "told.json"), **texts, publish=None)
    assert outcome.status == 0, outcome.stderr
    assert (outcome.states["quantize"], outcome.states["validate"]) == ("ran", "ran")
    assert "calibration: 383 chats through the base's chat template" in outcome.stderr
    assert "validation text: 40 chats through the base's chat template" in outcome.stderr
    measured = json.loads((requant.folder / "told.json").read_text())["measured"]
    assert (measured["text"], measured["tokens"]) == ("builtin:mixed-evaluation", 24 * 512)


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


def test_a_changed_limit_measures_nothing_again_and_a_failed_gate_publishes_nothing(
    requant: Requant, hub: HubStandIn
) -> None:
    gates = {"min_top1_agreement": 1.0}
    outcome = requant.run(gates=gates, publish={"repo_id": "me/rejected"})
    assert outcome.status == 1
    assert outcome.document["status"] == "rejected"
    assert outcome.document["published"] is None
    assert outcome.states == dict.fromkeys(STAGES[:4], "reused")  # nor is its speed measured
    assert [g["name"] for g in outcome.document["gates"] if not g["passed"]] == ["top1_agreement"]
    assert not HfApi(endpoint=hub.url, token=hub.token).repo_exists("me/rejected")


def test_a_new_readme_in_the_base_quantizes_and_publishes_nothing_again(
    requant: Requant, hub: HubStandIn, base: Path, tmp_path: Path
) -> None:
    hub.seed("demo/readme", base)
    first = requant.run(base={"repo_id": "demo/readme"})
    assert first.states["quantize"] == "reused"  # the same files in another repo
    folder = tmp_path / "edited"
    shutil.copytree(base, folder)
    (folder / "README.md").write_text("# pico, better described\n")
    sha = hub.seed("demo/readme", folder)
    hub.reset_traffic()
    second = requant.run(base={"repo_id": "demo/readme"})
    assert second.document["base"]["sha"] == sha
    assert second.states == {"download": "ran", **dict.fromkeys(STAGES[1:], "reused")}
    fetched = [t["path"] for t in hub.traffic() if t["method"] == "GET" and "/demo/readme/resolve/" in t["path"]]
    assert [path.rsplit("/", 1)[1] for path in fetched] == ["README.md"]


def test_a_new_shard_in_the_base_moves_that_shard_alone(
    requant: Requant, hub: HubStandIn, base: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "retrained"
    shutil.copytree(base, folder)
    name = "model-00002-of-00002.safetensors"
    norm = next(t for t in read_header(folder / name).values() if t.name == "mtp.norm.weight")
    with (folder / name).open("r+b") as stream:
        stream.seek(norm.begin)
        stream.write(np.full(norm.nbytes // 2, 0x3F80, "<u2").tobytes())  # 1.0 in BF16
    hub.seed("demo/shard", base)
    assert requant.run(base={"repo_id": "demo/shard"}, publish=None).states["quantize"] == "reused"
    hub.seed("demo/shard", folder)
    hub.reset_traffic()
    outcome = requant.run(base={"repo_id": "demo/shard"}, publish=None)
    assert outcome.status == 0, outcome.stderr
    assert outcome.states == dict.fromkeys(STAGES[:5], "ran") | {"benchmark": "ran"}
    fetched = {t["path"].rsplit("/", 1)[1] for t in hub.traffic() if t["method"] == "GET" and "/resolve/" in t["path"]}
    assert fetched == {name}


def test_two_runs_of_one_recipe_at_once_do_the_work_once(requant: Requant) -> None:
    requant.forget("download", "quantize", "mtp_fix", "validate")
    path = requant.write_recipe(publish={"repo_id": "me/twice"})
    both = [finish(p) for p in [requant.start("run", str(path), "--json") for _ in range(2)]]
    assert [b.status for b in both] == [0, 0], [b.stderr for b in both]
    assert both[0].digest == both[1].digest
    for stage in ("download", "quantize", "mtp_fix", "validate", "publish"):
        assert sorted(b.states[stage] for b in both) == ["ran", "reused"], stage


def test_a_base_without_a_head_goes_through(requant: Requant, hub: HubStandIn, tmp_path: Path) -> None:
    hub.seed("demo/headless", pico_base(tmp_path / "headless", layers=2, head=False))
    outcome = requant.run("--checkout", str(tmp_path / "out"), base={"repo_id": "demo/headless"}, publish=None)
    assert outcome.status == 0, outcome.stderr
    assert "mtp_acceptance_ratio" not in [g["name"] for g in outcome.document["gates"]]
    assert Checkpoint.open(tmp_path / "out").sound().head is None


def test_an_fp8_base_goes_through_with_its_head(requant: Requant, hub: HubStandIn, base: Path, tmp_path: Path) -> None:
    fp8 = as_fp8(base, tmp_path / "fp8")
    hub.seed("demo/pico-fp8", fp8)
    outcome = requant.run("--checkout", str(tmp_path / "out"), base={"repo_id": "demo/pico-fp8"}, publish=None)
    assert outcome.status == 0, outcome.stderr
    made = Checkpoint.open(tmp_path / "out").sound()
    found = account(made, Checkpoint.open(fp8), with_head=True)
    assert (found.unaccounted, found.altered, found.not_finite, found.files) == ([], [], [], [])
    assert {t.dtype for t in made.tensors.values()} == {"BF16", "I32", "F16"}
    inspected = requant("inspect", str(tmp_path / "out"), "--json").document
    assert inspected["mtp"]["precision"] == "BF16" and not inspected["problems"]
    assert all(inspected["engines"][name]["loads"] for name in ("vllm", "sglang", "transformers"))
    assert inspected["engines"]["vllm"]["mtp"] and inspected["engines"]["sglang"]["mtp"]


def test_a_hub_data_set_calibrates_pinned_to_its_commit(requant: Requant, hub: HubStandIn, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    lines = [json.dumps({"text": f"def number_{i}():\n    return {i}\n" * 20}) for i in range(20)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(lines))
    sha = hub.seed("demo/texts", tmp_path / "data", repo_type="dataset")
    outcome = requant.run(quantize={"calibration": "demo/texts", "iters": 0}, publish=None)
    assert outcome.status == 0, outcome.stderr
    provenance = [json.loads(p.read_text()) for p in requant.store.glob("provenance/quantize/*")]
    assert f"demo/texts@{sha}" in [record["calibration"] for record in provenance]


def test_quality_is_measured_on_a_hub_data_set_pinned_to_its_commit(
    requant: Requant, hub: HubStandIn, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    lines = [json.dumps({"text": f"class Number{i}:\n    value = {i}\n" * 20}) for i in range(20)]
    (tmp_path / "data" / "test.jsonl").write_text("\n".join(lines))
    sha = hub.seed("demo/measured", tmp_path / "data", repo_type="dataset")
    outcome = requant.run(validation={"text": "demo/measured@main"}, publish=None)
    assert outcome.status == 0, outcome.stderr
    assert outcome.states["quantize"] == "reused" and outcome.states["validate"] == "ran"
    measured = outcome.document["measured"]
    assert measured["text"] == f"demo/measured@{sha}" and measured["same_tokens"] == 1.0


def test_a_model_that_requant_did_not_make_is_not_replaced(requant: Requant, hub: HubStandIn, base: Path) -> None:
    sha = hub.seed("me/precious", base)
    outcome = requant.run(publish={"repo_id": "me/precious"})
    assert outcome.status == 1
    assert "me/precious holds a model that Requant did not make" in outcome.document["error"]
    assert HfApi(endpoint=hub.url, token=hub.token).model_info("me/precious").sha == sha
