"""The state folder of the Hub stand-in: it outlives a kill, and serves one process at a time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from pathlib import Path

import httpx
import pytest
from huggingface_hub import HfApi

from infra.dev.hub.app import create_app
from infra.dev.hub.hub import Hub
from infra.dev.hub.launch import HubStandIn
from tests.factories.hub_client import PART_SIZE, add, commit
from tests.factories.requant import wait_for


def test_acknowledged_commits_survive_sigkill(tmp_path: Path) -> None:
    with HubStandIn(tmp_path / "hub", multipart_over=PART_SIZE, part_size=PART_SIZE) as hub:
        address = hub.url
        api = HfApi(endpoint=hub.url, token=hub.token)
        api.create_repo("me/model", private=True)
        acknowledged: list[str] = []
        killed = threading.Event()

        def commit_until_killed() -> None:
            with contextlib.suppress(Exception):
                while not killed.is_set():
                    weights = add(f"{len(acknowledged)}.bin", os.urandom(PART_SIZE + 1))
                    acknowledged.append(commit(api, "me/model", weights))

        writer = threading.Thread(target=commit_until_killed)
        writer.start()
        wait_for(lambda: len(acknowledged) >= 5)
        hub.kill()
        killed.set()
        hub.start()
        writer.join()
        assert hub.url == address
        history = [each.commit_id for each in api.list_repo_commits("me/model")]
        assert set(acknowledged) <= set(history)
        snapshot = Path(api.snapshot_download("me/model", cache_dir=tmp_path / "cache"))
        for number in range(len(acknowledged)):
            assert (snapshot / f"{number}.bin").stat().st_size == PART_SIZE + 1
        commit(api, "me/model", add("after"))


def test_only_its_own_machine_gives_orders(tmp_path: Path) -> None:
    transport = httpx.ASGITransport(create_app(Hub(tmp_path)), client=("192.0.2.1", 1234))

    async def ask() -> int:
        async with httpx.AsyncClient(transport=transport, base_url="http://hub") as client:
            return (await client.get("/_standin/traffic")).status_code

    assert asyncio.run(ask()) == 403


def test_one_state_folder_serves_one_stand_in(hub: HubStandIn) -> None:
    with pytest.raises(RuntimeError, match="in use by another stand-in"):
        HubStandIn(hub.state).start()


def test_the_same_folder_is_the_same_commit_everywhere(hub: HubStandIn, folder: Path, tmp_path: Path) -> None:
    first = hub.seed("base/same", folder)
    assert hub.seed("base/same", folder, message="Again") == first
    with HubStandIn(tmp_path / "elsewhere") as elsewhere:
        assert elsewhere.seed("base/same", folder) == first


def test_a_seed_can_delete_and_can_go_to_a_branch(hub: HubStandIn, api: HfApi, folder: Path) -> None:
    first = hub.seed("base/seeds", folder)
    (folder / "config.json").unlink()
    second = hub.seed("base/seeds", folder, message="Less", revision="next", delete_missing=True)
    assert "config.json" not in api.list_repo_files("base/seeds", revision="next")
    assert ".gitattributes" in api.list_repo_files("base/seeds", revision="next")
    assert api.model_info("base/seeds").sha == first
    titles = [each.title for each in api.list_repo_commits("base/seeds", revision=second)]
    assert titles == ["Less", "Seed", "initial commit"]
