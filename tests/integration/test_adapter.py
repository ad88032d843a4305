"""A LoRA adapter, from its repo and a base on the Hub to a published model of both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard

from infra.dev.hub.launch import HubStandIn
from tests.factories.adapters import lora_tensors, write_adapter
from tests.factories.requant import Requant, recipe_for

TARGET, ADAPTER = "me/merged", "demo/pico-lora"
MODULES = ("model.language_model.layers.2.self_attn.q_proj", "model.language_model.layers.0.mlp.down_proj")


@pytest.fixture
def adapter(base: Path, hub: HubStandIn, tmp_path: Path) -> Path:
    """An adapter of the base of the finished run, in a repo."""
    folder = write_adapter(tmp_path / "adapter", lora_tensors(base, MODULES))
    hub.seed(ADAPTER, folder)
    return folder


def test_an_adapter_is_planned_merged_quantized_and_published(
    requant: Requant, adapter: Path, hub: HubStandIn, tmp_path: Path
) -> None:
    requant.recipe = {**recipe_for("demo/pico", TARGET), "adapter": ADAPTER}
    planned = requant("plan", str(requant.write_recipe()), "--json")
    assert planned.status == 0, planned.stderr
    states = {stage["name"]: stage["state"] for stage in planned.document["stages"]}
    assert (states["download"], states["merge"], states["quantize"]) == ("reused", "run", "run")

    first = requant.run()
    assert first.status == 0, first.stderr
    assert first.states["download"] == "reused" and first.states["merge"] == first.states["quantize"] == "ran"
    assert all(gate["passed"] is not False for gate in first.document["gates"])
    api = HfApi(endpoint=hub.url, token=hub.token)
    published = Path(api.snapshot_download(TARGET, local_dir=tmp_path / "published"))
    commit = api.model_info(ADAPTER).sha
    assert first.document["base"]["adapter"] == f"{ADAPTER}@{commit}"
    release = json.loads((published / "requant.json").read_text())
    assert release["adapter"] == {"repo_id": ADAPTER, "sha": commit} == release["provenance"]["merge"]["adapter"]
    card = ModelCard.load(published / "README.md")
    assert (card.data.base_model, card.data.base_model_relation) == (ADAPTER, "quantized")
    assert f"merged with the LoRA adapter [{ADAPTER}]" in card.text and str(commit) in card.text
    recipe = yaml.safe_load((published / "recipe.yaml").read_text())
    assert recipe["adapter"] == {"repo_id": ADAPTER, "revision": commit}
    assert requant("verify", TARGET, "--deep").status == 0

    again = requant.run()
    assert {*again.states.values()} == {"reused"} and again.digest == first.digest
