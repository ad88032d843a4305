"""`requant plan` against a Hub: what it fetches, what it foretells, what it refuses; and the same before a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from infra.bench.shapes import write_base
from infra.dev.hub.launch import Exchange, HubStandIn
from requant.flows.report.plan import plan_text
from requant.tasks.artifact import RELEASE, RELEASE_FILES
from requant.tasks.planning.document import PlanDocument
from tests.factories.checkpoints import write_quantized
from tests.factories.forked import forked
from tests.factories.paths import ROOT
from tests.factories.pico import pico_base
from tests.factories.requant import Outcome, Requant, artifacts, finish, store_in

Finished = tuple[Requant, Outcome]
STAGES = ["download", "quantize", "mtp_fix", "validate", "benchmark"]
RECIPE_27B = ROOT / "deployments" / "recipes" / "qwen3.6-27b-int4.yaml"


def weights(traffic: list[Exchange]) -> list[Exchange]:
    return [each for each in traffic if each["path"].endswith(".safetensors")]


@pytest.fixture(scope="module")
def planned(hub: HubStandIn, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The plan of the 27 B recipe, and what was asked of the Hub for it."""
    folder = tmp_path_factory.mktemp("27b")
    hub.seed("Qwen/Qwen3.6-27B", write_base(folder / "base", data=False), headers_only=True)
    (folder / "texts").mkdir()
    (folder / "texts" / "train.txt").write_text("text")
    hub.seed("NeelNanda/pile-10k", folder / "texts", repo_type="dataset")
    hub.reset_traffic()
    requant = Requant(folder, {**environment, **store_in(folder)})
    outcome = requant("plan", str(RECIPE_27B), "--elsewhere", "--json", "--markdown", str(folder / "plan.md"))
    assert outcome.status == 0, outcome.stderr
    text = (folder / "plan.md").read_text()
    return {"document": outcome.document, "traffic": hub.traffic(), "store": folder / "store", "markdown": text}


def test_the_27b_plan_has_the_contracts_keys_and_the_known_size(planned: dict[str, Any]) -> None:
    document = planned["document"]
    jsonschema.validate(document, PlanDocument.model_json_schema(mode="serialization"))
    assert list(document)[:4] == ["base", "stages", "output", "needs"] and document["problems"] == []
    assert [s["name"] for s in document["stages"]] == [*STAGES, "publish"]
    assert all({"name", "state", "bytes", "seconds"} <= set(stage) for stage in document["stages"])
    assert 19.0e9 < document["output"]["bytes"] < 20.0e9
    assert sum(document["output"]["shards"].values()) == document["output"]["weights_bytes"]
    assert (document["output"]["quantized_tensors"], document["output"]["kept_tensors"]) == (400, 799)
    assert document["engines"]["vllm"]["mtp"] and document["engines"]["sglang"]["mtp"]
    assert 100e9 < document["needs"]["disk_bytes"] < 160e9 and document["needs"]["vram_bytes"] < 32e9
    assert document["needs"]["low_gpu_mem"]["vram_bytes"] < document["needs"]["vram_bytes"]


def test_every_layer_that_is_not_packed_is_named_with_a_reason(planned: dict[str, Any]) -> None:
    kept = {group["tensors"]: group["why"] for group in planned["document"]["output"]["kept"]}
    layers = "model.language_model.layers.*"
    for name in ("in_proj_a.weight", "in_proj_b.weight", "conv1d.weight", "norm.weight", "A_log", "dt_bias"):
        assert kept[f"{layers}.linear_attn.{name}"]
    for name in ("lm_head.weight", "model.language_model.embed_tokens.weight", "model.visual.*", "mtp.*"):
        assert kept[name]
    assert all(why != "not a matrix of a decoder block" for why in kept.values())


def test_the_27b_plan_costs_what_was_measured_on_the_recipes_gpu(planned: dict[str, Any]) -> None:
    quantize = planned["document"]["stages"][1]
    assert "measured on NVIDIA H100" in quantize["figure"] and 1000 < quantize["seconds"] < 2000
    assert quantize["cost"] == pytest.approx(2.5 * quantize["seconds"] / 3600, rel=1e-3)
    assert planned["document"]["hardware"]["cost"] > quantize["cost"]


def test_a_plan_asks_for_headers_in_few_requests_and_never_for_a_weight(planned: dict[str, Any]) -> None:
    traffic = planned["traffic"]
    assert len(traffic) <= 20 and sum(t["bytes_out"] for t in traffic) < 1_000_000
    shards = weights(traffic)
    assert len(shards) <= 14 and all(t["status"] == 206 and t["bytes_out"] <= 32 << 10 for t in shards)
    assert not planned["store"].exists()  # nothing is changed


def test_the_stand_in_serves_nothing_of_a_header_only_file_but_ranges(planned: dict[str, Any], hub: HubStandIn) -> None:
    import httpx

    url = f"{hub.url}{weights(planned['traffic'])[0]['path']}"
    assert httpx.get(url).status_code == 400
    end = httpx.get(url, headers={"Range": "bytes=4000000000-4000000999"})
    assert end.status_code == 206 and end.content == bytes(1000)
    stored = sum(512 * p.stat().st_blocks for p in (hub.state / "repos" / "models" / "Qwen").rglob("*") if p.is_file())
    assert stored < 5_000_000


def test_the_markdown_is_what_a_pull_request_shows(planned: dict[str, Any]) -> None:
    text = planned["markdown"]
    assert "qwen3.6-27b-int4.yaml: would run" in text and "| quantize | run |" in text and "`mtp.*`" in text


def test_the_plan_in_the_documentation_is_this_one(planned: dict[str, Any]) -> None:
    page = (ROOT / "docs" / "explanation" / "plan.md").read_text()
    shown = page.split("int4.yaml --elsewhere\n")[1].split("```")[0].splitlines()
    now = {line.rstrip() for line in plan_text(PlanDocument.model_validate(planned["document"])).splitlines()}
    assert [line for line in shown if line not in {*now, "..."}] == []


def test_the_plan_of_a_finished_run_reuses_all_and_knew_every_file(finished: Finished, hub: HubStandIn) -> None:
    requant, outcome = finished
    hub.reset_traffic()
    planning = requant("plan", str(requant.write_recipe()), "--json")
    assert planning.status == 0, planning.stderr
    document = planning.document
    assert {s["name"]: s["state"] for s in document["stages"]} == dict.fromkeys([*STAGES, "publish"], "reused")
    assert document["transfer"] == {"download_bytes": 0, "upload_bytes": 0}
    # All of the base is on this machine. What the target holds is read, as a run does before it begins.
    assert {t["path"].rpartition("/")[2] for t in hub.traffic() if "/resolve/" in t["path"]} <= {RELEASE}
    folder = requant.folder / "checkout"
    card = (*RELEASE_FILES, "pictures/")
    made = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    assert {path: size for path, size in made.items() if not path.startswith(card)} == document["output"]["files"]
    measured = outcome.document["measured"]
    output = document["output"]
    assert (output["quantized_tensors"], output["kept_tensors"]) == (
        measured["packed"],
        measured["kept"] + measured["head"],
    )


def test_a_run_takes_no_more_disk_than_its_plan_says(finished: Finished, tmp_path: Path) -> None:
    requant, _ = finished
    before = requant.variant(REQUANT_STORE=(tmp_path / "empty").as_uri())
    planned = before("plan", str(requant.write_recipe()), "--json").document["needs"]["disk_bytes"]
    files = [path.lstat() for path in requant.store.rglob("*") if path.is_file()]
    left = sum({status.st_ino: status.st_size for status in files}.values())
    assert left <= planned < 3 * left


def test_a_changed_recipe_runs_from_the_stage_that_reads_the_change(requant: Requant) -> None:
    states = {}
    for name, changes in {
        "text": {"validation": {"text": "builtin:mixed-evaluation"}},
        "mtp": {"mtp": "drop"},
        "quantize": {"quantize": {"seed": 1}},
    }.items():
        document = requant("plan", str(requant.write_recipe(**changes)), "--json").document
        states[name] = [stage["state"] for stage in document["stages"]]
        assert all("an earlier run on cpu" in s["figure"] for s in document["stages"][2:5] if s["name"] == "validate")
    assert states["text"][:5] == ["reused", "reused", "reused", "run", "reused"]
    assert states["mtp"] == ["reused", "reused", "run", "run", "run", "run"]
    assert states["quantize"] == ["reused", "run", "run", "run", "run", "run"]


def test_the_same_weights_in_another_commit_are_known_without_fetching_them(
    requant: Requant, hub: HubStandIn, base: Path
) -> None:
    hub.seed("demo/planned", base)
    hub.reset_traffic()
    document = requant("plan", str(requant.write_recipe(base={"repo_id": "demo/planned"})), "--json").document
    assert [stage["state"] for stage in document["stages"]] == ["run", *["reused"] * 5]
    assert not weights(hub.traffic())


def test_a_base_of_many_small_files_is_planned_in_few_requests(
    requant: Requant, hub: HubStandIn, tmp_path: Path
) -> None:
    many = pico_base(tmp_path / "many", layers=3)
    (many / "notes").mkdir()
    for number in range(300):
        (many / "notes" / f"{number}.txt").write_text(str(number))
    hub.seed("demo/many", many)
    hub.reset_traffic()
    outcome = requant("plan", str(requant.write_recipe(base={"repo_id": "demo/many"})), "--json")
    assert outcome.status == 0 and outcome.document["stages"][1]["state"] == "run"
    assert len(hub.traffic()) < 30


def test_what_a_new_revision_changed_is_told(requant: Requant, hub: HubStandIn, tmp_path: Path) -> None:
    again = pico_base(tmp_path / "again", layers=3, head=False)
    config = json.loads((again / "config.json").read_text())
    config["text_config"]["rope_parameters"]["rope_theta"] = 5.0
    (again / "config.json").write_text(json.dumps(config))
    (again / "notes.txt").write_text("new")
    sha = hub.seed("demo/pico", again, revision="next", delete_missing=True)
    recipe = requant.write_recipe(base={"repo_id": "demo/pico", "revision": "next"})
    outcome = requant("plan", str(recipe), "--json")
    assert outcome.status == 0, outcome.stdout
    changes = outcome.document["changes"]
    assert outcome.document["base"]["sha"] == sha and changes["since"] != sha
    assert changes["files"]["added"] == ["notes.txt"] and changes["files"]["removed"] == []
    assert "config.json" in changes["files"]["changed"] and "tokenizer.json" not in changes["files"]["changed"]
    assert changes["tensors"]["added"] == [] and "mtp.fc.weight" in changes["tensors"]["removed"]
    told = {change["field"]: (change["before"], change["now"]) for change in changes["config"]}
    assert told["text_config.rope_parameters.rope_theta"][1] == "5.0"
    assert told["text_config.mtp_num_hidden_layers"] == ("1", "0")


def other(folder: Path, **changes: Any) -> Path:
    """A pico base with other words in its config.json."""
    base = pico_base(folder)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **changes}))
    return base


def promising(folder: Path) -> Path:
    """A base without the head that its config promises."""
    base = pico_base(folder, head=False)
    config = (base / "config.json").read_text()
    (base / "config.json").write_text(config.replace('"mtp_num_hidden_layers": 0', '"mtp_num_hidden_layers": 1'))
    return base


def fused(folder: Path) -> Path:
    """A base whose experts lie fused in another way than its config says."""
    base = pico_base(folder, experts=4)
    config = (base / "config.json").read_text()
    (base / "config.json").write_text(config.replace('"moe_intermediate_size": 96', '"moe_intermediate_size": 64'))
    return base


def alike(folder: Path) -> Path:
    """A base with two files that are one where case is ignored."""
    base = pico_base(folder)
    (base / "Config.json").write_bytes((base / "config.json").read_bytes())
    return base


def test_a_run_is_stopped_before_its_first_byte_with_the_plans_sentence(
    requant: Requant, hub: HubStandIn, tmp_path: Path
) -> None:
    hub.seed("demo/unknown", other(tmp_path / "unknown", model_type="qwen99"))
    path = str(requant.write_recipe(base={"repo_id": "demo/unknown"}, publish=None))
    planning = requant("plan", path, "--json")
    assert planning.status == 1
    (problem,) = planning.document["problems"]
    assert problem.startswith("transformers does not know the base's model type 'qwen99'")
    hub.reset_traffic()
    outcome = requant("run", path, "--json")
    assert outcome.status == 1 and outcome.document["status"] == "failed" and outcome.document["stages"] == []
    assert outcome.document["error"] == problem and "Traceback" not in outcome.stderr
    assert all(t["status"] == 206 and t["bytes_out"] <= 16 << 10 for t in weights(hub.traffic()))


def test_texts_that_cannot_work_stop_a_run_before_its_first_byte(
    requant: Requant, hub: HubStandIn, tmp_path: Path
) -> None:
    """They were found after hours of quantization."""
    hub.seed("demo/texts-stop", pico_base(tmp_path / "base", seed=7))
    (tmp_path / "short.txt").write_text("x = 1\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    path = requant.write_recipe(
        base={"repo_id": "demo/texts-stop"},
        quantize={"calibration": str(tmp_path / "rows.jsonl")},
        validation={"text": str(tmp_path / "short.txt")},
        publish=None,
    )
    hub.reset_traffic()
    planning = requant("plan", str(path), "--json")
    assert planning.status == 1 and "Traceback" not in planning.stderr
    columns, short = planning.document["problems"]
    assert columns.startswith(
        "quantize.calibration: the rows of rows.jsonl have the columns prompt, answer; a row needs"
    )
    assert short == "validation.text: short.txt has 5 tokens, and measuring needs at least 512: name a longer text"
    outcome = requant("run", str(path), "--json")
    assert outcome.status == 1 and outcome.document["stages"] == [] and "Traceback" not in outcome.stderr
    assert outcome.document["error"] == f"{columns}; {short}"
    assert all(t["status"] == 206 and t["bytes_out"] <= 16 << 10 for t in weights(hub.traffic()))


REFUSED: dict[str, tuple[Callable[[Path], Path], dict[str, Any], str]] = {
    "code": (lambda f: other(f, model_type="own", auto_map={"AutoConfig": "own.Own"}), {}, "set allow_remote_code"),
    "packed": (lambda f: write_quantized(pico_base(f), f.parent), {}, "already quantized"),
    "fused": (fused, {}, "lie fused in model.language_model.layers.0.mlp.experts.down_proj"),
    "group": (pico_base, {"group_size": 1024}, "group_size 1024 does not divide the 64 inputs of"),
    "names": (pico_base, {"layers": {"q_prj": {"bits": 8}}}, "names 'q_prj', which is in no layer"),
    "case": (alike, {}, "config.json stands twice in one artifact"),
    "head": (promising, {}, "promises 1 MTP layers and its tensors have 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_with_a_sentence(
    case: str, requant: Requant, hub: HubStandIn, tmp_path: Path
) -> None:
    make, quantize, sentence = REFUSED[case]
    hub.seed(f"demo/refused-{case}", make(tmp_path / "base"))
    recipe = requant.write_recipe(base={"repo_id": f"demo/refused-{case}"}, quantize=quantize, publish=None)
    outcome = requant("plan", str(recipe), "--json")
    assert outcome.status == 1 and "Traceback" not in outcome.stderr
    assert sentence in " ".join(outcome.document["problems"])


def test_a_gate_is_a_problem_of_the_plan(requant: Requant, hub: HubStandIn, tmp_path: Path) -> None:
    hub.seed("demo/gated", pico_base(tmp_path / "gated"))
    hub.set_repo("demo/gated", gated=True)
    outcome = requant("plan", str(requant.write_recipe(base={"repo_id": "demo/gated"})), "--json")
    assert outcome.status == 1 and outcome.document["base"]["sha"] is None
    assert "demo/gated is gated and this account has no access" in outcome.document["problems"][0]


def test_the_flow_leaves_a_table_in_prefect_and_fails_on_problems(requant: Requant, prefect_server: str) -> None:
    code = "import sys; from pathlib import Path; from requant.flows.plan import plan; "
    code += "from requant.tasks.recipe.loader import load_recipe; plan(load_recipe(Path(sys.argv[1])))"

    def run(path: Path) -> Outcome:
        return finish(forked(["-c", code, str(path)], requant.environment))

    assert run(requant.write_recipe()).status == 0
    assert any("| quantize | reused |" in a["data"] for a in artifacts(prefect_server, "requant-plan"))
    assert artifacts(prefect_server, "requant-plan-stages")
    failed = run(requant.write_recipe(quantize={"group_size": 1024}))
    assert failed.status == 1 and "group_size 1024 does not divide" in failed.stderr


def test_a_recipe_that_no_form_can_see_through_ends_the_plan_with_a_sentence(requant: Requant) -> None:
    code = (
        "from requant.flows.plan import plan; state = plan({'base': {'repo_id': 'a/b'}, 'quantize': {'nsamples': 4}}, "
    )
    code += "return_state=True); print(state.name, state.message, sep=chr(10))"
    done = finish(forked(["-c", code], requant.environment))
    assert done.stdout.splitlines() == ["Failed", "quantize: batch_size 8 is larger than nsamples 4"]
    assert "Traceback" not in done.stderr
