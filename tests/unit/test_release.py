"""Publishing: the comparisons that decide whether anything is uploaded."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tasks.artifact import File, Manifest
from tasks.hub.release import Release, _stale, holds, same
from tasks.hub.revision import HubFile, Revision
from tests.unit.making import write_files

SHA = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": b"{}", "model.safetensors": b"weights", "sub/a.txt": b"text"}


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def on_hub(path: str, data: bytes, *, lfs: bool) -> HubFile:
    """A file as the Hub lists it: LFS files have a sha256, and their blob id is that of a pointer."""
    sha256 = hashlib.sha256(data).hexdigest()
    return HubFile(
        path, len(data), git_id(b"pointer " + sha256.encode()) if lfs else git_id(data), sha256 if lfs else None
    )


def revision(files: dict[str, bytes]) -> Revision:
    return Revision("me/x", SHA, tuple(on_hub(p, d, lfs=p.endswith(".safetensors")) for p, d in sorted(files.items())))


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return Manifest.of(write_files(tmp_path, FILES))


def test_a_revision_with_the_same_files_holds_an_artifact(manifest: Manifest, tmp_path: Path) -> None:
    assert holds(revision(FILES), manifest, tmp_path)


def test_the_card_and_the_hubs_own_file_do_not_count(manifest: Manifest, tmp_path: Path) -> None:
    assert holds(revision({**FILES, "README.md": b"# card", ".gitattributes": b"*"}), manifest, tmp_path)


def test_pictures_of_a_card_do_not_count_unless_they_are_the_artifacts_own(manifest: Manifest, tmp_path: Path) -> None:
    assert holds(revision({**FILES, "pictures/losses.png": b"png"}), manifest, tmp_path)
    own = Manifest.of(write_files(tmp_path, {**FILES, "pictures/cat.png": b"cat"}))
    assert not holds(revision(FILES), own, tmp_path)
    assert holds(revision({**FILES, "pictures/cat.png": b"cat"}), own, tmp_path)


CHANGES: dict[str, dict[str, bytes]] = {
    "a missing file": {k: v for k, v in FILES.items() if k != "sub/a.txt"},
    "an extra file": {**FILES, "old.safetensors": b"stale"},
    "other weights": {**FILES, "model.safetensors": b"WEIGHTS"},
    "other text of the same size": {**FILES, "config.json": b"[]"},
    "a longer text": {**FILES, "config.json": b"{} "},
    "a renamed file": {"config.json": b"{}", "model.safetensors": b"weights", "a.txt": b"text"},
    "nothing": {},
}


@pytest.mark.parametrize("files", CHANGES.values(), ids=CHANGES)
def test_a_revision_with_other_files_does_not_hold_it(
    files: dict[str, bytes], manifest: Manifest, tmp_path: Path
) -> None:
    assert not holds(revision(files), manifest, tmp_path)


def test_a_large_file_is_compared_by_its_sha256_without_reading_ours(tmp_path: Path) -> None:
    sha256 = hashlib.sha256(b"weights").hexdigest()
    ours = File("not-here.safetensors", 7, sha256)
    assert same(HubFile(ours.path, 7, "x", sha256), ours, tmp_path)
    assert not same(HubFile(ours.path, 7, "x", "0" * 64), ours, tmp_path)


def test_a_file_that_the_hub_lists_without_any_hash_is_not_the_same(manifest: Manifest, tmp_path: Path) -> None:
    assert not same(HubFile("config.json", 2, "", None), manifest["config.json"], tmp_path)


def test_what_an_earlier_release_left_is_stale_and_the_hubs_own_files_are_not(manifest: Manifest) -> None:
    old = revision({**FILES, "README.md": b"", ".gitattributes": b"", "model-00001-of-00002.safetensors": b"old"})
    assert _stale(old, manifest) == ["model-00001-of-00002.safetensors"]


def test_pictures_of_an_earlier_release_are_stale(manifest: Manifest) -> None:
    old = revision({**FILES, "pictures/losses.png": b"old", "pictures/throughput.png": b"old"})
    assert _stale(old, manifest, ["README.md", "pictures/losses.png"]) == ["pictures/throughput.png"]


def test_a_release_links_to_its_repo() -> None:
    assert Release("me/x", SHA, "t", True).url.endswith("/me/x")
