"""Advice that was tried: whoever follows it gets rid of the sentence, and loses no tensor."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from requant.tasks.checkpoint.advice import FIX, FIX_INDEX, FROM_BASE
from requant.tasks.checkpoint.checkpoint import INDEX
from requant.tasks.checkpoint.inspect import inspect_checkpoint
from requant.tasks.checkpoint.repair import RepairSource, repair
from requant.tasks.checkpoint.shards import MOVE
from requant.tasks.errors import CheckpointError
from tests.factories.checkpoints import all_tensors, raw_tensors, safetensors_bytes, write_checkpoint
from tests.factories.fp8_bases import as_fp8
from tests.factories.heads import PACKINGS, make_base, quantized

Damage = Callable[[Path], Any]
# A head's layout, and a packing or a method.
WHOLE = [
    *(("mtp", method) for method in ("auto_round:auto_gptq", "auto_round:auto_awq", "gptq", "awq")),
    *(("mtp", method) for method in ("fp8", "modelopt", "quark", "torchao")),
    *(("inlined-moe", method) for method in ("auto_round:auto_gptq", "fp8")),
]


def made(base: Path, folder: Path, method: str) -> Path:
    """A checkpoint of the method with a head that it says is not quantized, as far as Requant knows its words."""
    if method in PACKINGS:
        config = json.loads((base / "config.json").read_text())
        quantized(all_tensors(base), folder, config, method, head=[], shards=2, single=False)
    else:
        as_fp8(base, folder, head=False)
        if method != "fp8":
            key = {"modelopt": "ignore", "quark": "exclude"}.get(method, "modules_to_not_convert")
            change(folder, quantization_config={"quant_method": method, "quant_algo": "FP8", key: ["lm_head"]})
    with contextlib.suppress(CheckpointError):  # of a method whose words are not known, or that no engine loads
        repair(folder, RepairSource(base))
    return folder


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def index_of(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / INDEX).read_text())
    return document


def is_of_head(name: str) -> bool:
    return name.startswith(("mtp.", "model.layers.2."))


def rewritten(folder: Path, keep: Callable[[str], bool], beside: str | None = None) -> None:
    """Put what is kept into one shard, and the rest into a file `beside` the index or nowhere."""
    tensors, config = all_tensors(folder), json.loads((folder / "config.json").read_text())
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    write_checkpoint(
        folder, {"model-00001-of-00001.safetensors": {n: r for n, r in tensors.items() if keep(n)}}, config
    )
    if beside is not None:
        rest = {name: raw for name, raw in tensors.items() if not keep(name)}
        (folder / beside).write_bytes(safetensors_bytes(rest))


def head_lost(folder: Path) -> None:
    rewritten(folder, lambda name: not is_of_head(name))


def norm_lost(folder: Path) -> None:
    rewritten(folder, lambda name: not (is_of_head(name) and name.endswith("norm.weight")))


def head_beside(folder: Path) -> None:
    rewritten(folder, lambda name: not is_of_head(name), "model_mtp.safetensors")


def layer_beside(folder: Path) -> None:
    rewritten(folder, lambda name: ".layers.1." not in name, "more.safetensors")


def copy_beside(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    shutil.copy(shard, folder / "old-00001-of-00007.safetensors")


def adapter_beside(folder: Path) -> None:
    raw = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": ("BF16", (1, 2), bytes(4))}
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(raw))


def other_names(folder: Path) -> None:
    index = index_of(folder)
    names = {
        name: f"model-{1 + number % 2:05d}-of-00099.safetensors" for number, name in enumerate(index["weight_map"])
    }
    (folder / INDEX).write_text(json.dumps({**index, "weight_map": names}))


def no_index(folder: Path) -> None:
    rewritten(folder, lambda name: not is_of_head(name), "model-mtp.safetensors")
    (folder / INDEX).unlink()


def wrong_total(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({**index_of(folder), "metadata": {"total_size": 1}}))


def wrong_total_and_a_key_twice(folder: Path) -> None:
    wrong_total(folder)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("{", '{"hidden_size": 64, ', 1))


def null_count(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    key = next(key for key in ("mtp_num_hidden_layers", "num_nextn_predict_layers") if key in config)
    change(folder, **{key: None})


def configs_disagree(folder: Path) -> None:
    (folder / "quantization_config.json").write_text('{"bits": 8}')


def entries_lost(folder: Path) -> None:
    """The config no longer says that the head is not quantized."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    lost = {"extra_config", "dynamic", "modules_to_not_convert", "ignore", "exclude"}
    change(folder, quantization_config={key: value for key, value in config.items() if key not in lost})


def three_bits(folder: Path) -> None:
    (folder / "quantization_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    change(folder, quantization_config={**config, "bits": 3, "quant_algo": "NONE"})


DAMAGE: dict[str, Damage] = {
    damage.__name__: damage
    for damage in (
        head_lost, norm_lost, head_beside, layer_beside, copy_beside, adapter_beside, other_names, no_index,
        wrong_total,
        wrong_total_and_a_key_twice, null_count, configs_disagree, entries_lost, three_bits,
    )
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Path, Path]]:
    """A base and a checkpoint without a fault, by layout and method."""
    root = tmp_path_factory.mktemp("whole")
    found = {}
    bases = {layout: make_base(root / layout / "base", layout) for layout in dict.fromkeys(head for head, _ in WHOLE)}
    for layout, method in WHOLE:
        found[layout, method] = bases[layout], made(bases[layout], root / layout / method, method)
    return found


@pytest.mark.parametrize("damage", DAMAGE)
def test_who_follows_an_advice_gets_rid_of_the_sentence_and_loses_nothing(
    damage: str, whole: dict[tuple[str, str], tuple[Path, Path]], tmp_path: Path
) -> None:
    advised: list[str] = []
    for (layout, method), (base, sound) in whole.items():
        folder = tmp_path / layout / method
        shutil.copytree(sound, folder)
        DAMAGE[damage](folder)
        problems = inspect_checkpoint(folder).problems
        for number, problem in enumerate(problems):
            case = f"{layout}, {method}: {problem}"
            assert not [word for word in ("delete", "remove one", "take them from") if word in problem], case
            copy = folder.with_name(f"{method}-{number}")
            shutil.copytree(folder, copy)
            before = everything(copy)
            if not follow(problem, copy, base):
                continue
            advised.append(case)
            assert problem not in inspect_checkpoint(copy).problems, case
            kept = {name: raw for name, raw in before.items() if not is_of_head(name)}
            if MOVE in problem:
                assert everything(folder) == before, case
            else:
                assert {name: everything(copy).get(name) for name in kept} == kept, case
                assert not [name for name in before if is_of_head(name)] or [
                    n for n in everything(copy) if is_of_head(n)
                ]
    helps_nobody = damage in {"three_bits", "wrong_total_and_a_key_twice"}
    assert not advised if helps_nobody else len(advised) >= len(WHOLE) // 2, advised


def everything(folder: Path) -> dict[str, Any]:
    """The tensors of all weight files, whatever the index says."""
    return {name: raw for file in sorted(folder.glob("*.safetensors")) for name, raw in raw_tensors(file).items()}


def follow(problem: str, folder: Path, base: Path) -> bool:
    """Do what a sentence advises. Returns whether it advises anything that can be done here."""
    if problem.endswith(FROM_BASE):
        repair(folder, RepairSource(base))
    elif problem.endswith((FIX, FIX_INDEX)):
        repair(folder, None)
    elif problem.endswith(MOVE):
        stray = next(file for file in folder.glob("*.safetensors") if file.name in problem)
        stray.rename(folder.parent / f"{folder.name}-{stray.name}")
    else:
        return False
    return True


@pytest.mark.parametrize("damage", ["head_lost", "norm_lost", "entries_lost", "null_count", "three_bits"])
def test_where_no_advice_is_given_for_a_head_no_repair_would_have_helped(
    damage: str, whole: dict[tuple[str, str], tuple[Path, Path]], tmp_path: Path
) -> None:
    for (layout, method), (base, sound) in whole.items():
        folder = tmp_path / layout / method
        shutil.copytree(sound, folder)
        DAMAGE[damage](folder)
        before = inspect_checkpoint(folder)
        if any(problem.endswith((FIX, FROM_BASE)) for problem in before.problems):
            continue
        try:
            after = repair(folder, RepairSource(base)).engines
        except CheckpointError:
            continue
        for engine in ("vllm", "sglang"):
            assert after[engine].rank <= before.engines[engine].rank, (layout, method, engine)


def test_an_advice_to_take_a_config_away_is_given_where_the_model_loads_without_it(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "mtp")
    change(base, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True})
    (problem,) = [p for p in inspect_checkpoint(base).problems if "no tensor is quantized" in p]
    assert "remove it, or restore" in problem
