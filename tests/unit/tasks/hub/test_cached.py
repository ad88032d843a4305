"""Without the Hub: what huggingface_hub's cache and the store have is used, and what they lack is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from requant.flows import api
from requant.tasks.artifact import Manifest, file_of, git_blob_id
from requant.tasks.checkpoint.checkpoint import INDEX
from requant.tasks.download import download, download_key, find_repo
from requant.tasks.errors import HubError
from requant.tasks.hub.revision import Revision, find_revision, resolve
from requant.tasks.store import Store
from requant.tasks.store.folder import FolderBackend
from tests.factories.hub_cache import SHA, cached_repo, switch_hub_off
from tests.factories.pico import pico_base


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return pico_base(tmp_path / "base")


@pytest.fixture
def snapshot(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The base in the cache, and the Hub switched off."""
    switch_hub_off(monkeypatch, tmp_path / "cache")
    return cached_repo(tmp_path / "cache", base)


def manifest_of(folder: Path) -> Manifest:
    return Manifest.of(file_of(folder, path.relative_to(folder).as_posix()) for path in folder.rglob("*"))


@pytest.mark.usefixtures("snapshot")
@pytest.mark.parametrize("revision", ["main", SHA])
def test_a_branch_or_commit_is_found_with_the_hashes_of_its_files(revision: str, base: Path) -> None:
    found = find_revision("a/b", revision)
    assert found.sha == SHA and found.size == sum(path.stat().st_size for path in base.iterdir())
    for file in found.files:
        of_base = file_of(base, file.path)
        assert (file.sha256 == of_base.sha256) == file.path.endswith(".safetensors")
        assert file.sha256 or file.blob_id == git_blob_id(base / file.path)


@pytest.mark.usefixtures("snapshot")
def test_a_repo_is_inspected_and_gives_its_head_to_a_repair(base: Path, tmp_path: Path) -> None:
    assert api.inspect("a/b").to_json() == api.inspect(base).to_json()
    assert not api.mtp_fix(base, base="a/b@main", dry_run=True).changed


@pytest.mark.usefixtures("snapshot")
def test_a_base_is_copied_into_the_store_and_found_there_when_the_cache_is_gone(
    store: Store, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = find_repo(store, "a/b", "main")
    downloaded = download(store, found)
    assert downloaded.manifest.digest == manifest_of(base).digest
    assert downloaded.key != download_key(Revision("a/b", SHA, ())), "a cache may have only some of the files"
    download(store, replace(found, folder=None))  # as with the Hub, of which no file is needed any more
    switch_hub_off(monkeypatch, tmp_path / "nothing")
    stored = find_repo(store, "a/b", SHA)
    assert download(store, stored).state == "reused" and stored.folder is None
    assert stored.content == found.content, "or a run without the Hub would seem to be of another commit"
    remote = Store(store.backend, FolderBackend(tmp_path / "near"))
    with pytest.raises(HubError, match="in the store and on this machine"):
        find_repo(remote, "a/b", SHA)
    with pytest.raises(HubError, match="a/b@main lies on the Hub, which HF_HUB_OFFLINE=1 switches off"):
        find_repo(store, "a/b", "main")


def test_what_the_cache_lacks_is_said(snapshot: Path) -> None:
    for revision in ("v2", "0" * 40, "../main", "refs/pr/1"):
        with pytest.raises(HubError, match="switches off: unset HF_HUB_OFFLINE, name a commit that is in the cache"):
            find_revision("a/b", revision)
    with pytest.raises(HubError, match="a//b"):
        find_revision("a//b")
    shard = sorted(snapshot.glob("*.safetensors"))[-1]
    assert (snapshot / INDEX).exists()
    shard.resolve().unlink()
    with pytest.raises(HubError, match=f"without {shard.name}, and HF_HUB_OFFLINE=1 switches the Hub off: unset it"):
        find_revision("a/b")


@pytest.mark.parametrize("left", [("config.json",), ("config.json", "tokenizer.json", "tokenizer_config.json")])
def test_a_cache_with_small_files_alone_lacks_the_weights(snapshot: Path, left: tuple[str, ...]) -> None:
    for path in [path for path in snapshot.iterdir() if path.name not in left]:
        path.unlink()
    with pytest.raises(HubError, match=f"has a/b@{SHA} without its weights, and HF_HUB_OFFLINE=1 switches the Hub off"):
        find_revision("a/b")
    (snapshot / "model.gguf").write_bytes(b"GGUF")
    assert find_revision("a/b").sha == SHA, "weights in another format are told of as such"


def test_an_altered_file_of_the_cache_is_refused(snapshot: Path, store: Store) -> None:
    shard = next(snapshot.glob("*.safetensors")).resolve()
    shard.write_bytes(shard.read_bytes()[::-1])
    with pytest.raises(Exception, match="arrived altered"):
        download(store, find_revision("a/b"))


@pytest.mark.usefixtures("snapshot")
def test_what_a_release_is_compared_with_never_comes_from_the_cache() -> None:
    """To verify a copy on this disk, or to publish after it, would say nothing of the Hub."""
    with pytest.raises(HubError, match="a/b@main lies on the Hub, which HF_HUB_OFFLINE=1 switches off"):
        resolve("a/b")
