"""SIGKILL in each stage, then the same command again: the same artifact, nothing done twice, nothing half visible."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
from huggingface_hub import HfApi

from infra.hub.launch import HubStandIn
from tasks.store import open_store
from tasks.store.verify import verify
from tests.factories.requant import LAYERS, Outcome, Requant, finish, wait_for

Finished = tuple[Requant, Outcome]


def kill(process: subprocess.Popen[str]) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def events(requant: Requant) -> list[dict[str, Any]]:
    files = list(requant.store.glob("work/quantize-*/events.jsonl"))
    lines = files[0].read_text().splitlines() if files else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def block_starts(requant: Requant) -> list[str]:
    return [event["name"] for event in events(requant) if event["event"] == "block"]


def children(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
        except psutil.Error:
            continue
        if "tasks.quantize_child" in command and any(part.startswith(str(folder)) for part in command):
            found.append(process)
    return found


def assert_store_is_whole(requant: Requant) -> None:
    found = verify(open_store(requant.environment["REQUANT_STORE"]), deep=True)
    assert found.checked > 0 and found.problems == []


def test_killed_while_downloading(requant: Requant, finished: Finished, hub: HubStandIn) -> None:
    shutil.rmtree(requant.store)
    hub.fault(r"/resolve/.*00001-of-00002\.safetensors", method="GET", times=1, bytes_per_second=40_000)
    process = requant.start_run(publish=None)
    facts = requant.store / "facts" / "git-blobs"  # one for each small file that is in the store
    wait_for(lambda: len([p for p in facts.glob("*") if not p.name.startswith(".")]) >= 3)
    kill(process)
    assert not list(requant.store.glob("artifacts/*/*"))
    kept = len([p for p in facts.glob("*") if not p.name.startswith(".")])
    hub.reset_traffic()
    outcome = requant.run(publish=None)
    assert outcome.status == 0, outcome.stderr
    assert outcome.digest == finished[1].digest
    fetched = [t["path"] for t in hub.traffic() if t["method"] == "GET" and "/resolve/" in t["path"]]
    whole = len(HfApi(endpoint=hub.url, token=hub.token).list_repo_files("demo/pico"))
    assert len(set(fetched)) <= whole - kept
    assert_store_is_whole(requant)


def test_killed_between_blocks_it_repeats_at_most_one(requant: Requant, finished: Finished) -> None:
    requant.forget("quantize", "mtp_fix", "validate", "measure")
    process = requant.start_run(publish=None)
    wait_for(lambda: len(block_starts(requant)) == LAYERS)  # all before the last are finished
    kill(process)
    wait_for(lambda: not children(requant.folder), 30)  # the child ends with its parent
    assert not list(requant.store.glob("artifacts/quantize/*"))
    before = block_starts(requant)
    outcome = requant.run(publish=None)
    assert outcome.status == 0, outcome.stderr
    assert outcome.digest == finished[1].digest
    assert outcome.states["download"] == "reused" and outcome.states["quantize"] == "ran"
    provenance = [json.loads(p.read_text()) for p in requant.store.glob("provenance/quantize/*")]
    starts = [block["starts"] for record in provenance for block in record["blocks"]]
    assert len(before) == LAYERS and sum(starts) <= LAYERS + 2  # the block under way, and at most one finished
    assert f"block {LAYERS} of {LAYERS}" in outcome.stderr and f"block {LAYERS + 1}" not in outcome.stderr
    assert_store_is_whole(requant)


def test_a_killed_child_is_started_again_in_the_same_run(requant: Requant, finished: Finished) -> None:
    requant.forget("quantize", "mtp_fix", "validate", "measure")
    process = requant.start_run(publish=None)
    wait_for(lambda: len(block_starts(requant)) == 2)
    for child in children(requant.folder):
        child.kill()
    outcome = finish(process)
    assert outcome.status == 0, outcome.stderr
    assert outcome.digest == finished[1].digest
    assert "SIGKILL" in outcome.stderr
    assert "Traceback" not in outcome.stderr


@pytest.mark.parametrize("stage", ["mtp_fix", "validate", "benchmark"])
def test_killed_in_a_later_stage(requant: Requant, finished: Finished, stage: str) -> None:
    later = ["mtp_fix", "validate", "benchmark"]
    requant.forget(*later[later.index(stage) :], "measure")
    changes: dict[str, Any] = {"publish": None, "benchmark": {"engine": "torch" if stage == "benchmark" else "none"}}
    process = requant.start_run(**changes)
    wait_for(lambda: list(requant.store.glob(f"work/{stage}-*")) or process.poll() is not None, pause=0.0005)
    kill(process)
    finished_before = {p.parent.name for p in requant.store.glob("artifacts/*/*")}
    assert_store_is_whole(requant)
    outcome = requant.run(**changes)
    assert outcome.status == 0, outcome.stderr
    assert outcome.digest == finished[1].digest
    for name in {"download", "quantize", "mtp_fix", "validate"} & finished_before:
        assert outcome.states[name] == "reused"
    assert_store_is_whole(requant)


STEPS = [
    (r"/api/repos/create", "POST"),
    (r"/settings", "PUT"),
    (r"/branch/", "POST"),
    (r"/info/lfs/objects/batch", "POST"),
    (r"/_lfs/", "PUT"),
    (r"/commit/requant-", "POST"),
    (r"/commit/main", "POST"),
    (r"/tag/", "POST"),
    (r"/collections/.*/items", "POST"),
    (r"/branch/", "DELETE"),
]


@pytest.mark.parametrize("released_before", [False, True], ids=["a new repo", "over an old release"])
def test_killed_at_any_step_of_publishing_main_is_old_or_new(
    released_before: bool, requant: Requant, finished: Finished, hub: HubStandIn
) -> None:
    api = HfApi(endpoint=hub.url, token=hub.token)
    repo_id = f"me/killed-{released_before}".lower()
    target = {"repo_id": repo_id, "gated": "auto", "collection": api.create_collection("Killed").slug}
    old: str | None = None
    if released_before:
        old = requant.run(publish={"repo_id": repo_id}, mtp="drop").document["published"]["commit"]
    made = finished[0].folder / "checkout"
    whole = {p.relative_to(made).as_posix() for p in made.rglob("*") if p.is_file()} | {".gitattributes"}
    for path, method in STEPS:
        hub.reset_traffic()
        # The request is carried out, its answer is held back: the kill comes in between.
        hub.fault(path, method=method, times=1, delay=4)
        process = requant.start_run(publish=target)
        wait_until_asked(hub, process, path, method)
        kill(process)
        hub.clear_faults()
        if api.repo_exists(repo_id) and api.model_info(repo_id).sha != old:
            names = set(api.list_repo_files(repo_id))
            assert names == whole or (old is None and names == {".gitattributes"})
    outcome = requant.run(publish=target)
    assert outcome.status == 0, outcome.stderr
    assert len(api.list_repo_commits(repo_id)) == 2 + released_before  # the repo's first, an old one, and ours once
    refs = api.list_repo_refs(repo_id)
    assert [b.name for b in refs.branches] == ["main"]
    assert {t.target_commit for t in refs.tags} == {outcome.document["published"]["commit"]} | ({old} if old else set())
    assert [item.item_id for item in api.get_collection(target["collection"]).items] == [repo_id]
    verified = requant("verify", repo_id, "--deep", "--json")
    assert (verified.status, verified.document["problems"]) == (0, [])


def wait_until_asked(hub: HubStandIn, process: subprocess.Popen[str], path: str, method: str) -> None:
    """Wait until the Hub has been asked for something with this path, or the run has ended."""

    def asked() -> bool:
        return any(re.search(path, entry["path"]) and entry["method"] == method for entry in hub.traffic())

    wait_for(lambda: process.poll() is not None or asked(), pause=0.05)
