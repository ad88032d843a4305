"""What mtp-fix does not do: write words that no engine reads, or install what an engine makes less of than before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from requant.flows.cli.mtp_fix import mtp_fix
from requant.tasks.checkpoint.advice import FIX
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.compat import FINE, VERSIONS, Judgement
from requant.tasks.checkpoint.config import QuantizationConfig
from requant.tasks.checkpoint.exclusions import with_head_entries
from requant.tasks.checkpoint.mtp import find_head
from requant.tasks.checkpoint.repair import RepairSource, repair
from requant.tasks.errors import CheckpointError
from tests.factories.checkpoints import FULL, NARROW, all_tensors, experts_apart, raw_tensors, write_checkpoint
from tests.factories.fp8_bases import as_fp8
from tests.factories.heads import make_base, quantized
from tests.factories.pico import pico_base
from tests.factories.repairs import elsewhere, snapshot

DRAFTS = {"loads": True, "mtp": True, "reason": FINE, "version": VERSIONS["vllm"]}
UNKNOWN = ("bitsandbytes", "torchao", "mxfp4", "my-own", None)


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def without_the_head(folder: Path) -> Path:
    """A checkpoint in one shard, without its head's tensors."""
    tensors = {name: raw for name, raw in all_tensors(folder).items() if not name.startswith("mtp.")}
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    return write_checkpoint(folder, {"model-00001-of-00001.safetensors": tensors}, config_of(folder))


@pytest.mark.parametrize("method", UNKNOWN)
def test_a_method_whose_words_are_not_known_is_refused_and_nothing_is_changed(
    method: str | None, tmp_path: Path
) -> None:
    base = pico_base(tmp_path / "base")
    folder = without_the_head(as_fp8(base, tmp_path / "made"))
    quantization = {"quant_method": method, "quant_algo": "FP8", "ignore": ["lm_head"], "exclude": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps({**config_of(folder), "quantization_config": quantization}))
    before = snapshot(folder)
    for dry_run in (True, False):
        with pytest.raises(CheckpointError, match=f"nothing was changed: quant_method is {method!r}") as caught:
            repair(folder, RepairSource(base), dry_run=dry_run)
        assert len(str(caught.value).splitlines()) == 1
    assert snapshot(folder) == before and not list(tmp_path.glob(".*"))


def test_the_command_ends_with_exit_status_1_and_the_error_that_is_a_sentence(tmp_path: Path) -> None:
    base = pico_base(tmp_path / "base")
    folder = without_the_head(as_fp8(base, tmp_path / "made"))
    (folder / "config.json").write_text(
        json.dumps({**config_of(folder), "quantization_config": {"quant_method": "hqq", "exclude": []}})
    )
    outcome = CliRunner().invoke(mtp_fix, [str(folder), "--base", str(base)])
    assert outcome.exit_code == 1 and isinstance(outcome.exception, CheckpointError)  # which the CLI says as a sentence
    assert "extra_config" not in (folder / "config.json").read_text()


@pytest.mark.parametrize("head", [False, True], ids=["no head", "FP8 head"])
def test_an_fp8_moe_names_the_fused_experts_of_the_head_that_is_put_in(head: bool, tmp_path: Path) -> None:
    base = pico_base(tmp_path / "base", experts=4)
    folder = as_fp8(split(base, tmp_path / "split"), tmp_path / "made")
    assert Judgement.of(Checkpoint.open(folder)).verdicts["vllm"].to_json() == DRAFTS
    if not head:
        without_the_head(folder)
    result = repair(folder, RepairSource(base))
    assert result.changed and "mtp.layers.0.mlp.experts" in kept_by(folder)
    assert result.engines == Judgement.of(Checkpoint.open(folder)).verdicts
    assert result.engines["vllm"].mtp is True and result.engines["sglang"].mtp is True
    before = snapshot(folder)
    assert repair(folder, RepairSource(base)).changed is False and snapshot(folder) == before


def split(base: Path, folder: Path) -> Path:
    """A base with its experts one by one, the head's too, as published FP8 models have them."""
    shutil.copytree(base, folder)
    inside = {name.replace("mtp.", "head.", 1): raw for name, raw in all_tensors(base).items()}
    tensors = {name.replace("head.", "mtp.", 1): raw for name, raw in experts_apart(inside).items()}
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    return write_checkpoint(folder, {"model-00001-of-00001.safetensors": tensors}, config_of(base))


def kept_by(folder: Path) -> list[str]:
    kept: list[str] = config_of(folder)["quantization_config"]["modules_to_not_convert"]
    return kept


def test_an_fp8_head_that_comes_back_is_not_said_to_be_unquantized(tmp_path: Path) -> None:
    official = as_fp8(pico_base(tmp_path / "base"), tmp_path / "official")
    folder = without_the_head(as_fp8(tmp_path / "base", tmp_path / "made"))
    changed = {**config_of(folder)["quantization_config"], "modules_to_not_convert": ["mtp", "lm_head"]}
    kept = [name for name in kept_by(folder) if not name.startswith("mtp.")]
    changed["modules_to_not_convert"] += kept
    (folder / "config.json").write_text(json.dumps({**config_of(folder), "quantization_config": changed}))
    result = repair(folder, RepairSource(official))
    assert [name for name in kept_by(folder) if name.startswith("mtp")] == ["mtp.fc"]
    assert {*kept, "lm_head"} <= {*kept_by(folder)}
    assert result.engines["vllm"].mtp is True and result.engines["sglang"].mtp is True


def test_the_list_that_vllm_prefers_names_the_head_too(tmp_path: Path) -> None:
    base = pico_base(tmp_path / "base")
    folder = without_the_head(as_fp8(base, tmp_path / "made"))
    quantization = config_of(folder)["quantization_config"]
    quantization["ignored_layers"] = quantization.pop("modules_to_not_convert")
    (folder / "config.json").write_text(json.dumps({**config_of(folder), "quantization_config": quantization}))
    assert repair(folder, RepairSource(base)).engines["vllm"].mtp is True


@pytest.mark.parametrize(("method", "key"), [
    ("gptq_marlin", "dynamic"), ("auto_gptq", "dynamic"), ("awq_marlin", "modules_to_not_convert"),
    ("modelopt_fp8", "ignore"), ("quark_mxfp4", "exclude"), ("quark_int4fp8_moe", "exclude"),
    ("inc", "extra_config"), ("compressed_tensors", "ignore"), ("AWQ", "modules_to_not_convert"),
])  # fmt: skip
def test_another_name_of_a_known_method_has_that_methods_words(method: str, key: str, tmp_path: Path) -> None:
    base = Checkpoint.open(pico_base(tmp_path / "base"))
    head = find_head(base.tensors, base.config)
    assert head is not None
    assert list(with_head_entries(QuantizationConfig(quant_method=method), head, base.tensors)) == ["quant_method", key]


@pytest.fixture
def shared_key(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint and its base. One key of its extra_config speaks of the vision tower and of the head, and nothing
    else keeps the vision tower from being taken for packed."""
    base = pico_base(tmp_path / "base")
    folder = elsewhere(base, tmp_path / "made", packed=("mtp.fc",))
    config = config_of(folder)
    del config["quantization_config"]["block_name_to_quantize"]
    config["quantization_config"]["extra_config"] = {**NARROW, r".*(visual|mtp\.layers).*": FULL}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, base


def test_no_repair_is_installed_after_which_an_engine_loads_less_than_before(shared_key: tuple[Path, Path]) -> None:
    folder, base = shared_key
    assert Judgement.of(Checkpoint.open(folder)).verdicts["vllm"].to_json() == DRAFTS
    before = snapshot(folder)
    for dry_run in (True, False):
        with pytest.raises(
            CheckpointError, match=r"vllm would no longer load it .*visual.*nothing was changed"
        ) as caught:
            repair(folder, RepairSource(base), dry_run=dry_run)
        assert len(str(caught.value).splitlines()) == 1 and FIX not in str(caught.value)
    assert snapshot(folder) == before and not list(folder.parent.glob(".*"))


def test_an_awq_checkpoint_without_a_list_keeps_what_its_tensors_say(tmp_path: Path) -> None:
    """vLLM takes what is not packed from the tensors as long as no list says it: the head's names alone would make it
    look for a packed down_proj."""
    base = make_base(tmp_path / "base", "mtp")
    tensors = all_tensors(base)
    plain = "model.layers.1.mlp.down_proj.weight"
    folder = quantized(tensors, tmp_path / "made", config_of(base), "awq", head=["mtp.fc"], shards=1, single=False)
    (shard,) = folder.glob("*.safetensors")
    held = {n: raw for n, raw in raw_tensors(shard).items() if not n.startswith(plain.removesuffix("weight"))}
    write_checkpoint(folder, {shard.name: {**held, plain: tensors[plain]}}, config_of(folder))
    assert Judgement.of(Checkpoint.open(folder)).verdicts["vllm"].loads is True
    assert repair(folder, RepairSource(base)).engines["vllm"].to_json() == DRAFTS
    assert {"mtp", plain.removesuffix(".weight")} <= {*kept_by(folder)}


def test_a_dry_run_says_what_the_engines_will_make_of_the_repaired_checkpoint(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "mtp")
    folder = quantized(all_tensors(base), tmp_path / "made", config_of(base), "gptq", head=["mtp.fc"], shards=2,
                       single=False)  # fmt: skip
    assert Judgement.of(Checkpoint.open(folder)).verdicts["sglang"].mtp is False
    promised = repair(folder, RepairSource(base), dry_run=True)
    text = CliRunner().invoke(mtp_fix, [str(folder), "--base", str(base), "--dry-run"]).output
    assert promised.changed is False and "would be repaired" in text and "does not draft: there" not in text
    assert [line for line in text.splitlines() if line.startswith("sglang")] == [
        "sglang       loads, drafts: nothing is in the way (sglang 0.5.23)"
    ]
    assert repair(folder, RepairSource(base)).engines == promised.engines


def test_a_dry_run_counts_the_files_that_come_from_the_base(tmp_path: Path) -> None:
    base = pico_base(tmp_path / "base")
    folder = as_fp8(base, tmp_path / "made")
    (folder / "preprocessor_config.json").unlink()
    (folder / "video_preprocessor_config.json").unlink()
    promised = repair(folder, RepairSource(base), dry_run=True)
    assert promised.engines["vllm"].loads is True
    assert repair(folder, RepairSource(base)).engines == promised.engines


def test_a_smaller_head_that_is_asked_for_may_cost_one_engine(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "mtp")
    folder = quantized(all_tensors(base), tmp_path / "made", config_of(base), "auto_round:auto_gptq", head=[], shards=2,
                       single=False)  # fmt: skip
    repair(folder, RepairSource(base))
    result = repair(folder, RepairSource(base), precision="int4")
    assert result.changed and result.engines["vllm"].mtp is True


def test_a_model_that_never_had_a_head_needs_no_base(tmp_path: Path) -> None:
    folder = pico_base(tmp_path / "base", head=False)
    for dry_run in (True, False):
        result = repair(folder, None, dry_run=dry_run)
        assert (result.changed, result.writes, result.problems) == (False, [], [])
    outcome = CliRunner().invoke(mtp_fix, [str(folder)])
    assert outcome.exit_code == 1 and "nothing to repair" in outcome.output  # no engine drafts


def text_of(*words: str | Path) -> str:
    """The first line that `requant mtp-fix` prints, without the folder."""
    line = CliRunner().invoke(mtp_fix, [str(word) for word in words]).output.splitlines()[0]
    return line.partition(": ")[2]


def test_the_text_says_what_happened_to_the_head(tmp_path: Path) -> None:
    base = pico_base(tmp_path / "base")
    folder = elsewhere(base, tmp_path / "made", packed=("mtp.fc",))
    assert text_of(folder, "--dry-run") == "would be repaired, 1 tensors of the head dequantized (lossy)"
    assert text_of(folder, "--base", base) == "repaired, 15 tensors of the head from the base"
    (folder / "quantization_config.json").unlink()
    (folder / "model.safetensors.index.json").write_text(
        (folder / "model.safetensors.index.json").read_text().replace('"total_size": ', '"total_size": 1')
    )
    assert text_of(folder) == "repaired, no tensor of the head differs"
    assert (
        text_of(folder) == "nothing that mtp-fix can repair"
    )  # matrices of the main model are not in the base's dtype
    rounded = text_of(folder, "--base", base, "--precision", "int8")
    assert rounded.endswith("tensors of the head from the base, its layers rounded to INT8")


def test_a_file_that_keeps_engines_from_starting_does_not_keep_the_head_from_being_mended(tmp_path: Path) -> None:
    base = pico_base(tmp_path / "base")
    folder = elsewhere(base, tmp_path / "made", packed=("mtp.fc",))
    (folder / "video_preprocessor_config.json").unlink()
    result = repair(folder, None)
    assert result.changed and result.tensors_restored == 1
    assert [p for p in result.problems if "video_preprocessor_config.json is missing" in p]
    assert not [p for p in result.problems if "mtp.fc" in p]
