"""A Hub stand-in with small limits, and the real `huggingface_hub` client of several users."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants

from infra.dev.hub.launch import HubStandIn
from tests.factories.hub_client import PART_SIZE, WEIGHTS


@pytest.fixture(autouse=True)
def client_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set what the client reads from the environment when it is imported."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture(scope="session")
def running_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubStandIn]:
    state = tmp_path_factory.mktemp("hub")
    with HubStandIn(
        state,
        tokens={"hf_other": "other"},
        multipart_over=2 * PART_SIZE,
        part_size=PART_SIZE,
        tree_page=5,
    ) as hub:
        yield hub


@pytest.fixture
def hub(running_hub: HubStandIn) -> HubStandIn:
    running_hub.clear_faults()
    running_hub.reset_traffic()
    return running_hub


@pytest.fixture
def api(hub: HubStandIn) -> HfApi:
    return HfApi(endpoint=hub.url, token=hub.token)


@pytest.fixture
def anonymous(hub: HubStandIn) -> HfApi:
    return HfApi(endpoint=hub.url, token=False)


@pytest.fixture
def other(hub: HubStandIn) -> HfApi:
    return HfApi(endpoint=hub.url, token="hf_other")


@pytest.fixture
def repo(api: HfApi, request: pytest.FixtureRequest) -> str:
    """Create an empty repository for one test."""
    digest = hashlib.sha1(request.node.name.encode()).hexdigest()
    return api.create_repo(f"me/{digest}").repo_id


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a small checkpoint."""
    folder = tmp_path / "checkpoint"
    (folder / "sub").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "sub" / "empty.bin").touch()
    return folder
