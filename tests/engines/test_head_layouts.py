"""The table of MTP heads says what vLLM's own draft models read."""

from __future__ import annotations

import ast
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from requant.tasks.checkpoint.heads import drafters
from requant.tasks.checkpoint.heads.layouts import LAYOUTS
from tests.factories.head_families import FAMILIES, Family

ASK = Path(__file__).parent / "ask_heads.py"
UNTRIED = {"dots3"}  # its module needs CUDA
DRAFTED = {n: f for n, f in FAMILIES.items() if any(x.name == f.layout and x.method == "mtp" for x in LAYOUTS)}


@pytest.fixture(scope="module")
def package(vllm_python: str) -> Path:
    """The folder with vLLM's sources."""
    return next(Path(vllm_python).parent.parent.glob("lib/python3*/site-packages/vllm"))


def main_names(family: Family) -> list[str]:
    layers = (f"{family.root}layers.{number}" for number in range(2))
    return [f"{family.root}norm.weight"] + [f"{layer}.mlp.up_proj.weight" for layer in layers]


@pytest.mark.slow  # vLLM and 20 of its models are imported
def test_each_draft_model_reads_the_familys_head_and_nothing_else_of_the_base(vllm_python: str) -> None:
    asked = {n: {"config": f.config_json(), "names": [*f.head, *main_names(f)]} for n, f in DRAFTED.items()}
    run = subprocess.run([vllm_python, ASK], input=json.dumps(asked), capture_output=True, text=True, check=True)
    answers: dict[str, Any] = json.loads(run.stdout[run.stdout.index("{") :])
    by_name = {layout.name: layout for layout in LAYOUTS}
    for name, family in DRAFTED.items():
        answer, layout = answers[name], by_name[family.layout]
        if "vllm" not in layout.engines:
            assert answer == {"class": None}, name
        elif name not in UNTRIED:
            assert answer.get("class"), (name, answer)
            assert set(answer["read"]) == set(family.head), name


def test_the_table_knows_every_model_for_which_vllm_has_a_draft_model(package: Path) -> None:
    """`hf_config_override` compares model types and architectures with these texts."""
    tree = ast.parse((package / "config" / "speculative.py").read_text())
    override = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "hf_config_override")
    compared: set[str] = set()
    for node in ast.walk(override):
        if isinstance(node, ast.Compare):
            compared |= {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    drafts = {n for n in compared if n.endswith(("_mtp", "_assistant", "MTP")) or n == "MistralLarge3ForCausalLM"}
    known = [layout.engines["vllm"] for layout in LAYOUTS if "vllm" in layout.engines]
    ours = {name for drafter in known for name in (*drafter.architectures, *drafter.model_types)}
    keys = {"mtp", "architectures", "model_type", "quantization_config"}
    assert compared - drafts - keys <= ours
    stated = {kind for drafter in known for kind in drafter.model_types}
    assert stated <= compared | {"exaone4_5_text"}


def test_the_table_names_loaders_that_are_there_and_read_such_names(package: Path) -> None:
    for layout in LAYOUTS:
        for file in layout.engines["vllm"].source.split(", ") if "vllm" in layout.engines else ():
            paths = [package / "model_executor" / "models" / file, package / "models" / file]
            assert any(path.is_file() for path in paths), file


def test_every_draft_model_of_vllms_registry_is_a_heads_or_a_known_drafter(package: Path) -> None:
    tree = ast.parse((package / "model_executor" / "models" / "registry.py").read_text())
    table = next(
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_SPECULATIVE_DECODING_MODELS"
    )
    assert isinstance(table, ast.Dict)
    names = {key.value for key in table.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}
    known = frozenset[str]().union(*drafters.ARCHITECTURES.values())
    others = {name for name in names - known if "MTP" not in name}
    assert others == {"ExtractHiddenStatesModel"}
