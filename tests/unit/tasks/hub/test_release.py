"""Publishing: the comparisons that decide whether anything is uploaded, and what `requant.json` says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from requant.tasks.artifact import RELEASE, REWRITTEN, File, Manifest
from requant.tasks.errors import HubError
from requant.tasks.hub.manifest import Origin, ReleaseManifest, release_document, tag_of
from requant.tasks.hub.release import Release, _list_stale, has_exactly, has_same_content
from requant.tasks.hub.revision import HubFile, Revision
from requant.tasks.record import StageRecord
from tests.factories.checkpoints import write_files

SHA = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": b"{}", "model.safetensors": b"weights", "sub/a.txt": b"text"}
CARD = {"README.md": b"# card"}


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def on_hub(path: str, data: bytes, *, lfs: bool) -> HubFile:
    """A file as the Hub lists it: LFS files have a sha256, and their blob id is that of a pointer."""
    sha256 = hashlib.sha256(data).hexdigest()
    return HubFile(
        path, len(data), git_id(b"pointer " + sha256.encode()) if lfs else git_id(data), sha256 if lfs else None
    )


def revision(files: dict[str, bytes], **more: Any) -> Revision:
    listed = tuple(on_hub(p, d, lfs=p.endswith(".safetensors")) for p, d in sorted(files.items()))
    return Revision("me/x", SHA, listed, **more)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return Manifest.of(write_files(tmp_path, FILES))


def test_a_revision_with_the_same_files_holds_an_artifact(manifest: Manifest, tmp_path: Path) -> None:
    assert has_exactly(revision(FILES), manifest.files, tmp_path)


def test_what_lies_beside_and_the_hubs_own_file_do_not_count_where_they_are_put_aside(
    manifest: Manifest, tmp_path: Path
) -> None:
    there = revision({**FILES, **dict.fromkeys(REWRITTEN, b"text")})
    assert has_exactly(there, manifest.files, tmp_path, REWRITTEN)
    assert not has_exactly(there, manifest.files, tmp_path)
    assert has_exactly(revision({**FILES, ".gitattributes": b"*"}), manifest.files, tmp_path)


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
    assert not has_exactly(revision(files), manifest.files, tmp_path)


def test_a_large_file_is_compared_by_its_sha256_without_reading_ours(tmp_path: Path) -> None:
    sha256 = hashlib.sha256(b"weights").hexdigest()
    ours = File("not-here.safetensors", 7, sha256)
    assert has_same_content(HubFile(ours.path, 7, "x", sha256), ours, tmp_path)
    assert not has_same_content(HubFile(ours.path, 7, "x", "0" * 64), ours, tmp_path)


def test_a_file_that_the_hub_lists_without_any_hash_is_not_the_same(manifest: Manifest, tmp_path: Path) -> None:
    assert not has_same_content(HubFile("config.json", 2, "", None), manifest["config.json"], tmp_path)


def test_what_an_earlier_release_left_is_stale_and_the_hubs_own_file_is_not(manifest: Manifest) -> None:
    old = revision({**FILES, ".gitattributes": b"", "model-00001.safetensors": b"old", "pictures/losses.png": b"old"})
    assert _list_stale(old, manifest.files) == ["model-00001.safetensors", "pictures/losses.png"]
    assert _list_stale(revision(FILES, left_out=("a\nb",)), manifest.files) == ["a\nb"]


def test_a_release_links_to_its_repo() -> None:
    assert Release(repo_id="me/x", commit=SHA, tag="t", changed=True).url.endswith("/me/x")


def written(folder: Path, **changes: Any) -> dict[str, Any]:
    """`requant.json` of the files above and a card."""
    values: dict[str, Any] = {
        "origin": Origin(Revision("a/b", SHA, ()), "e" * 64, "1.2.3"),
        "artifact": Manifest.of(write_files(folder, FILES)),
        "release_files": write_files(folder, CARD),
        "blob_ids": {path: git_id(data) for path, data in {**FILES, **CARD}.items()},
        "gates": [{"name": "structure", "value": 0.0, "limit": 0.0, "passed": True}],
        "provenance": {"quantize": StageRecord({"seconds": 1.5})},
    }
    document: dict[str, Any] = json.loads(release_document(**{**values, **changes}))
    return document


def read(document: Any) -> ReleaseManifest:
    return ReleaseManifest.read(json.dumps(document).encode(), "me/x")


def test_a_manifest_names_every_file_its_base_and_its_release(tmp_path: Path) -> None:
    document = written(tmp_path)
    assert [row["path"] for row in document["files"]] == sorted({**FILES, **CARD})
    assert all(row["sha256"] == hashlib.sha256({**FILES, **CARD}[row["path"]]).hexdigest() for row in document["files"])
    claimed = read(document)
    assert (
        claimed.tag
        == tag_of(SHA, claimed.artifact)
        == f"{SHA[:7]}-{Manifest.of(write_files(tmp_path, FILES)).digest[:7]}"
    )
    assert claimed.failed_gates == () and claimed.release_files == {"README.md"}


def test_a_repo_as_its_manifest_says_has_no_differences(tmp_path: Path) -> None:
    there = {**FILES, **CARD, RELEASE: b"{}", ".gitattributes": b"*"}
    assert read(written(tmp_path)).differences(revision(there)) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"README.md": b"# CARD"}, "README.md is not the file"),
        ({"model.safetensors": b"WEIGHTS"}, "model.safetensors is not the file"),
        ({"new.txt": b"1"}, "new.txt is there, and requant.json does not name it"),
        ({"sub/a.txt": None}, "sub/a.txt is missing"),
    ],
)
def test_a_file_that_is_another_one_too_many_or_missing_is_named(
    changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    there = {path: data for path, data in {**FILES, **CARD, **changes}.items() if data is not None}
    (problem,) = read(written(tmp_path)).differences(revision(there))
    assert problem.startswith(told)


def test_a_name_that_would_move_a_cursor_is_told_escaped(tmp_path: Path) -> None:
    (problem,) = read(written(tmp_path)).differences(revision({**FILES, **CARD}, left_out=("a\nb\x1b[2J",)))
    assert problem.isprintable() and "a\\nb" in problem


def test_secrets_folders_and_servers_stay_out_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    record = {
        "attempts": [{"error": "no room in /root/.cache/requant/store/work/quantize-1/log.txt, token hf_very_secret"}],
        "measured": {"engine": "url:http://gpu7.customer.example:8000/v1", "perplexity": float("inf")},
        "texts": ["/data/customers/calibration.txt", "~/private/x.jsonl", "Qwen/Qwen3.6-27B@main", "https://a.b/c/d"],
    }
    document = written(tmp_path, provenance={"quantize": StageRecord(record)})
    text = json.dumps(document)
    for secret in ("hf_very_secret", "/root", "customer", "private", "/data"):
        assert secret not in text
    kept = document["provenance"]["quantize"]
    assert kept["texts"] == ["calibration.txt", "x.jsonl", "Qwen/Qwen3.6-27B@main", "https://a.b/c/d"]
    assert kept["measured"] == {"engine": "url", "perplexity": None}


BROKEN: dict[str, Any] = {
    "not an object": [],
    "another format": {"format": 2},
    "no files": {"files": None},
    "a path that leads out": {"files": [{"path": "../x", "size": 1, "sha256": "a" * 64}]},
    "a hash that is none": {"files": [{"path": "x", "size": 1, "sha256": "a"}]},
    "other files than its digest": {"files": []},
    "no base": {"base": {}},
    "a commit that is none": {"base": {"repo_id": "a/b", "sha": "main"}},
    "gates that are none": {"gates": [1]},
    "an endless size": {"files": [{"path": "x", "size": 1e400, "sha256": "a" * 64}]},
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_a_manifest_that_contradicts_itself_is_one_sentence(change: Any, tmp_path: Path) -> None:
    document = {**written(tmp_path), **change} if isinstance(change, dict) else change
    with pytest.raises(HubError, match=r"the requant\.json of me/x is not what Requant writes \(.+\): restore it"):
        read(document)


def test_a_failed_gate_is_known_by_name(tmp_path: Path) -> None:
    document = written(tmp_path, gates=[{"name": "lossless", "passed": False}])
    assert read(document).failed_gates == ("lossless",)


def test_a_gate_that_was_not_measured_fails_a_release_only_where_it_has_a_limit(tmp_path: Path) -> None:
    gates = [{"name": name, "value": None, "limit": limit, "passed": None} for name, limit in (("a", None), ("b", 1.0))]
    assert read(written(tmp_path, gates=gates)).failed_gates == ("b",)
