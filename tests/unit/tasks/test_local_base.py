"""A base in a folder: what is listed, hashed, remembered and copied, and which folders are refused."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from requant.tasks import local_base
from requant.tasks import plan as planning
from requant.tasks.artifact import Manifest, file_of
from requant.tasks.download import download, download_key, find_base
from requant.tasks.errors import CheckpointError, RecipeError, RequantError
from requant.tasks.hub.revision import Revision
from requant.tasks.local_base import FACT, LEFT_OUT, SETTINGS, LocalFile, find_folder
from requant.tasks.plan import plan
from requant.tasks.progress import Bar
from requant.tasks.quantize import quantize_key
from requant.tasks.recipe.base_section import Base
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.store import Store
from requant.tasks.store.store import blob_key
from requant.tasks.texts.calibration import find_calibration
from tests.factories.hub_cache import cached_repo
from tests.factories.pico import pico_base
from tests.factories.watching import is_one_sentence

HOUR_S = 3600


def settle(folder: Path) -> Path:
    """Let the files of a folder be old enough to be remembered."""
    for path in folder.rglob("*"):
        at = path.stat().st_mtime - HOUR_S
        os.utime(path, (at, at))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base whose name has a space and an accent, with what a training leaves beside it."""
    folder = pico_base(tmp_path / "my tuné")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    for leftover in ("checkpoint-5/model.safetensors", "runs/a/events", "train.yaml", "data.jsonl", ".git/config"):
        (folder / leftover).parent.mkdir(parents=True, exist_ok=True)
        (folder / leftover).write_bytes(b"of the training")
    return settle(folder)


def recipe_of(folder: Path) -> Recipe:
    return Recipe.model_validate({"base": {"folder": str(folder)}, "quantize": {"group_size": 32}})


def found(store: Store, folder: Path) -> Revision:
    return find_base(store, Base(folder=str(folder)))


class Reads:
    """The bytes of the base's files that were hashed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths: list[str] = []
        original = local_base._hash

        def count(store: Store, file: LocalFile, stop: threading.Event, bar: Bar) -> str:
            self.paths.append(file.path)
            return original(store, file, stop, bar)

        monkeypatch.setattr(local_base, "_hash", count)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


def test_a_folder_is_a_revision_of_what_it_holds_of_a_model(store: Store, folder: Path) -> None:
    base = found(store, folder)
    kept = [path for path in folder.iterdir() if path.is_file() and path.name not in {"train.yaml", "data.jsonl"}]
    manifest = Manifest.of(file_of(folder, path.name) for path in kept)
    assert {file.path: file.sha256 for file in base.files} == {file.path: file.sha256 for file in manifest.files}
    assert (base.repo_id, base.sha, base.is_local) == ("my tuné", manifest.digest[:40], True)
    made = download(store, base)
    assert made.state == "ran" and made.manifest == manifest
    assert str(folder) not in str(made.provenance.to_json())


def test_what_is_known_is_not_read_again_and_what_changed_is(store: Store, folder: Path, reads: Reads) -> None:
    first = found(store, folder)
    assert sorted(reads.paths) == [file.path for file in first.wanted]
    download(store, first)
    reads.paths.clear()
    assert found(store, folder) == first and not reads.paths
    assert download(store, found(store, folder)).state == "reused"

    config = folder / "config.json"
    config.write_text(config.read_text() + "\n")
    second = found(store, folder)
    assert reads.paths == ["config.json"] and second.sha != first.sha and second.content != first.content
    reads.paths.clear()
    found(store, folder)
    assert reads.paths == ["config.json"], "a file that was just written may change within one tick of the clock"


def test_a_file_with_the_size_and_time_of_before_is_seen_to_be_another(store: Store, folder: Path) -> None:
    shard = min(folder.glob("*.safetensors"))
    first, status = found(store, folder), shard.stat()
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert found(store, folder).sha != first.sha


def test_the_same_bytes_elsewhere_are_the_same_to_every_stage(store: Store, folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "other name"
    shutil.copytree(folder, moved)
    (here, there) = (download(store, found(store, one)) for one in (folder, moved))
    assert (there.state, there.key) == ("reused", here.key)
    calibration = find_calibration(recipe_of(folder).quantize)
    keys = {
        quantize_key(recipe, files, calibration)
        for recipe in (recipe_of(folder), Recipe(base=Base(repo_id="a/b"), quantize=recipe_of(folder).quantize))
        for files in (here.manifest, Manifest.of(file for file in here.manifest.files if file.path != "README.md"))
    }
    assert len(keys) == 1, "a commit of the Hub with these files has the same key"
    assert download_key(found(store, folder)) != download_key(Revision("a/b", found(store, folder).sha, ()))


def test_later_edits_of_the_folder_do_not_reach_the_store(store: Store, folder: Path) -> None:
    manifest = download(store, found(store, folder)).manifest
    for file in manifest.files:
        with (folder / file.path).open("r+b") as stream:
            stream.write(b"edited in place")
    for file in manifest.files:
        blob = store.cache.path(blob_key(file.sha256))
        assert file_of(blob.parent, blob.name).sha256 == file.sha256
        assert blob.stat().st_nlink == 1 and blob.stat().st_mode & 0o222 == 0


def test_a_file_that_changes_between_hash_and_copy_is_not_stored(store: Store, folder: Path) -> None:
    base = found(store, folder)
    shard = min(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[::-1])
    with pytest.raises(CheckpointError, match=rf"{shard.name} changed while it was read: wait until") as caught:
        download(store, base)
    assert is_one_sentence(str(caught.value)) and store.manifest("download", download_key(base)) is None
    assert download(store, found(store, folder)).state == "ran"


def test_a_file_that_is_gone_before_it_is_hashed_or_copied_is_told(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, listing = found(store, folder), local_base.list_folder(folder)
    gone = replace(next(file for file in listing.files if file.path == "tokenizer.json"), modified_ns=1)
    files = [file for file in listing.files if file.path != gone.path]
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer.json changed while it was read"):
        download(store, base)
    monkeypatch.setattr(local_base, "list_folder", lambda of: replace(listing, files=(gone, *files)))
    with pytest.raises(CheckpointError, match=r"tokenizer.json cannot be read \(No such file"):
        found(store, folder)


def test_a_file_that_is_written_while_it_is_read_is_found(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = min(folder.glob("*.safetensors"))
    original = LocalFile.at

    def written_meanwhile(path: str, real: Path) -> LocalFile:
        if real == shard and shard.stat().st_size == base_size:
            with shard.open("ab") as stream:
                stream.write(b"more")
        return original(path, real)

    listing = local_base.list_folder(folder)
    base_size = shard.stat().st_size
    monkeypatch.setattr(local_base, "list_folder", lambda of: listing)
    monkeypatch.setattr(LocalFile, "at", written_meanwhile)
    with pytest.raises(CheckpointError, match=rf"{shard.name} changed while it was read"):
        found(store, folder)
    assert not any(store.get_fact(FACT, file.fact) for file in listing.files if file.path == shard.name)


def link_outside(folder: Path) -> None:
    (folder.parent / "secret").write_text("secret")
    (folder / "notes.txt").symlink_to("../secret")


def linked_folder(folder: Path) -> None:
    (folder.parent / "data").mkdir()
    (folder / "data").symlink_to(folder.parent / "data")


def link_to_nothing(folder: Path) -> None:
    (folder / "notes.txt").symlink_to("none")


def link_to_itself(folder: Path) -> None:
    (folder / "notes.txt").symlink_to("notes.txt")


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe")


def two_names_of_one(folder: Path) -> None:
    (folder / "Config.json").write_text("{}")


def too_many(folder: Path) -> None:
    (folder / "many").mkdir()
    for number in range(60):
        (folder / "many" / str(number)).touch()


HOSTILE: dict[Callable[[Path], None], str] = {
    link_outside: r"notes.txt is a link that leads out of its folder, to .*/secret",
    linked_folder: r"data is a link that leads out of its folder",
    link_to_nothing: r"none, to which notes.txt leads, cannot be read \(No such file",
    link_to_itself: r"notes.txt cannot be read \(Too many levels",
    pipe: r"pipe is not a file",
    two_names_of_one: r"stands twice",
    too_many: r"more than 50 files: name the folder of one checkpoint",
}


@pytest.mark.parametrize("spoil", HOSTILE, ids=lambda spoil: spoil.__name__)
def test_a_folder_that_cannot_be_taken_is_refused_in_one_sentence(
    spoil: Callable[[Path], None], store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_base, "MAX_FILES", 50)
    spoil(folder)
    with pytest.raises(CheckpointError, match=HOSTILE[spoil]) as caught:
        found(store, folder)
    assert is_one_sentence(str(caught.value))
    (problem,) = plan(store, recipe_of(folder), elsewhere=True).problems
    assert problem == str(caught.value)


def without_weights(folder: Path) -> None:
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink()


def pickles(folder: Path) -> None:
    without_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80")


def pointers(folder: Path) -> None:
    for shard in folder.glob("*.safetensors"):
        shard.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 1000\n")


def nothing(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


NO_CHECKPOINT: dict[Callable[[Path], None], str] = {
    without_weights: "safetensors",
    pickles: "pickled weights, which Requant never opens",
    pointers: "LFS",
    nothing: "my tuné has no weights: name a checkpoint in safetensors",
}


@pytest.mark.parametrize("spoil", NO_CHECKPOINT, ids=lambda spoil: spoil.__name__)
def test_a_folder_that_is_no_checkpoint_is_a_problem_of_the_plan(
    spoil: Callable[[Path], None], store: Store, folder: Path
) -> None:
    spoil(folder)
    problems = plan(store, recipe_of(folder), elsewhere=True).problems
    assert any(NO_CHECKPOINT[spoil] in problem for problem in problems), problems
    assert all(is_one_sentence(problem) and "/requant-" not in problem for problem in problems)


@pytest.mark.parametrize("path", ["none", "file", "~nobody-of-this-name/x", "a\0b"])
def test_a_folder_that_this_machine_does_not_have_is_one_sentence(path: str, store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match="does not exist on this machine") as caught:
        find_base(store, Base(folder=path if path.startswith("~") else str(tmp_path / path)))
    assert is_one_sentence(str(caught.value).replace("\0", ""))


def test_a_snapshot_of_huggingface_hubs_cache_is_taken_with_its_links(store: Store, tmp_path: Path) -> None:
    base = pico_base(tmp_path / "base")
    snapshot = cached_repo(tmp_path / "cache", base)
    (base / "linked.txt").write_text("x")
    (snapshot / "linked.txt").symlink_to(tmp_path / "base" / "linked.txt")
    with pytest.raises(CheckpointError, match="leads out of it"):
        found(store, snapshot)
    (snapshot / "linked.txt").unlink()
    (base / "linked.txt").unlink()
    assert found(store, snapshot).sha == found(store, base).sha
    (base / "second.json").symlink_to("config.json")
    assert "second.json" in {file.path for file in found(store, base).files}, "a link may stay in its folder"


@pytest.mark.parametrize("pattern", LEFT_OUT)
def test_what_a_training_leaves_is_no_part_of_the_base(pattern: str, folder: Path) -> None:
    before = find_folder(folder)
    name = pattern.replace("*", "7")
    (folder / name).touch()
    (folder / "below" / name).mkdir(parents=True)
    (folder / "below" / name / "model.safetensors").touch()
    assert find_folder(folder) == before


def test_a_plan_of_a_large_folder_reads_headers_alone_until_a_run_has_hashed_it(
    store: Store, folder: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "MAX_HASHED_BYTES", 1000)
    document = plan(store, recipe_of(folder), elsewhere=True)
    assert not document.problems and not reads.paths
    assert document.base.sha is None and document.base.folder == str(folder)
    assert any("not all hashed yet" in note for note in document.notes)
    assert {stage.state for stage in document.stages} == {"run"}
    download(store, found(store, folder))
    after = plan(store, recipe_of(folder), elsewhere=True)
    assert after.base.sha is not None and not any("hashed" in note for note in after.notes)
    assert [stage.state for stage in after.stages if stage.name == "download"] == ["reused"]
    assert document.stages[0].bytes == sum(file.size for file in found(store, folder).wanted)
    assert document.transfer.download_bytes == 0, "nothing comes over the network"


def test_a_plan_says_what_changed_since_the_last_run_of_the_folder(store: Store, folder: Path) -> None:
    download(store, found(store, folder))
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"hidden_act": "silu"', '"hidden_act": "gelu"'))
    changes = plan(store, recipe_of(folder), elsewhere=True).changes
    assert changes is not None and changes.files.changed == ("config.json",)
    assert [field.field for field in changes.config] == ["text_config.hidden_act"]


def test_an_unreadable_file_is_named(store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "config.json")  # as for others than root
    with pytest.raises(RequantError, match=r"config.json cannot be read \(no permission\)"):
        found(store, folder)


def test_an_interrupt_ends_hashing_in_the_middle_of_files(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = "config.json", min(path.name for path in folder.glob("*.safetensors"))
    begun, ended = threading.Event(), list[str]()
    original = local_base._hash

    def interrupted(store: Store, file: LocalFile, stop: threading.Event, bar: Bar) -> str:
        if file.path == small:
            assert begun.wait(60)
            raise KeyboardInterrupt
        if file.path == large:
            begun.set()
            assert stop.wait(60)
        sha256 = original(store, file, stop, bar)
        ended.append(file.path)
        return sha256

    monkeypatch.setattr(local_base, "_hash", interrupted)
    with pytest.raises(KeyboardInterrupt):
        found(store, folder)
    assert large not in ended
    monkeypatch.undo()
    assert found(store, folder).sha, "nothing of it was remembered wrongly"
    assert {file.path: file.sha256 for file in found(store, folder).files}[large] == file_of(folder, large).sha256


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("path", ["/home/me/base", "~/models/x", "C:\\\\me\\\\base", "/data/my models/x"])
def test_a_plan_says_which_settings_name_a_path_of_the_author(path: str, name: str, store: Store, folder: Path) -> None:
    config = folder / name
    assert config.is_file()
    named = f'{{"text": {{"_name_or_path": "{path}", "hub": "owner/name", "note": "a / b/c"}},'
    config.write_text(config.read_text().replace("{", named, 1))
    notes = [note for note in plan(store, recipe_of(folder), elsewhere=True).notes if "somebody's machine" in note]
    assert len(notes) == 1 and notes[0].startswith(f"{name} names a path") and "take text._name_or_path (" in notes[0]


def test_a_store_elsewhere_gets_the_files_and_they_are_not_read_again(far: Store, folder: Path, reads: Reads) -> None:
    made = download(far, found(far, folder))
    assert all(far.backend.size(blob_key(file.sha256)) == file.size for file in made.manifest.files)
    reads.paths.clear()
    assert download(far, found(far, folder)).state == "reused" and not reads.paths


def test_a_path_of_the_machine_is_told_wherever_it_stands_in_the_settings(folder: Path) -> None:
    settings = {"a": ["/home/me/x"], "b": [{"c": "/home/me/y"}], "d": "/home/me/z", "e": 5}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    told = " ".join(local_base.private_paths(folder))
    assert all(path in told for path in ("/home/me/x", "/home/me/y", "/home/me/z"))


def test_scripts_and_notes_of_a_training_are_left_out(folder: Path) -> None:
    for name in ("train.sh", "job.env", "slurm-12.out", "rows.csv", "notes.ipynb"):
        (folder / name).write_text("TOKEN=secret")
    assert not {"train.sh", "job.env", "slurm-12.out", "rows.csv", "notes.ipynb"} & {
        file.path for file in local_base.find_folder(folder).files
    }
