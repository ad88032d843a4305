"""What auto-round's own command writes is validated: everything is measured of each of its formats."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import requant
from requant.tasks.texts.text import EVALUATION
from requant.tasks.validating.document import ValidationDocument
from tests.factories.pico import pico_llama
from tests.factories.requant import SHORT_TEXT

FORMATS = {"auto_round": "auto-round", "auto_gptq": "gptq", "auto_awq": "awq"}
GATES = "".join(f"  {name}: null\n" for name in ("max_perplexity_increase", "min_top1_agreement", "max_kl_divergence"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_llama(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each format, all by one command."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "rows.jsonl").write_text("\n".join([json.dumps({"text": EVALUATION.read_text()[:2000]})] * 4))
    command = [Path(sys.executable).with_name("auto-round"), "--model", base, "--output_dir", folder / "out"]
    command += ["--scheme", "W4A16", "--group_size", "32", "--format", ",".join(FORMATS), "--iters", "0"]
    command += ["--nsamples", "2", "--seqlen", "64", "--dataset", folder / "rows.jsonl"]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    outcome = subprocess.run(command, env=offline, capture_output=True, text=True, timeout=300, check=False)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    configs = {path.parent: json.loads(path.read_text()) for path in (folder / "out").rglob("config.json")}
    methods = {config["quantization_config"]["quant_method"]: path for path, config in configs.items()}
    return {name: methods[method] for name, method in FORMATS.items()}


@pytest.mark.parametrize("name", FORMATS)
def test_all_is_measured_of_what_the_command_of_auto_round_wrote(
    name: str, made: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base: me/x\nvalidation: {{text: {SHORT_TEXT}, tokens: 512}}\ngates:\n{GATES}")
    document: ValidationDocument = requant.validate(made[name], base=base, recipe=recipe)
    gates = {gate.name: gate for gate in document.gates}
    assert [gate for gate in gates.values() if gate.value is None] == []
    failed = {gate.name: gate.note for gate in gates.values() if gate.failed}
    assert failed.keys() <= {"files"}, "it writes files of the tokenizer anew, which is all that differs"
    assert gates["weight_slope"].passed and 0 < (gates["kl_divergence"].value or 0) < 0.1
