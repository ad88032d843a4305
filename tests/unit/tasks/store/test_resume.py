"""Unfinished work in the store: another machine carries on, and an artifact leaves nothing of it behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from requant.tasks.artifact import sha256_of
from requant.tasks.quantizing import resume
from requant.tasks.store.folder import FolderBackend
from requant.tasks.store.resume import Index, delete_resume, download_resume, resume_uploads, upload_resume
from requant.tasks.store.store import Store
from tests.factories.stores import Remote, ago


@pytest.fixture
def remote(tmp_path: Path) -> Remote:
    return Remote(tmp_path / "remote")


def machine(remote: Remote, folder: Path) -> Store:
    return Store(remote, cache=FolderBackend(folder))


def finish_block(folder: Path, number: int) -> None:
    """What the child leaves after its `number`-th block (from 0), in the order in which it writes."""
    shard = folder / "out" / "base-w4g128" / f"model-shard-{number + 1:05d}.safetensors"
    group = folder / "resume" / "group_0"
    for path in (shard, resume.block_file(group, number)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([number]) * 100)
    done = [f"layers.{i}" for i in range(number + 1)]
    (group / resume.MANIFEST).write_text(json.dumps({"signature": "s", "completed_blocks": done}))


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_another_machine_goes_on_from_the_finished_blocks(remote: Remote, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    with resume_uploads(machine(remote, tmp_path / "a"), "quantize", "k", one, resume.portable_files):
        for number in range(3):
            finish_block(one, number)
        (one / "ladder.json").write_text('{"rung": 2}')
    assert download_resume(machine(remote, tmp_path / "b"), "quantize", "k", two, resume.worth_fetching) == 8
    assert files(two) == files(one) and resume.count_finished(two) == 3


def test_files_are_copied_while_the_work_goes_on_and_once_only(remote: Remote, tmp_path: Path) -> None:
    folder, sent = tmp_path / "work", Index()
    store = machine(remote, tmp_path / "near")
    finish_block(folder, 0)
    upload_resume(store, "quantize", "k", folder, resume.portable_files(folder), sent)
    ago(remote.root, 1)
    first = {key: remote.path(key).stat().st_mtime_ns for key in remote.keys("resume")}
    finish_block(folder, 1)
    upload_resume(store, "quantize", "k", folder, resume.portable_files(folder), sent)
    again = {key for key, at in first.items() if remote.path(key).stat().st_mtime_ns != at}
    assert {key.rsplit("/", 1)[1] for key in again} <= {"index", resume.MANIFEST, "block-00000.safetensors",
                                                        "model-shard-00001.safetensors"}  # fmt: skip
    assert not {key for key in again if key.endswith("00000.safetensors") or key.endswith("00001.safetensors")}


def altered(remote: Remote, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """The next `times` block files that are fetched come with other bytes of the same number."""
    get_file, left = remote.get_file, [times]

    def get(key: str, path: Path) -> str:
        found = get_file(key, path)
        if "block-" in key and left[0]:
            left[0] -= 1
            path.write_bytes(b"?" * path.stat().st_size)
            return sha256_of(path)
        return found

    monkeypatch.setattr(remote, "get_file", get)


def test_a_block_that_arrives_altered_is_fetched_again_and_else_done_again(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, three = tmp_path / "one", tmp_path / "two", tmp_path / "three"
    finish_block(one, 0)
    upload_resume(machine(remote, tmp_path / "a"), "quantize", "k", one, resume.portable_files(one), {})
    altered(remote, monkeypatch, 1)
    assert download_resume(machine(remote, tmp_path / "b"), "quantize", "k", two, resume.worth_fetching) == 3
    assert files(two) == files(one)
    altered(remote, monkeypatch, 2)
    assert download_resume(machine(remote, tmp_path / "c"), "quantize", "k", three, resume.worth_fetching) == 0
    assert resume.count_finished(three) == 0 and not any(b"?" in data for data in files(three).values())


@pytest.mark.parametrize("index", [b'{"a": 5}', b"[" * 100_000, b'{"a": [1e999, ""]}', b"[]", b"\xff"])
def test_an_index_that_nobody_of_ours_wrote_is_passed_over(remote: Remote, tmp_path: Path, index: bytes) -> None:
    remote.write("resume/quantize/k/index", index)
    assert download_resume(machine(remote, tmp_path / "b"), "quantize", "k", tmp_path / "w", resume.worth_fetching) == 0


def test_a_shard_that_is_still_being_written_does_not_count(tmp_path: Path) -> None:
    finish_block(tmp_path, 0)
    ago(tmp_path, 1)
    (tmp_path / "out" / "base-w4g128" / "model-shard-00002.safetensors").write_bytes(b"half")
    assert not [path for path in resume.portable_files(tmp_path) if "shard-00002" in path]


def test_a_machine_that_is_further_keeps_what_it_has(remote: Remote, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    finish_block(one, 0)
    upload_resume(machine(remote, tmp_path / "a"), "quantize", "k", one, resume.portable_files(one), {})
    for number in range(2):
        finish_block(two, number)
    before = files(two)
    assert download_resume(machine(remote, tmp_path / "b"), "quantize", "k", two, resume.worth_fetching) == 0
    assert files(two) == before


def test_the_state_is_swept_once_the_artifact_is_there(remote: Remote, tmp_path: Path) -> None:
    folder, store = tmp_path / "work", machine(remote, tmp_path / "near")
    finish_block(folder, 0)
    upload_resume(store, "quantize", "k", folder, resume.portable_files(folder), {})
    upload_resume(store, "quantize", "other", folder, resume.portable_files(folder), {})
    delete_resume(store, "quantize", "k")
    assert not list(remote.keys("resume/quantize/k")) and list(remote.keys("resume/quantize/other"))


def test_a_store_that_fails_does_not_stop_the_work(remote: Remote, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    finish_block(folder, 0)
    remote.root.write_text("not a folder")
    with resume_uploads(machine(remote, tmp_path / "near"), "quantize", "k", folder, resume.portable_files):
        pass


def manifest(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "resume" / "group_0" / resume.MANIFEST).read_text())
    return found


def test_of_a_manifest_the_blocks_before_the_first_missing_file_are_kept(tmp_path: Path) -> None:
    for number in range(3):
        finish_block(tmp_path, number)
    whole = manifest(tmp_path)
    resume.drop_unusable_blocks(tmp_path / "resume")
    assert manifest(tmp_path) == whole and resume.count_finished(tmp_path) == 3
    resume.block_file(tmp_path / "resume" / "group_0", 1).unlink()
    assert resume.count_finished(tmp_path) == 1
    resume.drop_unusable_blocks(tmp_path / "resume")
    assert manifest(tmp_path) == {"signature": "s", "completed_blocks": ["layers.0"]}
    resume.block_file(tmp_path / "resume" / "group_0", 0).unlink()
    resume.drop_unusable_blocks(tmp_path / "resume")
    assert resume.count_finished(tmp_path) == 0 and not list((tmp_path / "resume").rglob(resume.MANIFEST))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"completed_blocks": 5}', '{"completed_blocks": ["layers.0"]', "[" * 100_000]
)
def test_a_manifest_that_cannot_be_read_is_forgotten(tmp_path: Path, text: str) -> None:
    finish_block(tmp_path, 0)
    (tmp_path / "resume" / "group_0" / resume.MANIFEST).write_text(text)
    resume.drop_unusable_blocks(tmp_path / "resume")
    assert resume.count_finished(tmp_path) == 0 and not list((tmp_path / "resume").rglob(resume.MANIFEST))


def test_killed_between_the_manifest_and_the_index_the_blocks_before_it_are_gone_on_from(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, sent = tmp_path / "one", tmp_path / "two", Index()
    store = machine(remote, tmp_path / "a")
    finish_block(one, 0)
    upload_resume(store, "quantize", "k", one, resume.portable_files(one), sent)
    finish_block(one, 1)
    write = remote.write

    def killed(key: str, data: bytes) -> None:
        if key.endswith("/index"):
            raise KeyboardInterrupt
        write(key, data)

    monkeypatch.setattr(remote, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        upload_resume(store, "quantize", "k", one, resume.portable_files(one), sent)
    assert download_resume(machine(remote, tmp_path / "b"), "quantize", "k", two, resume.worth_fetching) == 3
    assert resume.count_finished(two) == 1
    resume.drop_unusable_blocks(two / "resume")
    assert manifest(two)["completed_blocks"] == ["layers.0"]


def test_a_block_that_ends_while_the_others_are_sent_is_not_missed_by_the_next_machine(
    remote: Remote, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    finish_block(one, 0)
    paths = resume.portable_files(one)
    finish_block(one, 1)
    upload_resume(machine(remote, tmp_path / "a"), "quantize", "k", one, paths, {})
    assert download_resume(machine(remote, tmp_path / "b"), "quantize", "k", two, resume.worth_fetching) == 3
    resume.drop_unusable_blocks(two / "resume")
    assert manifest(two)["completed_blocks"] == ["layers.0"] and resume.count_finished(two) == 1
