"""Checkouts into a user's folder: nothing is lost that Requant did not lay there, and nothing stale stays."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from requant.flows.checkout import check_folder, copy_to_folder
from requant.flows.cli.main import main
from requant.flows.cli.run import lay_out_result
from requant.flows.report.report import RunReport
from requant.tasks.artifact import Manifest
from requant.tasks.errors import FolderInUse
from requant.tasks.recipe.loader import parse_recipe
from requant.tasks.record import StageRecord
from requant.tasks.store import Store, open_store
from tests.factories.checkpoints import write_files

ONE = {"config.json": b"{}", "model-00001-of-00002.safetensors": b"one", "model-00002-of-00002.safetensors": b"two"}
OTHER = {"config.json": b'{"a": 1}', "model-00001-of-00001.safetensors": b"other", "sub/picture.png": b"png"}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("REQUANT_STORE", (tmp_path / "store").as_uri())
    opened = open_store()
    opened.check()
    return opened


def kept(store: Store, files: Mapping[str, bytes], key: str = "a") -> Manifest:
    scratch = store.cache.root.parent / "scratch"
    made = write_files(scratch, files)
    for file in made:
        store.put_blob(scratch / file.path, file)
    return store.commit("quantize", key * 64, Manifest.of(made), StageRecord())


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(store: Store, folder: Path) -> str:
    before = contents(folder)
    with pytest.raises(FolderInUse) as caught:
        check_folder(store, folder)
    assert contents(folder) == before
    return str(caught.value)


def ended(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[object, str]:
    """The exit status of `requant`, and what it said."""
    monkeypatch.setattr(sys, "argv", ["requant", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code, capsys.readouterr().err


def test_a_folder_that_holds_a_users_file_is_refused_and_left_as_it_was(store: Store, tmp_path: Path) -> None:
    manifest, folder = kept(store, ONE), tmp_path / "friend"
    folder.mkdir()
    (folder / "config.json").write_text("mine")
    with pytest.raises(FolderInUse, match=r"config\.json in it was not laid there by Requant.*--force"):
        copy_to_folder(store, manifest, folder)
    assert contents(folder) == {"config.json": b"mine"}


def test_with_force_the_same_names_are_replaced_and_everything_else_stays(store: Store, tmp_path: Path) -> None:
    manifest, folder = kept(store, ONE), tmp_path / "friend"
    theirs = {"config.json": b"mine", "notes.md": b"notes", "model-restored-00001.safetensors": b"head"}
    write_files(folder, theirs)
    _, foreign = copy_to_folder(store, manifest, folder, force=True)
    assert contents(folder) == {**theirs, **ONE}
    assert foreign == ["model-restored-00001.safetensors"], "and the weights that a loader may read too are named"


def test_a_rejected_run_with_force_deletes_no_file_of_the_users_own(store: Store, tmp_path: Path) -> None:
    folder, recipe = tmp_path / "friend", parse_recipe({"base": {"repo_id": "me/base"}})
    theirs = dict.fromkeys(("README.md", "recipe.yaml", "report.md", "pictures/losses.png"), b"mine")
    write_files(folder, theirs)
    lay_out_result(RunReport(recipe, status="rejected", artifact=kept(store, ONE)), folder, force=True)
    assert contents(folder) == {**theirs, **ONE}, "no card takes the place of the user's"


def test_a_rejected_run_removes_the_card_that_an_earlier_run_laid_there(store: Store, tmp_path: Path) -> None:
    folder, recipe = tmp_path / "out", parse_recipe({"base": {"repo_id": "me/base"}})
    made = kept(store, ONE)
    lay_out_result(
        RunReport(recipe, status="validated", artifact=made, beside={"README.md": b"card"}), folder, force=False
    )
    assert (folder / "README.md").read_bytes() == b"card"
    (folder / "notes.md").write_text("mine")
    lay_out_result(RunReport(recipe, status="rejected", artifact=made), folder, force=True)
    assert contents(folder) == {**ONE, "notes.md": b"mine"}


@pytest.mark.parametrize("there", [False, True], ids=["missing", "empty"])
def test_a_new_and_an_empty_folder_are_filled_with_the_artifact_and_nothing_else(
    there: bool, store: Store, tmp_path: Path
) -> None:
    folder = tmp_path / "deep" / "out"
    if there:
        folder.mkdir(parents=True)
    check_folder(store, folder)
    assert folder.exists() == there, "a check leaves nothing behind"
    copy_to_folder(store, kept(store, ONE), folder, {"README.md": b"card"})
    assert contents(folder) == {**ONE, "README.md": b"card"}


def test_an_earlier_checkout_is_replaced_and_none_of_its_shards_and_cards_stay(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    copy_to_folder(store, kept(store, ONE), folder, {"README.md": b"card"})
    copy_to_folder(store, kept(store, OTHER, "b"), folder)
    assert contents(folder) == OTHER
    copy_to_folder(store, kept(store, ONE), folder)
    assert contents(folder) == ONE and not (folder / "sub").exists(), "nor folders that are empty now"


def test_a_file_that_the_user_changed_in_a_checkout_is_not_replaced(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    copy_to_folder(store, kept(store, ONE), folder)
    (folder / "config.json").write_bytes(b"[]")  # of the same size
    assert "config.json in it was changed since Requant laid it there" in refused(store, folder)
    (folder / "config.json").write_bytes(b"{}")  # as it was, but for its time
    check_folder(store, folder)


def test_a_file_that_the_user_put_into_a_checkout_keeps_the_next_one_out(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    copy_to_folder(store, kept(store, ONE), folder)
    (folder / "notes.md").write_text("mine")
    assert "notes.md in it was not laid there" in refused(store, folder)


@pytest.mark.parametrize("stopped_at", range(1, 4))
def test_an_interrupted_checkout_is_continued_by_the_same_command(
    stopped_at: int, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    copy_to_folder(store, kept(store, ONE), folder)
    manifest, replace, count = kept(store, OTHER, "b"), os.replace, 0

    def killed(source: Path, target: Path) -> None:
        nonlocal count
        count += folder in Path(target).parents
        if count == stopped_at:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        copy_to_folder(store, manifest, folder)
    (folder / ".config.json.part").write_bytes(b"half")  # what a kill leaves, which runs no `finally`
    copy_to_folder(store, manifest, folder)
    assert contents(folder) == OTHER


def test_a_release_that_was_moved_is_known_by_its_own_requant_json(store: Store, tmp_path: Path) -> None:
    manifest = kept(store, ONE)
    rows = [{"path": f.path, "size": f.size, "sha256": f.sha256} for f in manifest.files]
    copy_to_folder(store, manifest, tmp_path / "out", {"requant.json": json.dumps({"files": rows}).encode()})
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    check_folder(store, moved)
    (moved / "config.json").write_bytes(b"[]")
    assert "config.json" in refused(store, moved)


def test_a_hostile_requant_json_removes_nothing_outside_its_folder(store: Store, tmp_path: Path) -> None:
    (outside,) = write_files(tmp_path, {"outside.txt": b"precious"})
    inside = write_files(tmp_path / "out", {"config.json": b"{}"})
    rows = [{"path": f"../{outside.path}", "size": outside.size, "sha256": outside.sha256}]
    rows += [{"path": f.path, "size": f.size, "sha256": f.sha256} for f in inside]
    (tmp_path / "out" / "requant.json").write_text(json.dumps({"files": rows}))
    copy_to_folder(store, kept(store, OTHER, "b"), tmp_path / "out")
    assert (tmp_path / "outside.txt").read_bytes() == b"precious" and contents(tmp_path / "out") == OTHER


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"files": 5}', b'{"files": {"config.json": [{"size": 1}]}}'])
def test_a_record_that_cannot_be_read_makes_no_folder_ours(damage: bytes, store: Store, tmp_path: Path) -> None:
    folder, _ = copy_to_folder(store, kept(store, ONE), tmp_path / "out")
    record = store.checkout_record(folder)
    record.unlink()
    record.write_bytes(damage)
    assert "is not empty" in refused(store, folder)


def test_links_and_what_is_no_folder_are_refused_with_a_sentence(store: Store, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "to-real").symlink_to(tmp_path / "real")
    check_folder(store, tmp_path / "to-real")
    (tmp_path / "real" / "link").symlink_to(tmp_path)
    assert "link in it was not laid there" in refused(store, tmp_path / "to-real")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    (tmp_path / "file").write_text("")
    for name, said in {"dangling": "is a link to", "round": "round", "file": "is not a folder"}.items():
        with pytest.raises(FolderInUse, match=said):
            check_folder(store, tmp_path / name, force=True)


def test_gc_takes_the_records_of_folders_that_are_gone(store: Store, tmp_path: Path) -> None:
    from requant.tasks.store.gc import Policy, collect

    stays, _ = copy_to_folder(store, kept(store, ONE), tmp_path / "stays")
    gone, _ = copy_to_folder(store, kept(store, ONE), tmp_path / "gone")
    shutil.rmtree(gone)
    for path in (store.checkout_record(stays), store.checkout_record(gone)):
        os.utime(path, (0, 0))
    collect(store, Policy(None, None, None, 600), dry_run=False)
    assert store.checkout_record(stays).exists() and not store.checkout_record(gone).exists()


def test_store_checkout_refuses_a_users_folder_with_status_2(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = kept(store, ONE).digest
    write_files(tmp_path / "precious", {"config.json": b"mine"})
    command = ("store", "checkout", digest[:12], str(tmp_path / "precious"))
    status, said = ended(capsys, monkeypatch, *command)
    assert status == 2 and "config.json in it was not laid there by Requant" in said
    assert contents(tmp_path / "precious") == {"config.json": b"mine"}
    assert ended(capsys, monkeypatch, *command, "--force")[0] == 0
    assert contents(tmp_path / "precious") == ONE


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("base: {repo_id: me/x}\noutputs: [{name: a}, {name: b, scheme: W8A16}]\n")
    return path


def test_run_refuses_a_users_folder_before_any_work(
    recipe: Path, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path / "out" / "b", {"README.md": b"mine"})
    status, said = ended(capsys, monkeypatch, "run", str(recipe), "--checkout", str(tmp_path / "out"))
    assert status == 2 and f"{tmp_path / 'out' / 'b'} is not empty, and README.md in it" in said
    assert "Prefect" not in said and contents(tmp_path / "out") == {"b/README.md": b"mine"}


@pytest.mark.parametrize("below", ["", "made"])
def test_run_writes_no_checkout_into_the_folder_of_its_base_even_with_force(
    below: str, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    write_files(base, {"config.json": b"{}"})
    status, said = ended(capsys, monkeypatch, "run", str(base), "--checkout", str(base / below), "--force")
    assert status == 2 and "is in the folder of the base or the adapter" in said
    assert contents(base) == {"config.json": b"{}"}


def test_run_refuses_a_report_that_cannot_be_written_before_any_work(
    recipe: Path, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, said = ended(capsys, monkeypatch, "run", str(recipe), "--report", "/proc/nowhere/x.json")
    assert status == 2 and "/proc/nowhere/x.json cannot be written to" in said and "Traceback" not in said
    (tmp_path / "told-pictures").write_text("")
    status, said = ended(capsys, monkeypatch, "run", str(recipe), "--report", str(tmp_path / "told.json"))
    assert status == 2 and "told-pictures is a file" in said


def test_force_without_a_folder_is_wrong_usage(
    recipe: Path, store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, said = ended(capsys, monkeypatch, "run", str(recipe), "--force")
    assert status == 2 and "--checkout" in said
