"""Artifacts: digests, stage keys, manifests and the file names they may hold."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from requant.tasks.artifact import File, Manifest, check_relative, digest_of, file_of, git_blob_id, sha256_of, stage_key
from requant.tasks.errors import CheckpointError, StoreError

A, B, C = (hashlib.sha256(name).hexdigest() for name in (b"a", b"b", b"c"))
FILES = [File("config.json", 3, A), File("model/weights.safetensors", 5, B), File("a.txt", 0, C)]


def test_a_digest_is_the_sha256_of_the_sorted_lines_and_nothing_else() -> None:
    lines = f"a.txt\x000\x00{C}\nconfig.json\x003\x00{A}\nmodel/weights.safetensors\x005\x00{B}\n"
    assert Manifest.of(FILES).digest == hashlib.sha256(lines.encode()).hexdigest()


def test_a_digest_does_not_depend_on_the_order_of_the_files() -> None:
    assert Manifest.of(reversed(FILES)).digest == Manifest.of(FILES).digest
    assert [f.path for f in Manifest.of(reversed(FILES)).files] == ["a.txt", "config.json", "model/weights.safetensors"]


@pytest.mark.parametrize("changed", [File("config.jsom", 3, A), File("config.json", 4, A), File("config.json", 3, B)])
def test_a_digest_changes_with_path_size_and_content(changed: File) -> None:
    assert Manifest.of([changed, *FILES[1:]]).digest != Manifest.of(FILES).digest


def test_a_digest_does_not_depend_on_when_or_where_a_file_was_written(tmp_path: Path) -> None:
    for folder, time in ((tmp_path / "one", 1), (tmp_path / "two", 2_000_000_000)):
        folder.mkdir()
        (folder / "x").write_bytes(b"same")
        os.utime(folder / "x", (time, time))
    digests = {Manifest.of([file_of(tmp_path / name, "x")]).digest for name in ("one", "two")}
    assert digests == {Manifest.of([File("x", 4, hashlib.sha256(b"same").hexdigest())]).digest}


def test_a_manifest_knows_its_files_by_path_and_its_size() -> None:
    manifest = Manifest.of(FILES)
    assert manifest["config.json"] == FILES[0]
    assert "config.json" in manifest and "other" not in manifest
    assert manifest.size == 8


def test_a_path_that_stands_twice_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match=r"config\.json stands twice"):
        Manifest.of([*FILES, File("config.json", 9, C)])


@pytest.mark.parametrize("path", ["config.json/a", "config.json/a/b", "Config.json/a"])
def test_a_file_that_is_another_ones_folder_is_refused(path: str) -> None:
    with pytest.raises(CheckpointError, match=r"lies in what is a file too, config\.json"):
        Manifest.of([*FILES, File(path, 9, C)])


OUTSIDE = [
    "", ".", "..", "/etc/passwd", "../x", "a/../b", "a/..", "a//b", "./a", "a/", "a/./b", "a\\b", "..\\b", "a\0b",
    "x" * 1025, "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: ascii(path[:12]))
def test_a_path_that_leaves_the_folder_or_is_not_canonical_is_refused(path: str) -> None:
    with pytest.raises(CheckpointError, match="not allowed"):
        check_relative(path)


@pytest.mark.parametrize("path", ["a", "a/b/c.json", "..a", "a..b", ".gitattributes", "name with spaces", "モデル.txt"])
def test_a_path_inside_the_folder_is_allowed(path: str) -> None:
    check_relative(path)


def test_a_manifest_survives_being_written_and_read() -> None:
    manifest = Manifest.of(FILES)
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert Manifest.from_json(manifest.to_json().encode()).digest == manifest.digest


def test_a_manifest_that_contradicts_its_digest_is_an_error() -> None:
    document = json.loads(Manifest.of(FILES).to_json())
    document["files"][0]["size"] += 1
    with pytest.raises(StoreError, match="contradicts its own digest"):
        Manifest.from_json(json.dumps(document))


def test_a_manifest_with_something_else_than_a_sha256_is_an_error() -> None:
    manifest = Manifest((File("x", 1, "../../secret"),))
    with pytest.raises(StoreError):
        Manifest.from_json(manifest.to_json())


def _one(path: Any, size: Any) -> str:
    """A manifest of one file whose digest is right for what its path and size would be converted to."""
    digest = Manifest((File(str(path), int(size), A),)).digest
    return json.dumps({"digest": digest, "files": [{"path": path, "size": size, "sha256": A}]})


def _damaged() -> list[str | bytes]:
    whole = Manifest.of(FILES).to_json()
    one = '{"digest": "x", "files": [%s]}'
    return [
        b"", "null", "[]", "7", '"text"', "{}", whole[:-1], whole[: len(whole) // 2], b"\xff\xfe\x00", b"\0" * 100,
        '{"digest": "x"}', '{"files": []}', '{"digest": "x", "files": 3}', '{"digest": "x", "files": {"a": 1}}',
        one % "1", one % "null", one % '{"path": "a"}', one % '{"path": "a", "size": "b", "sha256": "c"}',
        one % f'{{"path": "../a", "size": 1, "sha256": "{A}"}}',
        one % f'{{"path": "a", "size": Infinity, "sha256": "{A}"}}',
        one % f'{{"path": "a", "size": {"9" * 5000}, "sha256": "{A}"}}',
        "[" * 200_000,
        *(_one(path, size) for path, size in (("a", -5), ("a", True), ("a", 7.0), ("a", "7"), (None, 7), (["a"], 7))),
    ]  # fmt: skip


@pytest.mark.parametrize("text", _damaged(), ids=range(len(_damaged())))
def test_a_damaged_manifest_is_an_error_that_says_so(text: str | bytes) -> None:
    with pytest.raises(StoreError, match="manifest in the store"):
        Manifest.from_json(text)


def test_a_json_digest_ignores_the_order_of_keys_and_nothing_else() -> None:
    assert digest_of({"a": 1, "b": [1, 2]}) == digest_of({"b": [1, 2], "a": 1})
    assert len({digest_of(d) for d in ({"a": 1}, {"a": "1"}, {"a": True}, {"a": None}, {"b": 1}, {"a": [1]})}) == 6
    assert digest_of({"a": [1, 2]}) != digest_of({"a": [2, 1]})


def test_a_stage_key_changes_with_each_of_its_inputs() -> None:
    same = {"reads": {"base": A}, "settings": {"bits": 4}, "tools": {"auto-round": "0.16.1"}}
    keys = {
        stage_key("quantize", 1, **same),
        stage_key("validate", 1, **same),
        stage_key("quantize", 2, **same),
        stage_key("quantize", 1, **{**same, "reads": {"base": B}}),
        stage_key("quantize", 1, **{**same, "reads": {"other": A}}),
        stage_key("quantize", 1, **{**same, "settings": {"bits": 8}}),
        stage_key("quantize", 1, **{**same, "tools": {"auto-round": "0.16.2"}}),
        stage_key("quantize", 1, reads={}, settings={}, tools={}),
    }
    assert len(keys) == 8
    assert all(len(key) == 64 and set(key) <= set("0123456789abcdef") for key in keys)


def test_a_stage_key_is_the_same_on_every_machine_and_forever() -> None:
    text = '{"reads":{"b":"2"},"settings":{"s":null},"stage":"x","tools":{},"version":3}'
    key = stage_key("x", 3, reads={"b": "2"}, settings={"s": None}, tools={})
    assert key == hashlib.sha256(text.encode()).hexdigest()


KNOWN = {  # what `git hash-object` says
    b"": "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391",
    b"hello\n": "ce013625030ba8dba906f756967f9e9ca394464a",
}


@pytest.mark.parametrize("data", KNOWN)
def test_a_filesgit_blob_id_is_what_git_says(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(data)
    assert git_blob_id(tmp_path / "x") == KNOWN[data]


def test_a_large_filesgit_blob_id_is_taken_in_pieces(tmp_path: Path) -> None:
    data = b"0123456789" * 300_000
    (tmp_path / "x").write_bytes(data)
    assert git_blob_id(tmp_path / "x") == hashlib.sha1(b"blob 3000000\0" + data).hexdigest()


def test_a_files_sha256_is_what_everyone_says(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_of(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
