"""merge as a stage: the formula of peft, what its key reads, and what a plan says of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from requant.flows.report.plan import plan_text
from requant.tasks.artifact import Manifest
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.download import download
from requant.tasks.errors import CheckpointError, RecipeError
from requant.tasks.merge import find_adapter, find_merged_base, merge, with_card
from requant.tasks.plan import plan
from requant.tasks.quantize import quantize_key
from requant.tasks.recipe.base_section import Base
from requant.tasks.recipe.loader import parse_recipe
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.store import Store
from requant.tasks.texts.calibration import Calibration
from requant.tasks.texts.text import find_text
from tests.factories.adapters import MODULES, lora_config, lora_tensors, write_adapter
from tests.factories.bases import other_base
from tests.factories.pico import pico_base
from tests.factories.watching import is_one_sentence

CALIBRATION = Calibration.of(find_text("builtin:python"))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = pico_base(tmp_path / "base")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# their card\n")
    return folder


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", lora_tensors(base))


def recipe_of(base: Path, adapter: Path) -> Recipe:
    return parse_recipe(
        {
            "base": str(base),
            "adapter": str(adapter),
            "quantize": {"group_size": 32, "calibration": "builtin:python"},
            "benchmark": {"engine": "none"},
        }
    )


def merged(store: Store, base: Path, adapter: Path) -> tuple[Manifest, Manifest, str]:
    """The files of a base, the same merged with an adapter, and whether that was reused."""
    found = find_merged_base(store, recipe_of(base, adapter))
    assert found.adapter is not None
    downloaded = download(store, found).manifest
    result = merge(store, downloaded, found.adapter)
    return downloaded, result.manifest, result.state


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: one for shard in folder.glob("*.safetensors") for name, one in load_file(shard).items()}


@pytest.mark.parametrize(
    ("kind", "dtype", "settings"),
    [
        ("pico", torch.bfloat16, {"r": 4, "lora_alpha": 8}),
        ("llama", torch.float16, {"r": 8, "lora_alpha": 7, "use_rslora": True}),
        (
            "llama",
            torch.float32,
            {
                "r": 4,
                "lora_alpha": 16,
                "rank_pattern": {"q_proj": 2, r"model\.layers\.0\.mlp.*": 6},
                "alpha_pattern": {"layers.1.self_attn.q_proj": 3, "q_proj": 32},
            },
        ),
        (
            "stored in bf16",
            torch.bfloat16,
            {"r": 4, "lora_alpha": 3, "use_rslora": True, "alpha_pattern": {"up_proj": 9}},
        ),
    ],
)
def test_a_merge_is_that_of_peft_bit_for_bit(
    kind: str, dtype: torch.dtype, settings: dict[str, Any], store: Store, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    import transformers

    folder = tmp_path / "base"
    load: Any = transformers.AutoModelForCausalLM
    if kind == "pico":
        pico_base(folder)
        load = transformers.AutoModelForImageTextToText
    else:
        other_base(folder, "llama")
        load.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], **settings)
    tuned = peft.get_peft_model(load.from_pretrained(folder, dtype=dtype), config)
    torch.manual_seed(1)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    if kind == "stored in bf16":
        tuned.to(torch.bfloat16)
    tuned.save_pretrained(tmp_path / "adapter")
    model = peft.PeftModel.from_pretrained(load.from_pretrained(folder, dtype=dtype), tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "by peft")

    _, ours, _ = merged(store, folder, tmp_path / "adapter")
    found, expected, before = (
        weights(store.checkout(ours, tmp_path / "ours")),
        weights(tmp_path / "by peft"),
        weights(folder),
    )
    changed = {name for name in expected if not torch.equal(expected[name], before[name])}
    assert len(changed) >= 4 and changed == {name for name in before if not torch.equal(found[name], before[name])}
    for name in changed:
        assert found[name].dtype == dtype
        assert torch.equal(found[name], expected[name]), name


def test_only_shards_that_change_are_written_and_all_else_is_the_bases(
    base: Path, adapter: Path, store: Store, tmp_path: Path
) -> None:
    one_module = write_adapter(tmp_path / "one", lora_tensors(base, MODULES[:1]))
    before, after, _ = merged(store, base, one_module)
    changed = {file.path for file in after.files if before[file.path] != file}
    assert changed == {Checkpoint.open(base).tensors[f"{MODULES[0]}.weight"].path.name}
    assert {file.path for file in before.files} - {file.path for file in after.files} == {"README.md"}
    assert with_card(after, before)["README.md"] == before["README.md"]
    checkout = store.checkout(after, tmp_path / "out")
    assert not Checkpoint.open(checkout).problems
    ours, theirs = weights(checkout), weights(base)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == [f"{MODULES[0]}.weight"]


def test_the_key_reads_the_content_of_base_and_adapter_alone(
    base: Path, adapter: Path, store: Store, tmp_path: Path
) -> None:
    first, after, state = merged(store, base, adapter)
    assert state == "ran"
    (base / "README.md").write_text("# another card")
    (adapter / "README.md").write_text("# another card")
    moved = shutil.copytree(adapter, tmp_path / "moved")
    assert merged(store, base, moved)[1:] == (after, "reused")
    write_adapter(adapter, lora_tensors(base), lora_config(lora_alpha=9))
    _, other, state = merged(store, base, adapter)
    assert state == "ran" and other.digest != after.digest
    recipe = recipe_of(base, adapter)
    keys = {quantize_key(recipe, files, CALIBRATION) for files in (first, after, other)}
    assert len(keys) == 3


def test_a_matrix_that_overflows_is_refused(base: Path, store: Store, tmp_path: Path) -> None:
    huge = {name: one * 1e30 for name, one in lora_tensors(base).items()}
    with pytest.raises(CheckpointError, match="not finite once the adapter is merged"):
        merged(store, base, write_adapter(tmp_path / "huge", huge))


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"adapter_config.json": "{}"}, "needs its weights as adapter_model.safetensors, and has none"),
        ({"adapter_config.json": "{}", "adapter_model.bin": "pickle"}, "only adapter_model.bin, a pickle"),
        ({"adapter_model.safetensors": "x"}, "it has no adapter_config.json"),
        ({}, "it has no adapter_config.json"),
    ],
)
def test_a_folder_that_is_no_adapter_is_told(files: dict[str, str], told: str, store: Store, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=told) as raised:
        find_adapter(store, Base(folder=str(tmp_path)))
    assert is_one_sentence(str(raised.value))


def test_a_folder_that_does_not_exist_is_told_as_the_adapters(store: Store, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"the folder .* does not exist on this machine"):
        find_adapter(store, Base(folder=str(tmp_path / "none")))


def test_a_plan_has_the_merge_and_goes_by_what_the_store_has(base: Path, adapter: Path, store: Store) -> None:
    recipe = recipe_of(base, adapter)
    document = plan(store, recipe, elsewhere=True)
    assert not document.problems
    assert [stage.name for stage in document.stages][:3] == ["download", "merge", "quantize"]
    stage = document.stages[1]
    before, after, _ = merged(store, base, adapter)
    written_bytes = sum(file.size for file in after.files if before[file.path] != file)
    assert stage.state == "run" and stage.bytes == written_bytes, "the sizes, to the byte"
    assert document.needs.stages["merge"].disk_bytes == stage.bytes  # type: ignore[union-attr]
    assert document.base.adapter and f"with the adapter {document.base.adapter[:15]}" in plan_text(document)
    again = plan(store, recipe, elsewhere=True)
    assert again.stages[1].state == "reused"
    alone = plan(store, recipe.model_copy(update={"adapter": None}), elsewhere=True)
    assert "merge" not in {stage.name for stage in alone.stages}
    write_adapter(adapter, lora_tensors(base), lora_config(lora_alpha=9))
    changed = plan(store, recipe, elsewhere=True)
    assert changed.stages[1].state == "run" and "another adapter" in (changed.stages[1].again or "")


def test_a_plan_says_why_an_adapter_cannot_be_merged(base: Path, adapter: Path, store: Store) -> None:
    write_adapter(adapter, lora_tensors(base), lora_config(use_dora=True))
    (problem,) = plan(store, recipe_of(base, adapter), elsewhere=True).problems
    assert "use_dora" in problem and is_one_sentence(problem)
    (adapter / "adapter_model.safetensors").unlink()
    (problem,) = plan(store, recipe_of(base, adapter), elsewhere=True).problems
    assert "adapter_model.safetensors" in problem


def test_a_recipe_without_adapter_keeps_its_digest_and_another_adapter_has_another(base: Path, adapter: Path) -> None:
    plain = parse_recipe({"base": {"repo_id": "a/b"}})
    assert plain.digest == parse_recipe({"base": "a/b", "adapter": None}).digest
    digests = {parse_recipe({"base": "a/b", "adapter": name}).digest for name in ("c/d", "c/d@v2", "c/e")}
    assert len({plain.digest, *digests}) == 4
