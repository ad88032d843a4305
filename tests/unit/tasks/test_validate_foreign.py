"""Checkpoints that others made: differences without effect are findings, and all that can be measured is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from requant.flows.cli.validate import validate
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.recipe.recipe import Gates
from requant.tasks.texts.text import EVALUATION
from requant.tasks.validate import measured_values
from requant.tasks.validating.gates import Gate, accepted, judge, refusal
from requant.tasks.validating.measure import measure, run_settings
from requant.tasks.validating.measured import Measured
from requant.tasks.validating.measurement import Measurement
from requant.tasks.validating.model import RunSettings
from tests.factories.checkpoints import edited, write_quantized
from tests.factories.damage import Edit
from tests.factories.measured import measuring_little
from tests.factories.pico import pico_base
from tests.factories.requant import SHORT_TEXT

SHARD = "model-00001-of-00001.safetensors"
QUALITY = ("perplexity_increase", "kl_divergence", "top1_agreement", "block_error", "weight_slope")
NONE = Gates(**dict.fromkeys(Gates.model_fields))
Config = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def _short() -> Iterator[None]:
    with measuring_little(windows=2, length=64, probe=32, prompts=1, generated=4, longest=64):
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_base(tmp_path_factory.mktemp("base") / "pico", layers=2)


@pytest.fixture(scope="module")
def of_base(base: Path) -> Measurement:
    return measure(base, EVALUATION, RunSettings(torch.device("cpu"), torch.float32))


@pytest.fixture
def made(base: Path, tmp_path: Path) -> Path:
    return write_quantized(base, tmp_path)


@pytest.fixture
def measured(base: Path, of_base: Measurement) -> Callable[[Path], Measured]:
    """What validate measures of a checkpoint."""

    def run(path: Path, settings: RunSettings) -> Measurement:
        return of_base if path == base else measure(path, EVALUATION, settings)

    def measure_all(folder: Path) -> Measured:
        checkpoint = Checkpoint.open(folder)
        return measured_values(
            checkpoint, Checkpoint.open(base).sound(), run, keep_head=True, pack_head=False, settings=run_settings(base)
        )

    return measure_all


def reconfigure(folder: Path, change: Callable[[Config], Any], name: str = "config.json") -> None:
    path = folder / name
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def by_name(values: Measured, limits: Gates = NONE) -> dict[str, Gate]:
    return {gate.name: gate for gate in judge(values, limits)}


def rope_as_before(config: Config) -> None:
    """As transformers 4 wrote it."""
    rope = config["text_config"].pop("rope_parameters")
    config["text_config"] |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}


HARMLESS: dict[str, Callable[[Config], Any]] = {
    "transformers_version": lambda config: config.update(transformers_version="4.57.1"),
    "dtype": lambda config: config.update(dtype="float16"),
    "_name_or_path": lambda config: config.update(_name_or_path="/home/somebody/model"),
    "text_config": lambda config: config["text_config"].update(dtype="float16", use_cache=False, head_mask=None),
    "a default left out": lambda config: config["text_config"].pop("attention_dropout"),
}


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
def test_a_difference_that_changes_nothing_is_a_finding_and_all_is_measured(
    change: Callable[[Config], Any], made: Path, measured: Callable[[Path], Measured]
) -> None:
    reconfigure(made, change)
    values = measured(made)
    gates = by_name(values)
    assert values.audit.differences and values.audit.unaccounted == values.audit.context == ()
    assert gates["structure"].passed and gates["structure"].note.startswith(values.audit.differences[0])
    assert all(gates[name].value is not None for name in QUALITY)
    assert accepted(gates.values())


def test_a_config_of_an_earlier_transformers_is_the_same_under_other_names(
    made: Path, measured: Callable[[Path], Measured]
) -> None:
    reconfigure(made, rope_as_before)
    values = measured(made)
    assert values.audit.unaccounted == values.audit.context == (), values
    assert any("text_config.rope_theta" in sentence for sentence in values.audit.differences)


def test_a_difference_that_is_computed_with_fails_and_all_is_measured(
    made: Path, measured: Callable[[Path], Measured]
) -> None:
    reconfigure(made, lambda config: config["text_config"].update(rms_norm_eps=1e-2))
    values = measured(made)
    gates = by_name(values)
    assert values.audit.unaccounted == ("config.json differs from the base's in text_config",)
    assert gates["structure"].failed and not accepted(gates.values())
    assert all(gates[name].value is not None for name in QUALITY)


def test_a_tensor_too_many_fails_and_all_is_measured(made: Path, measured: Callable[[Path], Measured]) -> None:
    with edited(made, SHARD) as tensors:
        tensors["model.extra.weight"] = ("BF16", (1,), b"\0\0")
    gates = by_name(measured(made))
    assert gates["structure"].note == "model.extra.weight is not in the base"
    assert all(gates[name].value is not None for name in QUALITY)


BROKEN: dict[str, Callable[[Path], Any]] = {
    "a tensor is missing": lambda folder: _without(folder, "model.language_model.layers.0.mlp.down_proj.qweight"),
    "heads do not fit": lambda folder: reconfigure(
        folder, lambda config: config["text_config"].update(num_attention_heads=3, num_key_value_heads=1)
    ),
    "a config that transformers refuses": lambda folder: reconfigure(
        folder, lambda config: config["text_config"].update(hidden_size="wide")
    ),
    "no model of that type": lambda folder: reconfigure(folder, lambda config: config.update(model_type="nothing")),
}


def _without(folder: Path, name: str) -> None:
    with edited(folder, SHARD) as tensors:
        del tensors[name]


@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_run_is_not_passed_and_says_why(
    damage: Callable[[Path], Any], made: Path, measured: Callable[[Path], Measured]
) -> None:
    damage(made)
    values = measured(made)
    for limits in (NONE, Gates(), Gates(max_kl_divergence=1.0)):
        gates = by_name(values, limits)
        for name in ("perplexity_increase", "kl_divergence", "top1_agreement", "block_error"):
            limit = gates[name].limit
            assert gates[name].passed is (None if limit is None else False)
            assert gates[name].value is None and "could not be measured" in gates[name].note
        assert [gate.name for gate in gates.values() if (values.not_measured or "?") in gate.note] == ["same_tokens"]
        assert gates["weight_slope"].value is not None, "the files are compared all the same"
        assert not accepted(gates.values())


def test_where_nothing_was_measured_the_verdict_says_so() -> None:
    unmeasured = [Gate("structure", 0.0, 0.0, True), Gate("perplexity_increase", None, None, None)]
    assert not accepted(unmeasured) and refusal(unmeasured) == "nothing of its quality could be measured"
    assert accepted([*unmeasured, Gate("top1_agreement", 0.9, None, True)])


def test_another_tokenizer_fails_and_all_is_measured_on_the_tokens_of_the_base(
    made: Path, measured: Callable[[Path], Measured]
) -> None:
    from tests.factories.damage import wrong_tokenizer

    wrong_tokenizer(made)
    gates = by_name(measured(made))
    assert gates["same_tokens"].failed and not accepted(gates.values())
    assert gates["same_tokens"].note == "everything else is measured on the base's tokens"
    assert all(gates[name].value is not None for name in QUALITY)


def test_a_matrix_that_contradicts_its_scheme_does_not_keep_the_others_from_being_compared(
    made: Path, measured: Callable[[Path], Measured]
) -> None:
    count = len(measured(made).matrices or ())
    edit = Edit(made)
    name = "model.language_model.layers.0.mlp.down_proj.scales"
    dtype, shape, data = edit[name]
    edit[name] = (dtype, (1, shape[0] * shape[1]), data)
    edit.write()
    assert len(measured(made).matrices or ()) == count - 1


def test_a_json_file_that_differs_in_its_version_alone_is_a_finding(
    base: Path, made: Path, measured: Callable[[Path], Measured]
) -> None:
    reconfigure(made, lambda config: config.update(transformers_version="4.0"), "generation_config.json")
    values = measured(made)
    assert values.audit.files == ()
    assert values.audit.differences == ("generation_config.json differs from the base's in transformers_version alone",)
    reconfigure(made, lambda config: config.update(temperature=9.0), "generation_config.json")
    assert measured(made).audit.files == ("generation_config.json differs from the base's",)


def test_validate_tells_findings_at_the_terminal_and_as_json(base: Path, made: Path, tmp_path: Path) -> None:
    reconfigure(made, HARMLESS["transformers_version"])
    recipe = tmp_path / "recipe.yaml"
    gates = "".join(f"  {name}: null\n" for name in Gates.model_fields)
    recipe.write_text(f"base: me/x\nvalidation: {{text: {SHORT_TEXT}, tokens: 512}}\ngates:\n{gates}")
    arguments = [str(made), "--base", str(base), "--recipe", str(recipe)]
    outcome = CliRunner().invoke(validate, [*arguments, "--json"], catch_exceptions=False)
    document = json.loads(outcome.stdout)
    assert document["passed"] is True and outcome.exit_code == 0
    assert document["findings"] == [
        "config.json differs from the base's in transformers_version, which changes nothing that is computed"
    ]
    assert {"name", "value", "limit", "passed"} <= set(document["gates"][0])
