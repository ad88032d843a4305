"""requant mtp-fix beside files that the index does not name, killed at any step: no tensor is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from requant.tasks.checkpoint.checkpoint import INDEX, SINGLE, Checkpoint
from requant.tasks.checkpoint.head import HEAD_SHARD
from requant.tasks.checkpoint.repair import RepairSource, repair
from tests.factories.checkpoints import all_tensors, raw_tensors, safetensors_bytes, write_checkpoint
from tests.factories.heads import Tensors, make_base, quantized
from tests.factories.repairs import killed_at

SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base", "mtp")


def made_of(base: Path, folder: Path, *, packed: bool = True) -> tuple[Tensors, Tensors]:
    """Write a checkpoint whose config says that the head is not quantized. Returns the main model, and the head."""
    config = json.loads((base / "config.json").read_text())
    head = ["mtp.fc"] if packed else []
    quantized(all_tensors(base), folder, config, "gptq", head=head, shards=1, single=False)
    for name in ("config.json", "quantize_config.json"):
        if (folder / name).exists():
            document = json.loads((folder / name).read_text())
            document.get("quantization_config", document)["dynamic"] = {"-:.*mtp.*": {}}
            (folder / name).write_text(json.dumps(document))
    tensors = all_tensors(folder)
    main = {name: raw for name, raw in tensors.items() if not name.startswith("mtp.")}
    return main, {name: raw for name, raw in tensors.items() if name not in main}


def laid_out(folder: Path, indexed: dict[str, Tensors], beside: dict[str, Tensors]) -> None:
    config = json.loads((folder / "config.json").read_text())
    for path in (*folder.glob("*.safetensors"), folder / INDEX):
        path.unlink(missing_ok=True)
    write_checkpoint(folder, indexed, config)
    for name, raw in beside.items():
        (folder / name).write_bytes(safetensors_bytes(raw))


@pytest.mark.parametrize("name", [HEAD_SHARD, "model-restored-00001.safetensors"])
def test_a_file_that_the_index_does_not_name_is_never_overwritten(name: str, base: Path, tmp_path: Path) -> None:
    """The head is packed in the index's shard, and whole in a file of a name that a repair would like to use."""
    folder = tmp_path / "made"
    main, head = made_of(base, folder)
    true_head = {n: raw for n, raw in all_tensors(base).items() if n.startswith("mtp.")}
    laid_out(folder, {SHARD: main | head}, {name: true_head})
    assert repair(folder, None).changed is True
    assert raw_tensors(folder / name) == true_head
    assert repair(folder, RepairSource(base)).changed is True
    assert raw_tensors(folder / name) == true_head
    opened = Checkpoint.open(folder)
    assert {n: t.read() for n, t in opened.tensors.items() if n in true_head} == {
        n: raw[2] for n, raw in true_head.items()
    }


LAYOUTS = ["the head and more in the single file", "the head in a file of its own", "the head in its own shard"]


@pytest.mark.parametrize(
    "with_base", [pytest.param(True, id="base", marks=pytest.mark.slow), pytest.param(False, id="no base")]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_repair_in_place_killed_at_any_step_loses_no_tensor(
    layout: str, with_base: bool, base: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole" / "made"
    main, head = made_of(base, whole)
    if layout == LAYOUTS[0]:
        more = {"lm_head.weight": main.pop("lm_head.weight")}
        laid_out(whole, {SHARD: main}, {SINGLE: head | more})
        main |= more
    elif layout == LAYOUTS[1]:
        laid_out(whole, {SHARD: main}, {"mtp.safetensors": head})
    else:
        laid_out(whole, {SHARD: main, HEAD_SHARD: head}, {})
    source = RepairSource(base) if with_base else None
    steps, killed = 0, True
    while killed:
        folder = Path(shutil.copytree(whole, tmp_path / "killed" / "made"))
        killed = killed_at(steps, lambda folder=folder: repair(folder, source), folder)
        if not (with_base and layout == LAYOUTS[2]):  # index and shard may disagree about a head that the base has
            repair(folder, None)
        result = repair(folder, RepairSource(base))
        assert result.engines["vllm"].mtp is True and result.problems == []
        there = {n: (t.dtype, t.shape, t.read()) for n, t in Checkpoint.open(folder).tensors.items()}
        assert {n: raw for n, raw in there.items() if not n.startswith("mtp.")} == main
        assert not (folder / ".mtp-fix").exists()
        shutil.rmtree(folder.parent)
        steps += killed
    assert steps > 10


def test_a_list_of_added_shards_is_ignored_once_the_index_is_in_place(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    main, head = made_of(base, folder)
    laid_out(folder, {SHARD: main | head}, {"mine.safetensors": {"mine.weight": ("BF16", (1,), b"ab")}})
    (folder / ".mtp-fix").mkdir()
    (folder / ".mtp-fix" / ".added").write_text(f"mine.safetensors\n{SHARD}")
    repair(folder, None)
    assert (folder / "mine.safetensors").exists()
