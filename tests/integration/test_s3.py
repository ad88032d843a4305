"""The same on a real S3 server: same digests, no secrets anywhere, one good blob, patience."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from infra.dev.hub.launch import HubStandIn
from requant.tasks.artifact import File, Manifest, file_of
from requant.tasks.errors import CorruptBlob, StoreError, StoreUnreachable
from requant.tasks.pipeline.stage import Made, Stage, run_stage
from requant.tasks.quantizing import resume
from requant.tasks.record import StageRecord
from requant.tasks.store import Store
from requant.tasks.store.folder import FolderBackend
from requant.tasks.store.s3 import S3Backend
from requant.tasks.store.store import blob_key
from tests.factories.paths import ROOT
from tests.factories.quantizing import children
from tests.factories.requant import LAYERS, SHORT_TEXT, Outcome, Requant, wait_for

Finished = tuple[Requant, Outcome]
CEPH = str(ROOT / "infra" / "dev" / "s3" / "ceph")


@pytest.fixture
def s3(ceph: dict[str, str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> S3Backend:
    for name, value in ceph.items():
        monkeypatch.setenv(name, value)
    return S3Backend("requant", request.node.name[:40], retry_s=60)


@pytest.fixture
def store(s3: S3Backend, tmp_path: Path) -> Store:
    return Store(s3, FolderBackend(tmp_path / "near"))


@dataclass(frozen=True)
class OnS3:
    """The finished run again, into S3: begun by one machine, which was killed, and finished by another."""

    machine: Requant  # the second one
    killed: tuple[str, str]  # stdout and stderr of the first
    left: list[str]  # the artifacts that it had made
    outcome: Outcome


def read_all(variables: Mapping[str, str], *prefixes: str) -> dict[str, bytes]:
    """The objects of the store that these variables name, below some prefixes."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        backend = S3Backend("requant", "store")
        return {key: backend.read(key) or b"" for prefix in prefixes for key in backend.keys(prefix)}


@pytest.fixture(scope="module")
def on_s3(tmp_path_factory: pytest.TempPathFactory, finished: Finished, ceph: dict[str, str], hub: HubStandIn) -> OnS3:
    """Both machines have a Hub token of their own. The first is killed when the store has a block of its work."""
    folder = tmp_path_factory.mktemp("on-s3")
    hub.add_token("hf_marker_of_this_test", "me")
    recipe = {**finished[0].recipe, "publish": {"repo_id": "me/from-s3"}, "validation": {"text": SHORT_TEXT}}
    machines = []
    for name in ("one", "two"):
        (folder / name).mkdir()
        here = {"HF_TOKEN": "hf_marker_of_this_test", "XDG_CACHE_HOME": str(folder / name / "cache")}
        machines.append(Requant(folder / name, {**finished[0].environment, **ceph, **here}, recipe))
    process = machines[0].fork_run()
    work = folder / "one" / "cache" / "requant" / "near" / "work"
    (child,) = wait_for(lambda: children(folder / "one"), process=process)
    wait_for(lambda: any(map(resume.count_finished, work.glob("quantize-*"))), process=process)
    child.suspend()  # it gets no further
    wait_for(lambda: has_block(list(read_all(ceph, "resume/quantize"))), process=process)
    process.kill()
    child.kill()
    killed = process.communicate()
    assert process.returncode == -signal.SIGKILL
    left = list(read_all(ceph, "artifacts"))
    return OnS3(machines[1], killed, left, machines[1].run("--checkout", str(folder / "two" / "checkout")))


def has_block(keys: list[str]) -> bool:
    """Whether unfinished work has the files of a block, and what says that they are whole."""
    return any("block-00000" in key and "/files/" in key for key in keys) and any(k.endswith("/index") for k in keys)


def test_the_same_recipe_gives_the_same_digest_on_s3(on_s3: OnS3, finished: Finished) -> None:
    assert on_s3.outcome.status == 0, on_s3.outcome.stderr
    assert on_s3.outcome.digest == finished[1].digest


def test_another_machine_goes_on_from_the_blocks_that_a_killed_one_had_finished(
    on_s3: OnS3, ceph: dict[str, str]
) -> None:
    """The unfinished work is in the store: the second machine has only that, and takes over the dead one's lease."""
    assert not [key for key in on_s3.left if key.startswith("artifacts/quantize")]
    assert "that another machine finished" in on_s3.outcome.stderr
    assert {name for name, state in on_s3.outcome.states.items() if state == "reused"} == {
        key.split("/")[1] for key in on_s3.left
    }
    assert not read_all(ceph, "resume")
    (record,) = [json.loads(text) for text in read_all(ceph, "provenance/quantize").values()]
    assert len(record["blocks"]) < LAYERS  # those that the first machine finished were not tuned again


def test_another_machine_reuses_what_is_in_s3(on_s3: OnS3, tmp_path: Path) -> None:
    elsewhere = on_s3.machine.variant(XDG_CACHE_HOME=str(tmp_path / "cache"))
    outcome = elsewhere.run()
    assert outcome.status == 0, outcome.stderr
    assert outcome.digest == on_s3.outcome.digest
    assert set(outcome.states.values()) == {"reused"}
    assert outcome.document["artifact"]["path"] is None


def test_no_secret_is_in_any_log_state_manifest_card_or_report(
    on_s3: OnS3, ceph: dict[str, str], hub: HubStandIn, prefect_home: Path
) -> None:
    markers = ["hf_marker_of_this_test", ceph["AWS_SECRET_ACCESS_KEY"], ceph["AWS_ACCESS_KEY_ID"]]
    said = (*on_s3.killed, on_s3.outcome.stdout, on_s3.outcome.stderr)
    texts = {f"output {number}": text.encode() for number, text in enumerate(said)}
    for folder in (on_s3.machine.folder.parent, prefect_home, hub.state / "repos"):
        texts |= {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    texts |= read_all(ceph, "artifacts", "provenance")
    assert len(texts) > 40
    for where, text in texts.items():
        for marker in markers:
            assert marker.encode() not in text, where


@pytest.mark.slow
def test_an_undisturbed_run_into_s3_makes_every_stage_itself(
    finished: Finished, ceph: dict[str, str], tmp_path: Path
) -> None:
    variables = {**ceph, "REQUANT_STORE": "s3://requant/undisturbed", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    requant = Requant(tmp_path, {**finished[0].environment, **variables}, finished[0].recipe)
    outcome = requant.run(publish={"repo_id": "me/undisturbed-from-s3"})
    assert outcome.status == 0, outcome.stderr
    assert outcome.digest == finished[1].digest
    assert set(outcome.states.values()) == {"ran"}


def test_sixteen_writers_of_one_blob_leave_one_good_blob(store: Store, tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    paths = [tmp_path / f"copy{i}" for i in range(16)]
    for path in paths:
        path.write_bytes(data)
    file = File("blob", len(data), hashlib.sha256(data).hexdigest())
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda path: store.put_blob(path, file), paths))
    assert list(store.backend.keys("blobs")) == [blob_key(file.sha256)]
    assert store.backend.read(blob_key(file.sha256)) == data


def test_of_sixteen_manifests_for_one_key_the_first_wins(store: Store) -> None:
    manifests = [Manifest.of([File(f"{i}", 0, hashlib.sha256(b"").hexdigest())]) for i in range(16)]
    empty = store.cache.root / "empty"
    empty.parent.mkdir(parents=True, exist_ok=True)
    empty.write_bytes(b"")
    store.put_blob(empty, File("empty", 0, hashlib.sha256(b"").hexdigest()))
    with ThreadPoolExecutor(16) as pool:
        kept = list(pool.map(lambda manifest: store.commit("stage", "key", manifest, StageRecord()).digest, manifests))
    assert len(set(kept)) == 1
    found = store.manifest("stage", "key")
    assert found is not None and found.digest == kept[0]


def test_a_blob_altered_in_s3_is_refused(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"right")
    file = file_of(tmp_path, "file")
    store.put_blob(tmp_path / "file", file)
    store.backend.write(blob_key(file.sha256), b"wrong")
    other = Store(store.backend, FolderBackend(tmp_path / "elsewhere"))
    with pytest.raises(CorruptBlob, match="does not have the sha256"):
        other.link_files(Manifest.of([file]), tmp_path / "out")
    assert not list((tmp_path / "elsewhere").rglob("blobs/*/*/*"))


def test_two_machines_do_one_stage_once(s3: S3Backend, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made: list[Path] = []
    caplog.set_level(logging.INFO, "requant")

    def work(folder: Path) -> Made:
        made.append(folder)
        wait_for(lambda: "waiting for process" in caplog.text)  # the other machine waits for this one
        (folder / "result").write_text("done")
        file = file_of(folder, "result")
        Store(s3, FolderBackend(tmp_path / "any")).put_blob(folder / "result", file)
        return Made(Manifest.of([file]))

    stores = [Store(s3, FolderBackend(tmp_path / f"machine{i}")) for i in range(2)]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda store: run_stage(store, Stage("stage", 1), "key", work), stores))
    assert len(made) == 1
    assert sorted(r.state for r in results) == ["ran", "reused"]
    assert not list(s3.keys("leases"))


def test_wrong_credentials_are_one_sentence_at_once(s3: S3Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StoreError, match="refuses these credentials") as caught:
        s3.check()
    assert not caught.value.retryable


def test_a_missing_bucket_is_one_sentence_at_once(s3: S3Backend) -> None:
    with pytest.raises(StoreError, match="bucket 'nowhere' does not exist"):
        S3Backend("nowhere").check()


def test_a_store_lost_in_the_middle_is_waited_for(
    ceph: dict[str, str], s3: S3Backend, caplog: pytest.LogCaptureFixture
) -> None:
    """It comes back once somebody has asked for it in vain."""
    s3.write("before", b"1")

    def ceph_is(state: str) -> None:
        subprocess.run([CEPH, state, ceph["CEPH_FOLDER"]], check=True, capture_output=True)

    def bring_back() -> None:
        wait_for(lambda: "trying again" in caplog.text)
        ceph_is("up")

    back = threading.Thread(target=bring_back)
    try:
        ceph_is("down")
        back.start()
        s3.write("after", b"2")  # begins while the server is gone
    finally:
        if back.ident is not None:
            back.join()
        ceph_is("up")  # for the other tests, whatever has happened
    assert (s3.read("before"), s3.read("after")) == (b"1", b"2")


def test_a_store_that_stays_lost_is_given_up_after_its_patience(s3: S3Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is the test's own, and moves by the pauses between the tries."""
    pauses: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: sum(pauses), sleep=pauses.append)
    monkeypatch.setattr("requant.tasks.store.s3.time", clock)
    monkeypatch.setattr("botocore.endpoint.time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    lost = S3Backend("requant")
    with pytest.raises(StoreUnreachable, match="cannot be reached"):
        lost.read("anything")
    assert lost.retry_s >= 120
    assert lost.retry_s - 25 < sum(pauses) <= lost.retry_s + 5  # the last pause of 20 s would have been too long
    assert 8 <= len(pauses) <= 15
