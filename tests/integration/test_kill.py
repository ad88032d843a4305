"""SIGKILL in each stage, then the same command again: the same artifact, nothing done twice, nothing half visible.

Most tests kill a fork; the kill at `/commit/main` uses a new process, because there a release becomes visible, and that
nothing is lost then must not rest on a fork's dying as a new process does.
"""

from __future__ import annotations

import itertools
import json
import pickle
import re
import signal
import subprocess
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from huggingface_hub import HfApi

from infra.dev.hub.launch import HubStandIn
from requant.tasks.artifact import RELEASE_FILES, Manifest, file_of
from requant.tasks.hub.revision import Revision
from requant.tasks.recipe.loader import load_recipe
from requant.tasks.store import open_store
from requant.tasks.store.verify import verify_store
from tests.factories.forked import forked
from tests.factories.forks import Fork
from tests.factories.quantizing import block_starts, children
from tests.factories.releases import made
from tests.factories.requant import LAYERS, SHORT_TEXT, Outcome, Requant, finish, merge, wait_for

Finished = tuple[Requant, Outcome]
Process = subprocess.Popen[str] | Fork


def kill(process: Process) -> None:
    """Kill a process that is still at its work."""
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def assert_store_is_whole(requant: Requant) -> None:
    found = verify_store(open_store(requant.environment["REQUANT_STORE"]), deep=True)
    assert found.checked > 0 and found.problems == []


def test_killed_while_downloading(requant: Requant, finished: Finished, hub: HubStandIn) -> None:
    requant.forget_base()
    shard = r"/resolve/.*00001-of-00002\.safetensors"
    hub.fault(shard, method="GET", times=None, hold_after_bytes=20_000)  # more than its header, which is read before
    process = requant.fork_run(publish=None)
    facts = requant.store / "facts" / "git-blobs"  # one for each small file that is in the store
    wait_for(lambda: len([p for p in facts.glob("*") if not p.name.startswith(".")]) >= 3, process=process)
    kill(process)
    hub.clear_faults()
    assert not list(requant.store.glob("artifacts/download/*"))
    kept = len([p for p in facts.glob("*") if not p.name.startswith(".")])
    hub.reset_traffic()
    outcome = requant.run(publish=None)
    assert outcome.status == 0, outcome.stderr
    assert outcome.digest == finished[1].digest and outcome.states["download"] == "ran"
    fetched = [t["path"] for t in hub.traffic() if t["method"] == "GET" and "/resolve/" in t["path"]]
    whole = len(HfApi(endpoint=hub.url, token=hub.token).list_repo_files("demo/pico"))
    assert len(set(fetched)) <= whole - kept
    assert_store_is_whole(requant)


@pytest.mark.parametrize(
    "killed",
    [
        pytest.param(("child", "run"), id="the child, then the run"),
        pytest.param(("child",), id="the child", marks=pytest.mark.slow),
        pytest.param(("run",), id="the run", marks=pytest.mark.slow),
    ],
)
def test_killed_between_blocks_it_goes_on_and_repeats_at_most_one(
    killed: tuple[str, ...], requant: Requant, finished: Finished
) -> None:
    requant.forget("quantize", "mtp_fix", "validate", "measure")
    requant.recipe = merge(requant.recipe, {"validation": {"text": SHORT_TEXT}})
    process = requant.fork_run(publish=None)
    (child,) = wait_for(lambda: children(requant.folder), process=process)
    if "child" in killed:  # it is started again in the same run
        wait_for(lambda: len(block_starts(requant.store)) >= 2, process=process)
        child.kill()
    before: list[str] = []
    if "run" in killed:
        if "child" in killed:
            killed_child = child
            (child,) = wait_for(lambda: [c for c in children(requant.folder) if c != killed_child], process=process)
        # All before the last are finished. The child gets no further until the run has been killed.
        wait_for(lambda: len(set(block_starts(requant.store))) == LAYERS, process=process)
        child.suspend()
        process.kill()
        first = finish(process)
        assert first.status == -signal.SIGKILL and not list(requant.store.glob("artifacts/quantize/*"))
        child.resume()
        wait_for(lambda: not children(requant.folder))  # the child ends with its parent
        before = block_starts(requant.store)
        assert len(before) <= LAYERS + 2 * ("child" in killed)
        outcome = requant.run(publish=None)
        assert f"block {LAYERS} of {LAYERS}" in outcome.stderr and f"block {LAYERS + 1}" not in outcome.stderr
    else:
        first = outcome = finish(process)
    if "child" in killed:
        assert "SIGKILL" in first.stderr and "Traceback" not in first.stderr
    assert outcome.status == 0, outcome.stderr
    assert outcome.digest == finished[1].digest
    assert outcome.states["download"] == "reused" and outcome.states["quantize"] == "ran"
    provenance = [json.loads(p.read_text()) for p in requant.store.glob("provenance/quantize/*")]
    starts = sum(block["starts"] for record in provenance for block in record["blocks"])
    # After each kill: the block under way again, and at most one finished.
    assert starts <= LAYERS + 2 * len(killed) and starts - len(before) <= (2 if before else LAYERS + 2)
    assert_store_is_whole(requant)


@pytest.mark.parametrize(
    "stage",
    [
        pytest.param("mtp_fix", marks=pytest.mark.slow),
        "validate",
        pytest.param("benchmark", marks=pytest.mark.slow),
    ],
)
def test_killed_in_a_later_stage(requant: Requant, finished: Finished, stage: str) -> None:
    later = ["mtp_fix", "validate", "benchmark"]
    requant.forget(*later[later.index(stage) :], "measure")
    if stage != "benchmark":  # which reuses what the finished run measured
        requant.recipe = merge(requant.recipe, {"validation": {"text": SHORT_TEXT}})
    changes: dict[str, Any] = {"publish": None, "benchmark": {"engine": "torch" if stage == "benchmark" else "none"}}
    process = requant.fork_run(**changes)
    begun = (f"work/{stage}-*", f"artifacts/{stage}/*")  # others come after it
    wait_for(lambda: any(list(requant.store.glob(sign)) for sign in begun), pause=0.0005, process=process)
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
WAITING = {"hold_request": True}  # killed before the Hub has done anything
UNANSWERED = {"hold_after_bytes": 0}  # killed when it is done, and the client does not know
LATE = {"delay": 4}  # killed before; the Hub goes on with it afterwards
PUBLISH = """
import pickle, sys
from requant.tasks.publish import publish
from requant.tasks.store import open_store
publish(open_store(), *pickle.load(open(sys.argv[1], "rb")))
"""


def publishing(requant: Requant, finished: Finished, target: dict[str, Any]) -> Callable[[], Process]:
    """Fork the stage alone, as often as it is called, with what the finished run published."""
    folder = finished[0].folder / "checkout"
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    beside = {name: (folder / name).read_bytes() for name in names if name.startswith((*RELEASE_FILES, "pictures/"))}
    artifact = Manifest.of(file_of(folder, name) for name in names if name not in beside)
    assert artifact.digest == finished[1].digest
    base = Revision("demo/pico", finished[1].document["base"]["sha"], ())
    arguments = requant.folder / "arguments"
    arguments.write_bytes(pickle.dumps((load_recipe(requant.write_recipe(publish=target)), base, artifact, beside)))
    return lambda: forked(["-c", PUBLISH, str(arguments)], requant.environment)


@pytest.mark.parametrize(
    ("what", "released_before", "faults"),
    [
        pytest.param("stage", True, [WAITING, UNANSWERED], id="the stage, over an old release"),
        pytest.param("stage", True, [LATE], id="the stage, requests carried out late", marks=pytest.mark.slow),
        pytest.param("run", True, [WAITING, UNANSWERED], id="a run, over an old release", marks=pytest.mark.slow),
        pytest.param("run", False, [WAITING, UNANSWERED], id="a run, a new repo", marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_step_of_publishing_main_is_old_or_new(
    what: str,
    released_before: bool,
    faults: list[dict[str, Any]],
    requant: Requant,
    finished: Finished,
    hub: HubStandIn,
    hub_here: None,
) -> None:
    api = HfApi(endpoint=hub.url, token=hub.token)
    repo_id = f"me/killed-{what}-{released_before}-{len(faults)}".lower()
    target = {"repo_id": repo_id, "gated": "auto", "collection": api.create_collection("Killed").slug}
    old = made(requant.folder / "old", 1).publish(repo_id=repo_id).commit if released_before else None
    checkout = finished[0].folder / "checkout"
    whole = {p.relative_to(checkout).as_posix() for p in checkout.rglob("*") if p.is_file()} | {".gitattributes"}
    start = publishing(requant, finished, target) if what == "stage" else lambda: requant.fork_run(publish=target)
    for (path, method), fault in itertools.product(STEPS, faults):
        hub.reset_traffic()
        hub.fault(path, method=method, times=1, **fault)
        new_process = path == "/commit/main" and fault != WAITING
        process = requant.start_run(publish=target) if new_process else start()
        reached = partial(is_reached, hub, path, method, done=fault == UNANSWERED)
        wait_for(reached, what=f"{method} {path}", process=process)
        kill(process)
        if api.repo_exists(repo_id) and api.model_info(repo_id).sha != old:
            names = set(api.list_repo_files(repo_id))
            assert names == whole or (old is None and names == {".gitattributes"})
        if (path, fault) == ("/commit/main", UNANSWERED):
            assert set(api.list_repo_files(repo_id)) == whole
    hub.clear_faults()
    outcome = requant.run(publish=target)
    assert outcome.status == 0, outcome.stderr
    assert len(api.list_repo_commits(repo_id)) == 2 + released_before  # the repo's first, an old one, and ours once
    refs = api.list_repo_refs(repo_id)
    assert [b.name for b in refs.branches] == ["main"]
    assert {t.target_commit for t in refs.tags} == {outcome.document["published"]["commit"]} | ({old} if old else set())
    assert [item.item_id for item in api.get_collection(target["collection"]).items] == [repo_id]
    verified = requant("verify", repo_id, "--deep", "--json")
    assert (verified.status, verified.document["problems"]) == (0, [])


def is_reached(hub: HubStandIn, path: str, method: str, *, done: bool) -> bool:
    """Whether the Hub has been asked for something with this path and, if so wanted, has done it."""
    asked = [entry for entry in hub.traffic() if re.search(path, entry["path"]) and entry["method"] == method]
    return bool(asked) and (not done or asked[0]["status"] != 0)
