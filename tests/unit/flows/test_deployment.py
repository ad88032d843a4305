"""What a Prefect server is told, and what its form shows."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from click.testing import CliRunner
from prefect.utilities.callables import parameter_schema
from prefect.utilities.importtools import import_object

from requant.flows.cli.deploy import deploy
from requant.flows.delegation import delegates, name_for_worker
from requant.flows.deployment import POOLS, Deployment, WorkPool, read_automations, read_deployments, with_recipes
from requant.flows.recipe_flow import run_name
from requant.flows.recipes import default_recipes
from requant.flows.requantize import requantize
from requant.flows.sweep import HEARTBEAT_TIMEOUT_S, TAG
from requant.tasks.errors import RecipeError, RequantError
from requant.tasks.recipe.loader import load_recipe, parse_recipe, recipe_of
from requant.tasks.recipe.quantize_section import PRESETS
from requant.tasks.texts.text import find_text
from tests.factories.paths import ROOT

DEPLOYMENTS = ROOT / "deployments"
RECIPES = sorted((DEPLOYMENTS / "recipes").glob("*.yaml"))


def deployments_with(recipes: Path) -> list[Deployment]:
    """The project's deployments, with one for each recipe of a folder."""
    document = yaml.safe_load((DEPLOYMENTS / "prefect.yaml").read_text())
    return with_recipes([Deployment.model_validate(row) for row in document["deployments"]], recipes)


def deployments() -> dict[str, dict[str, Any]]:
    return {each.name: each.model_dump() for each in deployments_with(DEPLOYMENTS / "recipes")}


@functools.cache
def form() -> dict[str, Any]:
    return parameter_schema(requantize.fn).model_dump()


def test_every_deployment_names_a_flow_and_a_pool() -> None:
    for each in deployments().values():
        assert import_object(each["entrypoint"]).name == each["entrypoint"].rsplit(".", 1)[-1]
        assert each["work_pool"]["name"] in POOLS
        assert TAG in each["tags"]  # which the sweep looks for
    assert {name for name, each in deployments().items() if each["work_pool"]["name"] == "gpu"} == {
        "self_calibration", "quantize", "validate", "benchmark", "acceptance", "probe",
    }  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_a_deployment_whose_form_holds_and_accepts_all_that_it_says(path: Path) -> None:
    parameters = deployments()[path.stem]["parameters"]
    assert recipe_of(parameters["recipe"]) == load_recipe(path)
    jsonschema.validate(parameters, form())


def test_a_limit_that_a_recipe_takes_away_stays_away(tmp_path: Path) -> None:
    (tmp_path / "free.yaml").write_text("base: {repo_id: a/b}\ngates: {min_top1_agreement: null}\n")
    assert recipe_of(deployments_with(tmp_path)[-1].parameters["recipe"]).gates.min_top1_agreement is None


def test_the_form_has_an_order_bounds_and_lists_to_choose_from() -> None:
    sections = form()["definitions"]
    for section in sections.values():
        positions = [field["position"] for field in section["properties"].values()]
        assert positions == list(range(len(positions)))
        assert all(field.get("title") for field in section["properties"].values())
    quantize = sections["Quantize"]["properties"]
    assert quantize["scheme"]["enum"][0] == "W4A16" and quantize["torch_compile"]["enum"] == ["auto", True, False]
    assert quantize["iters"]["maximum"] == 10_000


# Repos that the Hub refuses to make, and some that it makes.
NOT_TAKEN = ["noslash", "me/a--b", "me/a..b", "me/-a", "me/a.", "me/a.git", "me-/a", f"me/{'a' * 97}", "me/a/b", "/a"]
TAKEN = ["me/a", "me/A_b.c-d", f"me/{'a' * 96}", "me_/_a", "0/1", "me/a.gitt"]


@pytest.mark.parametrize("repo_id", TAKEN)
def test_a_repo_that_the_hub_takes_the_form_and_the_run_take(repo_id: str) -> None:
    given = {"base": {"repo_id": "a/b"}, "publish": {"repo_id": repo_id}}
    jsonschema.validate({"recipe": given}, form())
    assert recipe_of(given).publish is not None


@pytest.mark.parametrize(
    "wrong",
    [
        {"base": {"repo_id": "not a repo"}},
        {"base": {"repo_id": "a/b"}, "quantize": {"scheme": "W5A16"}},
        {"base": {"repo_id": "a/b"}, "quantize": {"iters": -1}},
        {"base": {"repo_id": "a/b"}, "quantize": {"preset": "best"}},
        {"base": {"repo_id": "a/b"}, "quantize": {"torch_compile": "sometimes"}},
        {"base": {"repo_id": "a/b"}, "benchmark": {"engine": "abacus"}},
        {"base": {"repo_id": "a/b"}, "colour": "red"},
        *({"base": {"repo_id": "a/b"}, "publish": {"repo_id": repo_id}} for repo_id in NOT_TAKEN),
        {"base": {"repo_id": "a/b"}, "publish": {"repo_id": "me/x"}, "outputs": [{"repo_id": "noslash"}]},
        {"quantize": {}},
    ],
    ids=str,
)
def test_what_the_form_refuses_the_run_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"recipe": wrong}, form())
    with pytest.raises(RecipeError):
        recipe_of(wrong)


@pytest.mark.parametrize("given", ["me/text", {"source": "me/text", "field": "a"}, ["me/text", {"source": "self"}]])
def test_the_form_takes_one_source_as_text_and_several_as_a_list(given: Any) -> None:
    recipe = {"base": {"repo_id": "a/b"}, "quantize": {"calibration": given}}
    jsonschema.validate({"recipe": recipe}, form())
    field = form()["definitions"]["Quantize"]["properties"]["calibration"]
    assert field["anyOf"][0]["type"] == "string" and field["default"] == "builtin:mixed"
    for wrong in ([], 5, {"weight": 1}, [{"source": "a", "wieght": 1}]):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"recipe": {**recipe, "quantize": {"calibration": wrong}}}, form())


@pytest.mark.parametrize("preset", PRESETS)
def test_a_recipe_with_a_preset_may_be_given_whole_and_the_fields_of_the_form_stay_those_that_it_fills_in(
    preset: str,
) -> None:
    """A form sends the default of every field that it shows, and these win over a preset: it shows none."""
    given = {"base": {"repo_id": "a/b"}, "quantize": {"preset": preset}}
    jsonschema.validate({"recipe": given}, form())
    assert recipe_of(given).quantize.iters == PRESETS[preset]["iters"]
    assert "preset" not in form()["definitions"]["Quantize"]["properties"]


@pytest.mark.parametrize(("engine", "delegated"), [("vllm", True), ("auto", True), ("torch", False), ("none", False)])
def test_probes_go_to_a_worker_only_if_it_may_start_an_engine(engine: str, delegated: bool) -> None:
    recipe = parse_recipe({"base": {"repo_id": "a/b"}, "benchmark": {"engine": engine}, "probes": {}})
    assert delegates("probe", recipe, 54_000_000_000) is delegated


def test_a_text_goes_to_another_worker_by_a_name_that_it_finds(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("words")
    assert name_for_worker(find_text(str(tmp_path / "mine.txt"))) == str(tmp_path / "mine.txt")
    assert name_for_worker(find_text("builtin:python")) == "builtin:python"


def test_a_recipe_that_is_no_mapping_is_refused_in_a_sentence_and_its_run_still_has_a_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(RecipeError, match="not a mapping"):
        recipe_of("demo")  # type: ignore[arg-type]
    for given in ("demo", None, {"base": 3}, {"base": {"repo_id": "Qwen/Qwen3.6-27B"}}):
        monkeypatch.setattr("prefect.runtime.flow_run.parameters", {"recipe": given}, raising=False)
        assert run_name().endswith("W4A16")


def test_a_run_sends_several_heartbeats_before_it_is_taken_for_dead_whatever_its_worker_was_started_with() -> None:
    """Prefect's own default is one heartbeat in 180 s."""
    for each in deployments().values():
        heartbeat_s = int(each["work_pool"]["job_variables"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])
        assert 3 * heartbeat_s <= HEARTBEAT_TIMEOUT_S


def test_a_recipe_called_as_a_flow_is_a_deployment_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "watch.yaml").write_text("base: {repo_id: a/b}\n")
    parameters = {each.entrypoint: each.parameters for each in deployments_with(tmp_path) if each.name == "watch"}
    assert parameters["requant.flows.watch.watch"] == {"folder": str(tmp_path)}
    assert parameters["requant.flows.requantize.requantize"]["recipe"]["base"]["repo_id"] == "a/b"


def test_a_recipe_may_not_stand_in_for_the_deployment_that_the_watch_starts(tmp_path: Path) -> None:
    (tmp_path / "requantize.yaml").write_text("base: {repo_id: a/b}\n")
    with pytest.raises(RecipeError, match=r"requantize\.yaml.*rename"):
        deployments_with(tmp_path)


class NoEntry(BaseHTTPRequestHandler):
    """A Prefect server that is healthy, and refuses whoever asks for more."""

    def do_GET(self) -> None:
        healthy = self.path == "/api/health"
        self.send_response(200 if healthy else 401)
        self.end_headers()
        self.wfile.write(b"true" if healthy else b"{}")

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def no_entry() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), NoEntry) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def refusal(url: str, folder: Path = DEPLOYMENTS) -> tuple[int, str]:
    """Ask `requant deploy` for the exit status and the one sentence that its main program makes of an error."""
    outcome = CliRunner().invoke(deploy, [str(folder)], env={"PREFECT_API_URL": url})
    assert isinstance(outcome.exception, RequantError) and outcome.output == ""
    return 2 if isinstance(outcome.exception, RecipeError) else 1, str(outcome.exception)


def test_a_server_that_refuses_is_a_sentence(no_entry: str) -> None:
    """In a new process: Prefect reads the address when it is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "requant", "deploy", str(DEPLOYMENTS)],
        env={**os.environ, "PREFECT_API_URL": f"{no_entry}/api"}, cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1 and "refuses (401): set PREFECT_API_AUTH_STRING" in done.stderr
    assert done.stdout == "" and done.stderr.count("\n") == 1, done.stderr


def test_a_server_that_is_away_or_is_none_is_a_sentence(no_entry: str) -> None:
    status, sentence = refusal(no_entry)
    assert status == 1 and "answers 401" in sentence and "/api" in sentence
    status, sentence = refusal("http://127.0.0.1:9/api")
    assert status == 1 and "does not answer" in sentence


def test_a_file_that_is_missing_or_wrong_is_named_before_the_server_is_asked(tmp_path: Path) -> None:
    status, sentence = refusal("http://127.0.0.1:9/api", tmp_path)
    assert status == 2 and f"{tmp_path / 'recipes'} does not exist" in sentence
    (tmp_path / "prefect.yaml").mkdir()
    status, sentence = refusal("http://127.0.0.1:9/api", tmp_path)
    assert status == 2 and "prefect.yaml cannot be read" in sentence
    (tmp_path / "prefect.yaml").rmdir()
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text("base: {repo_id: x y}\n")
    status, sentence = refusal("http://127.0.0.1:9/api", tmp_path)
    assert status == 2 and "mine.yaml: base.repo_id: 'x y' is not allowed" in sentence
    (tmp_path / "automations.yaml").write_text("- [")
    (tmp_path / "recipes" / "mine.yaml").unlink()
    status, sentence = refusal("http://127.0.0.1:9/api", tmp_path)
    assert status == 2 and "automations.yaml is not YAML" in sentence


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[]", "has no deployment requantize"),
        (
            "deployments: [{name: requantize, entrypoint: requant.flows.requantize.requantize}]",
            "work_pool: field required",
        ),
        ("deployments: 3", "has no deployment requantize"),
    ],
)
def test_a_prefect_yaml_that_lacks_something_is_a_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "prefect.yaml").write_text(text)
    with pytest.raises(RecipeError, match=sentence):
        read_deployments(tmp_path, tmp_path)


def test_recipes_of_any_folder_are_deployed_with_the_deployments_of_requant(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: me/base\n")
    deployed = read_deployments(tmp_path / "no-folder", tmp_path)
    own = yaml.safe_load((DEPLOYMENTS / "prefect.yaml").read_text())["deployments"]
    assert [each.name for each in deployed] == [*(each["name"] for each in own), "mine"]


def test_without_a_folder_the_recipes_are_those_of_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_recipes() == Path("recipes")  # which an error names if neither exists
    for folder in ("recipes", "deployments/recipes"):
        Path(folder).mkdir(parents=True)
        assert default_recipes() == Path(folder)


def test_the_example_is_a_folder_that_can_be_deployed_and_is_not_written_over_files(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    first = CliRunner().invoke(deploy, [str(folder), "--example", "--json"])
    written = [Path(path) for path in json.loads(first.output)["written"]]
    assert first.exit_code == 0 and {path.relative_to(folder).parts[0] for path in written} == {
        "prefect.yaml",
        "recipes",
    }
    assert read_deployments(folder, folder / "recipes")[-1].name == written[-1].stem
    written[0].unlink()
    second = CliRunner().invoke(deploy, [str(folder), "--example"])
    assert isinstance(second.exception, RequantError) and f"{written[-1]} exists" in str(second.exception)
    assert not written[0].exists()


def test_an_automation_of_the_users_is_read_and_one_that_is_none_is_a_sentence(tmp_path: Path) -> None:
    assert read_automations(tmp_path) == []
    trigger = "{type: event, posture: Reactive, threshold: 1, expect: [x]}"
    (tmp_path / "automations.yaml").write_text(f"- {{name: mine, trigger: {trigger}, actions: [{{type: do-nothing}}]}}")
    assert [automation.name for automation in read_automations(tmp_path)] == ["mine"]
    (tmp_path / "automations.yaml").write_text("- {name: mine}")
    with pytest.raises(RecipeError, match=r"automations\.yaml: 0\.trigger: field required"):
        read_automations(tmp_path)


@pytest.mark.parametrize(
    "entrypoint", ["flows.nothing.at_all", "requant.flows.gpu_pool.run_name", "nowhere.py:flow", "x"]
)
def test_an_entrypoint_that_is_no_flow_is_a_sentence(entrypoint: str) -> None:
    deployment = Deployment(name="x", entrypoint=entrypoint, work_pool=WorkPool(name="cpu"))
    with pytest.raises(RecipeError, match=f"entrypoint {entrypoint}"):
        deployment.flow()
