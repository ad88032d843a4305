"""Repos that are no base: inspect, plan and run say the same of each, and nothing of its weights is fetched."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

import requant as api
from infra.dev.hub.launch import HubStandIn
from requant.tasks.errors import CheckpointError, Refused
from requant.tasks.hub.revision import resolve
from requant.tasks.plan import plan, preflight
from requant.tasks.recipe.loader import parse_recipe
from requant.tasks.store import Store
from requant.tasks.store.folder import FolderBackend
from requant.tasks.texts.calibration import Calibration
from requant.tasks.texts.text import find_text
from tests.factories.foreign import IN_PLACE, KINDS
from tests.factories.pico import pico_base

pytestmark = pytest.mark.usefixtures("hub_here")
SMALL = {"group_size": 32, "nsamples": 8, "seqlen": 64, "batch_size": 4, "calibration": "builtin:python"}
SHARD, INDEX = "model-00002-of-00002.safetensors", "model.safetensors.index.json"


def told(repo_id: str, store: Path) -> Mapping[str, list[str]]:
    """What inspect, plan and the beginning of a run say is wrong with a base."""
    held = Store(backend := FolderBackend(store), cache=backend)
    recipe = parse_recipe({"base": {"repo_id": repo_id}, "quantize": SMALL, "benchmark": {"engine": "none"}})
    try:
        inspected = list(api.inspect(repo_id).problems)
    except CheckpointError as error:
        inspected = [str(error)]
    texts = Calibration.of(find_text("builtin:python")), find_text("builtin:python-evaluation")
    with pytest.raises(Refused) as refused:
        preflight(held, recipe, resolve(repo_id), *texts)
    return {"inspect": inspected, "plan": list(plan(held, recipe).problems), "run": str(refused.value).split("; ")}


def sent(hub: HubStandIn) -> list[str]:
    """The files of which the Hub has sent something."""
    return [t["path"].rpartition("/")[2] for t in hub.traffic() if "/resolve/" in t["path"]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_repo_of_another_kind_is_named_alike_by_all_and_nothing_but_its_card_is_read(
    kind: str, hub: HubStandIn, tmp_path: Path
) -> None:
    repo_id = f"kinds/{kind.replace(' ', '-').replace(chr(39), '')}"
    hub.seed(repo_id, KINDS[kind].write(tmp_path / "base"))
    hub.reset_traffic()
    said = told(repo_id, tmp_path / "store")
    assert said["inspect"] == said["plan"] == said["run"]
    (sentence,) = said["plan"]
    assert sentence.startswith(f"{repo_id} ") and KINDS[kind].said in sentence
    assert {*sent(hub)} <= {"README.md", "adapter_config.json", "model_index.json"}


def in_place(name: str, case: str) -> Callable[[Path], None]:
    return lambda base: (base / name).write_bytes(IN_PLACE[case][0]) and None


def cut(base: Path) -> None:
    (base / SHARD).write_bytes((base / SHARD).read_bytes()[:-100])


# Files of a base that are something else; what is said, and whether it is about the base as a whole.
FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    **{f"{name}, {case}": (in_place(name, case), f"{name} {IN_PLACE[case][1]}")
       for name in (SHARD, "tokenizer.json", "config.json", INDEX) for case in ("pointer", "empty")},
    "shard, page": (in_place(SHARD, "page"), f"{SHARD} {IN_PLACE['page'][1]}"),
    "index, page": (in_place(INDEX, "page"), f"{INDEX} {IN_PLACE['page'][1]}"),
    "shard, cut": (cut, f"{SHARD} has "),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_something_else_is_named_alike_by_all(case: str, hub: HubStandIn, tmp_path: Path) -> None:
    damage, sentence = FILES[case]
    repo_id = f"files/{case.replace(', ', '-')}"
    damage(base := pico_base(tmp_path / "base"))
    hub.seed(repo_id, base)
    hub.reset_traffic()
    said = told(repo_id, tmp_path / "store")
    (inspected,), (planned,), (run,) = said.values()
    assert inspected.startswith(sentence) and "/" not in inspected.partition(":")[0]
    assert planned == run and planned.removeprefix(f"the base {repo_id} cannot be used: ") == inspected
    assert all(t["bytes_out"] <= 16 << 10 for t in hub.traffic() if t["path"].endswith(".safetensors"))


def test_a_tokenizer_is_told_before_the_first_byte(hub: HubStandIn, tmp_path: Path) -> None:
    base = pico_base(tmp_path / "base")
    (base / "tokenizer.json").unlink()
    hub.seed("files/no-tokenizer", base)
    said = told("files/no-tokenizer", tmp_path / "store")
    assert said["plan"] == said["run"] and said["inspect"] == []
    assert said["plan"][0].startswith("the base files/no-tokenizer has no tokenizer")
    (base / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE"}}))
    hub.seed("files/broken-tokenizer", base)
    said = told("files/broken-tokenizer", tmp_path / "store")
    assert said["plan"] == said["run"]
    assert said["plan"][0].startswith("the tokenizer of the base cannot be loaded (tokenizer.json: ")


def without_index(base: Path) -> None:
    (base / INDEX).unlink()


def with_stray(base: Path) -> None:
    (base / "extra.safetensors").write_bytes((base / SHARD).read_bytes())


@pytest.mark.parametrize("change", [without_index, with_stray])
def test_weight_files_that_no_index_names_are_read_as_in_a_folder(
    change: Callable[[Path], None], hub: HubStandIn, tmp_path: Path
) -> None:
    change(base := pico_base(tmp_path / "base"))
    hub.seed(f"files/{change.__name__}", base)
    assert (of_repo := api.inspect(f"files/{change.__name__}")) == api.inspect(base)
    assert of_repo.problems and of_repo.tensors > 50


def test_of_a_sane_repo_no_more_is_fetched_than_headers_configs_and_a_small_tokenizer(
    hub: HubStandIn, tmp_path: Path
) -> None:
    hub.seed("files/sane", pico_base(tmp_path / "base"))
    hub.reset_traffic()
    assert api.inspect("files/sane").problems == []
    assert sorted(sent(hub)) == sorted(["config.json", INDEX, "model-00001-of-00002.safetensors", SHARD])
    hub.reset_traffic()
    held = Store(backend := FolderBackend(tmp_path / "store"), cache=backend)
    recipe = parse_recipe({"base": {"repo_id": "files/sane"}, "quantize": SMALL, "benchmark": {"engine": "none"}})
    assert plan(held, recipe).problems == ()
    assert sent(hub).count("tokenizer.json") == 1
