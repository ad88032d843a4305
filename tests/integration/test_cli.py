"""The other commands, on what a real run made, and what a run leaves in Prefect."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from requant.flows.cli.main import cli
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.recipe.recipe import Gates
from tests.factories.requant import LAYERS, Outcome, Requant, artifacts

Finished = tuple[Requant, Outcome]


@pytest.fixture
def checkout(finished: Finished, tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    shutil.copytree(finished[0].folder / "checkout", folder)
    return folder


def flip(folder: Path, name: str) -> None:
    """Flip the lowest bit of a tensor's first value."""
    tensor = Checkpoint.open(folder).tensors[name]
    with tensor.path.open("r+b") as stream:
        stream.seek(tensor.begin)
        first = stream.read(1)[0]
        stream.seek(tensor.begin)
        stream.write(bytes([first ^ 1]))


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def contents(folder: Path) -> dict[str, bytes]:
    return {name: data for name, (data, _) in snapshot(folder).items()}


def test_prefect_has_progress_gates_and_report_of_a_run(finished: Finished, prefect_server: str) -> None:
    assert any(a["data"] == 100.0 for a in artifacts(prefect_server, "quantize-progress"))
    tables = [json.loads(a["data"]) for a in artifacts(prefect_server, "requant-gates")]
    assert any({row["gate"] for row in table} >= {"structure", "perplexity_increase"} for table in tables)
    reports = [a["data"] for a in artifacts(prefect_server, "requant-report")]
    assert any(finished[1].digest[:12] in text and "](data:image/png;base64," in text for text in reports)


def test_inspect_says_what_is_quantized_and_that_the_head_drafts(requant: Requant, checkout: Path) -> None:
    outcome = requant("inspect", str(checkout), "--json")
    assert outcome.status == 0, outcome.stderr
    document = outcome.document
    quantized = {key: document["quantized"][key] for key in ("count", "bits", "group_size")}
    assert quantized == {"count": 6 * (LAYERS - 1) + 7, "bits": 4, "group_size": 32}
    head = {key: document["mtp"][key] for key in ("present", "layout", "layers", "precision", "complete")}
    assert head == {"present": True, "layout": "mtp", "layers": 1, "precision": "BF16", "complete": True}
    assert document["engines"]["vllm"]["loads"] and document["engines"]["vllm"]["mtp"]
    assert document["problems"] == []


def test_inspect_of_a_folder_with_a_missing_shard_is_status_1(requant: Requant, checkout: Path) -> None:
    (checkout / "model-mtp.safetensors").unlink()
    outcome = requant("inspect", str(checkout), "--json")
    assert outcome.status == 1
    assert any("model-mtp.safetensors, which is missing" in problem for problem in outcome.document["problems"])


# Every command as a new process: its words, its exit status, what it has to say; {checkout}: a finished run's result.
COMMANDS = {
    "init": ("init demo/pico --recipe {folder}/new.yaml", 0, '"schema_file"'),
    "run": ("run {folder}/none.yaml", 2, "none.yaml does not exist"),
    "plan": ("plan {folder}/none.yaml", 2, "none.yaml does not exist"),
    "validate": ("validate {folder}/none --base {checkout}", 1, "is not a folder"),
    "compare": ("compare {checkout} {folder}/none --base {checkout}", 1, "none"),
    "mtp-fix": ("mtp-fix {checkout}", 0, '"changed"'),
    "inspect": ("inspect {checkout}", 0, '"quantized"'),
    "bench": ("bench {folder}/none", 1, "is not a folder"),
    "verify": ("verify me/pico", 0, '"problems": []'),
    "rollback": ("rollback me/pico --dry-run", 1, "before"),
    "publish": ("publish me/pico --rollback", 1, "before"),
    "watch": ("watch --once --recipes {folder}/recipes", 0, '"checked": 0'),
    "deploy": ("deploy {folder}/none", 2, "does not exist"),
    "webhook": ("webhook", 2, "No such option"),  # It is a server, and prints no document.
    "worker": ("worker --pool cpu", 2, "PREFECT_API_URL is not set"),
    "store": ("store ls", 0, '"artifacts"'),
    "schema": ("schema plan", 0, '"PlanDocument"'),
}
LIGHT = {
    "init",
    "mtp-fix",
    "inspect",
    "verify",
    "rollback",
    "publish",
    "store",
    "schema",
}  # those start neither torch nor Prefect
HEAVY = {"torch", "prefect", "auto_round", "transformers", "boto3"}


def test_every_command_is_tried_as_a_new_process() -> None:
    assert set(COMMANDS) == set(cli.commands)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_a_process_with_one_document_and_a_status(command: str, requant: Requant, checkout: Path) -> None:
    words, status, said = COMMANDS[command]
    asked = requant.variant(PYTHONPROFILEIMPORTTIME="1")
    if command == "worker":
        del asked.environment["PREFECT_API_URL"]
    (requant.folder / "recipes").mkdir()
    arguments = words.format(folder=requant.folder, checkout=checkout).split()
    outcome = asked(*arguments, "--json", new_process=True)
    lines = outcome.stderr.splitlines()
    imported = {line.rsplit("|", 1)[1].strip() for line in lines if line.startswith("import time:")}
    sentences = [line for line in lines if not line.startswith("import time:")]
    assert outcome.status == status, sentences
    assert json.loads(outcome.stdout) and said in outcome.stdout  # one document, and nothing else
    assert not any("Traceback" in line for line in sentences)
    assert "requant.flows.cli.command" in imported
    assert command not in LIGHT or not imported & HEAVY


def test_mtp_fix_restores_a_damaged_head_and_then_changes_nothing(requant: Requant, checkout: Path, base: Path) -> None:
    before = contents(checkout)
    flip(checkout, "mtp.fc.weight")
    first = requant("mtp-fix", str(checkout), "--base", str(base), "--json")
    assert first.status == 0, first.stderr
    assert first.document["changed"] and first.document["tensors_restored"] == 1
    assert first.document["source"] == "base"
    assert contents(checkout) == before
    after = snapshot(checkout)
    second = requant("mtp-fix", str(checkout), "--base", "demo/pico", "--json")
    assert second.status == 0, second.stderr
    assert not second.document["changed"]
    assert snapshot(checkout) == after


def with_a_short_text(requant: Requant) -> str:
    """A recipe that measures on little more than the 512 tokens that measuring needs."""
    text = requant.folder / "short.txt"
    text.write_text("".join(f"def number_{i}(value):\n    return value + {i}\n" for i in range(80)))
    return str(requant.write_recipe(validation={"text": str(text)}))


def test_validate_passes_the_result_of_a_run(requant: Requant, checkout: Path, base: Path) -> None:
    outcome = requant("validate", str(checkout), "--base", str(base), "--recipe", with_a_short_text(requant), "--json")
    assert outcome.status == 0, outcome.stderr
    assert outcome.document["passed"]
    names = [gate["name"] for gate in outcome.document["gates"]]
    assert "perplexity_increase" in names and "mtp_acceptance_ratio" in names


@pytest.mark.slow
def test_validate_without_a_recipe_measures_the_default_text_against_the_default_limits(
    requant: Requant, checkout: Path, base: Path
) -> None:
    """Random weights pass the limits of everything but quality."""
    outcome = requant("validate", str(checkout), "--base", str(base), "--json")
    assert outcome.status == 1 and "validation text: 166 chats through the base's chat template" in outcome.stderr
    gates = {gate["name"]: gate for gate in outcome.document["gates"]}
    assert all(gates[name]["passed"] for name in ("structure", "lossless", "finite"))
    assert gates["perplexity_increase"]["limit"] == Gates().max_perplexity_increase is not None
    assert gates["top1_agreement"]["limit"] == Gates().min_top1_agreement is not None
    assert not gates["top1_agreement"]["passed"]


def test_validate_fails_a_checkpoint_with_one_flipped_bit_and_a_nan(
    requant: Requant, checkout: Path, base: Path
) -> None:
    flip(checkout, "model.visual.pos_embed.weight")
    scales = next(t for n, t in Checkpoint.open(checkout).tensors.items() if n.endswith("down_proj.scales"))
    with scales.path.open("r+b") as stream:
        stream.seek(scales.begin)
        stream.write(b"\x00\x7e")  # a float16 NaN
    recipe = with_a_short_text(requant)
    outcome = requant("validate", str(checkout), "--base", "demo/pico", "--recipe", recipe, "--json")
    assert outcome.status == 1
    failed = {g["name"]: g["note"] for g in outcome.document["gates"] if not g["passed"]}
    assert "model.visual.pos_embed.weight differs" in failed["lossless"]
    assert "down_proj.scales" in failed["finite"]


def test_store_commands_list_verify_and_check_out(requant: Requant, finished: Finished) -> None:
    listed = requant("store", "ls", "--json").document
    digest = finished[1].digest
    assert digest in [row["digest"] for row in listed["artifacts"] if row["stage"] == "mtp_fix"]
    assert requant("store", "verify", "--deep").status == 0
    out = requant("store", "checkout", digest[:12], str(requant.folder / "laid"), "--json").document
    assert out["digest"] == digest
    assert not Checkpoint.open(requant.folder / "laid").sound().problems
    blob = next(p for p in requant.store.glob("blobs/sha256/*/*") if p.stat().st_size > 100_000)
    blob.unlink()
    broken = requant("store", "verify", "--json")
    assert broken.status == 1 and blob.name[:12] in broken.document["problems"][0]
