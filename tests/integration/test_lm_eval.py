"""The real lm-eval on tasks of our own, on small checkpoints."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from huggingface_hub import constants

from infra.dev.hub.launch import HubStandIn
from requant.flows.cli.main import cli
from requant.tasks.artifact import Manifest, file_of
from requant.tasks.errors import EvaluationFailed, RecipeError
from requant.tasks.evaluate import compare_outcomes, evaluate_pair, remember_in
from requant.tasks.evaluating.definitions import check_tasks, data_sets, task_manager
from requant.tasks.evaluating.harness import run_in_torch
from requant.tasks.evaluating.outcomes import Outcomes, Reading
from requant.tasks.evaluating.rounds import run_in_rounds
from requant.tasks.recipe.loader import load_recipe, parse_recipe
from requant.tasks.recipe.recipe import Eval, Recipe
from requant.tasks.store import Store, open_store
from requant.tasks.texts.text import find_text
from requant.tasks.validate import read_values, validate
from requant.tasks.validating.gates import accepted, judge
from requant.tasks.validating.measured import Evaluation
from requant.tasks.validating.paired import Verdict
from tests.factories.checkpoints import edited, from_bf16, to_bf16
from tests.factories.line_tasks import line_tasks
from tests.factories.paths import ROOT, TINY
from tests.factories.pico import pico_base
from tests.factories.requant import Requant, merge

if TYPE_CHECKING:
    from requant.tasks.validating.model import RunSettings

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'requant[eval]'")

# The trained model chooses the first answer of each; a random one is as likely to take the shorter.
LINES = [
    ("class A:\n    def __init__(self", ["):\n", "!!"]),
    ("if x is None:\n    return", [" None\n", "=="]),
    ("    raise ValueError", ["('", "|"]),
    ("import ", ["os\n", "zz\n"]),
]
QUESTIONS = [
    {"question": question, "choices": [good, bad] if n % 2 else [bad, good], "gold": 1 - n % 2, "good": good}
    for n, (question, (good, bad)) in enumerate(LINES)
]
CHOICE = """
task: own_choice
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: gold
doc_to_choice: choices
target_delimiter: ""
test_split: test
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
PERPLEXITY = """
task: own_perplexity
output_type: loglikelihood
doc_to_text: !function helper.text
doc_to_target: "{{good}}"
target_delimiter: ""
test_split: test
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]
"""
UNSAFE = CHOICE.replace("own_choice", "own_unsafe") + "unsafe_code: true\n"
LOST = CHOICE.replace("own_choice", "own_lost").replace("DATA", "/nowhere/at/all.jsonl")
HUB = CHOICE.replace("own_choice", "own_hub").replace("dataset_path: json", "dataset_path: demo/questions")


def marker(definitions: Path) -> Path:
    """Written when the Python beside the definitions runs; outside, so that they stay what they were."""
    return definitions.with_name(f"{definitions.name}-ran")


@pytest.fixture(scope="module")
def definitions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("definitions")
    data = folder / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)))
    for name, text in (("choice", CHOICE), ("ppl", PERPLEXITY), ("unsafe", UNSAFE), ("lost", LOST), ("hub", HUB)):
        (folder / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
    (folder / "helper.py").write_text(
        f"open({str(marker(folder))!r}, 'w').close()\n\n\ndef text(doc):\n    return doc['question']\n"
    )
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def asking(definitions: Path, *tasks: str, **more: Any) -> Recipe:
    section = {"tasks": list(tasks), "definitions": str(definitions), **more}
    return parse_recipe({"base": {"repo_id": "a/b"}, "allow_remote_code": True, "eval": section})


def cpu() -> RunSettings:
    import torch

    from requant.tasks.validating.model import RunSettings

    return RunSettings(torch.device("cpu"), torch.float32)


def outcomes(folder: Path, asked: Eval) -> Outcomes:
    with run_in_torch(folder, asked, cpu()) as harness:
        return harness.outcomes()


def test_a_trained_model_keeps_its_score_and_a_random_one_loses_it(definitions: Path, tmp_path: Path) -> None:
    asked = asking(definitions, "own_choice", "own_perplexity").eval
    assert asked is not None
    trained = outcomes(TINY, asked)
    random = outcomes(pico_base(tmp_path / "pico"), asked)
    scores = trained.scores
    assert scores["own_choice"].value == 1.0 and scores["own_choice"].samples == 4
    assert scores["own_perplexity"].metric == "perplexity" and not scores["own_perplexity"].higher_is_better
    assert trained.items["own_choice"].values == (1.0, 1.0, 1.0, 1.0)
    assert trained.items["own_perplexity"].reading is Reading.PERPLEXITY
    assert compare_outcomes(trained, trained, asked).worst_task_recovery == 1.0
    assert marker(definitions).exists()
    lost = compare_outcomes(trained, random, asked)
    tasks, worst = lost.to_json()["tasks"], lost.worst_task_recovery
    assert worst is not None and worst == tasks["own_perplexity"]["recovery"] < 0.5
    assert tasks["own_choice"]["recovery"] < 1


def with_rounded_body(folder: Path, bits: int, seed: int) -> Path:
    """A copy of the trained model whose body is rounded to so many bits, up or down as the seed has it."""
    import numpy as np

    shutil.copytree(TINY, folder)
    draw = np.random.default_rng(seed)
    for shard in folder.glob("*.safetensors"):
        with edited(folder, shard.name) as tensors:
            for name, (dtype, shape, data) in tensors.items():
                if dtype == "BF16" and len(shape) == 2 and ".layers." in name and not name.startswith("mtp."):
                    values = from_bf16(data, shape)
                    step = np.abs(values).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 0.5)
                    tensors[name] = (dtype, shape, to_bf16(np.floor(values / step + draw.random(shape)) * step))
    return folder


def test_damage_is_worse_an_equal_model_is_equivalent_and_two_seeds_are_no_difference(tmp_path: Path) -> None:
    """The trained model with its body in 2 bits, itself, and itself with its body in 8 bits, with two seeds."""
    asked = line_tasks(tmp_path).model_copy(update={"tasks": ["line_perplexity"]})
    base = outcomes(TINY, asked)

    def verdict(of_base: Outcomes, folder: Path) -> Verdict:
        with run_in_torch(folder, asked, cpu()) as harness:
            ours = run_in_rounds(of_base, asked.margin, harness.engine, harness.answers)
        found = compare_outcomes(of_base, ours, asked).tasks
        assert found is not None and found["line_perplexity"].paired is not None
        return found["line_perplexity"].paired.verdict

    assert verdict(base, TINY) is Verdict.EQUIVALENT
    assert verdict(base, with_rounded_body(tmp_path / "damaged", 2, 0)) is Verdict.WORSE
    one, other = (with_rounded_body(tmp_path / f"seed{seed}", 8, seed) for seed in (1, 2))
    assert verdict(outcomes(one, asked), other) in {Verdict.EQUIVALENT, Verdict.CANNOT_TELL}


def test_the_example_of_an_own_task_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = load_recipe(ROOT / "examples" / "own-evaluation.yaml").eval
    assert asked is not None
    monkeypatch.chdir(ROOT)  # its data file is relative to it
    check_tasks(asked)
    (score,) = outcomes(TINY, asked).scores.values()
    assert score.metric == "acc" and score.samples == 8 and 0 <= score.value <= 1


def test_a_limit_is_kept(definitions: Path) -> None:
    asked = asking(definitions, "own_choice", limit=2).eval
    assert asked is not None
    assert outcomes(TINY, asked).scores["own_choice"].samples == 2


def test_a_base_is_evaluated_once(definitions: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = open_store((tmp_path / "store").as_uri())
    base = pico_base(tmp_path / "pico")
    manifest = Manifest.of(file_of(base, path.name) for path in sorted(base.iterdir()))
    caplog.set_level(logging.INFO, "requant")

    def evaluated(recipe: Recipe) -> Evaluation:
        assert recipe.eval is not None
        return evaluate_pair(recipe, base, base, tmp_path / "logs", remember_in(store, {base: manifest}, recipe.eval))

    def evaluations() -> int:
        return sum(message.startswith("evaluating the base") for message in caplog.messages)

    first = evaluated(asking(definitions, "own_choice"))
    assert evaluated(asking(definitions, "own_choice", batch_size=2)) == first and evaluations() == 1
    evaluated(asking(definitions, "own_choice", margin=0.1, stop_early=False))
    assert evaluations() == 1
    evaluated(asking(definitions, "own_choice", limit=1))
    assert evaluations() == 2
    (definitions / "note.txt").write_text("another folder now")
    evaluated(asking(definitions, "own_choice"))
    assert evaluations() == 3


def test_tasks_are_checked_before_any_work_and_without_running_them(definitions: Path) -> None:
    marker(definitions).unlink(missing_ok=True)
    own = asking(definitions, "own_choice", "own_perplexity").eval
    assert own is not None and "mmlu" not in task_manager(own).task_index  # nor is it read, which takes seconds
    check_tasks(own)
    check_tasks(asking(definitions, "own_choice", "own_perplexity", "gsm8k", "mmlu").eval)
    assert not marker(definitions).exists()
    with pytest.raises(RecipeError, match=r"^eval\.tasks: lm-eval has no task gsm9k: `lm_eval ls tasks`"):
        check_tasks(asking(definitions, "gsm9k").eval)
    for name in ("own_unsafe", "humaneval"):
        with pytest.raises(RecipeError, match=f"eval.tasks: {name} runs code that the model writes"):
            check_tasks(asking(definitions, name).eval)


def test_a_task_that_cannot_be_run_is_a_sentence(definitions: Path, tmp_path: Path) -> None:
    asked = asking(definitions, "own_lost").eval
    assert asked is not None
    with pytest.raises(EvaluationFailed, match=r"^lm-eval failed on own_lost \(FileNotFoundError: "):
        outcomes(TINY, asked)


def test_a_data_set_of_the_hub_is_pinned_to_its_commit(
    definitions: Path, hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    sha = hub.seed("demo/questions", tmp_path / "data", repo_type="dataset")
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    asked = asking(definitions, "own_hub", "own_choice").eval
    assert asked is not None
    assert data_sets(asked) == {"demo/questions": sha}


def test_a_result_is_rejected_by_a_task_and_nothing_is_evaluated_again(requant: Requant, definitions: Path) -> None:
    """The stage itself, in this process, which has lm-eval imported, on what a run made."""
    store = open_store(requant.environment["REQUANT_STORE"])
    section = {"tasks": ["own_choice", "own_perplexity"], "definitions": str(definitions)}
    recipe = parse_recipe(merge(requant.recipe, {"eval": section, "allow_remote_code": True}))
    base, result = (the_only(store, requant.store / "artifacts" / stage) for stage in ("download", "mtp_fix"))
    text = find_text(recipe.validation.text, "validation.text")
    made = validate(store, recipe, base, result, text)
    measured = read_values(store, made)
    assert made.state == "ran" and set(measured.to_json()["tasks"]) == {"own_choice", "own_perplexity"}
    gates = judge(measured, recipe.gates.model_copy(update={"min_task_recovery": 10.0}))
    assert [gate.name for gate in gates if not gate.passed] == ["task_recovery"] and not accepted(gates)
    assert len(list(requant.store.glob("artifacts/evaluate/*"))) == 2
    assert accepted(judge(measured, recipe.gates.model_copy(update={"min_task_recovery": None})))
    assert validate(store, recipe, base, result, text).state == "reused"


@pytest.mark.slow
def test_a_run_is_rejected_by_a_task_and_evaluates_nothing_again(requant: Requant, definitions: Path) -> None:
    section = {"tasks": ["own_choice", "own_perplexity"], "definitions": str(definitions)}
    changes = {"eval": section, "allow_remote_code": True, "publish": None}
    outcome = requant.run(gates={"min_task_recovery": 10.0}, **changes)
    assert outcome.status == 1, outcome.stderr
    assert outcome.document["status"] == "rejected"
    assert [g["name"] for g in outcome.document["gates"] if not g["passed"]] == ["task_recovery"]
    assert set(outcome.document["measured"]["tasks"]) == {"own_choice", "own_perplexity"}
    assert len(list(requant.store.glob("artifacts/evaluate/*"))) == 2
    again = requant.run(gates={"min_task_recovery": None}, **changes)
    assert again.status == 0 and again.states["validate"] == "reused", again.stderr


def the_only(store: Store, folder: Path) -> Manifest:
    """The only artifact of a stage."""
    (path,) = folder.iterdir()
    manifest = store.manifest(folder.name, path.name)
    assert manifest is not None
    return manifest


def test_a_run_with_a_task_that_does_not_exist_starts_nothing(
    requant: Requant, definitions: Path, hub: HubStandIn
) -> None:
    hub.reset_traffic()
    section = {"tasks": ["gsm9k"], "definitions": str(definitions)}
    recipe = requant.write_recipe(eval=section, allow_remote_code=True)
    with pytest.raises(RecipeError, match="lm-eval has no task gsm9k"):
        cli(["run", str(recipe), "--json"], standalone_mode=False)
    assert hub.traffic() == []
