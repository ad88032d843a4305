"""mtp_fix as a stage: what its key reads, what its artifact is made of."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from requant.tasks.artifact import File, Manifest
from requant.tasks.checkpoint.assemble import assemble
from requant.tasks.checkpoint.checkpoint import INDEX, SINGLE, Checkpoint
from requant.tasks.checkpoint.head import HEAD_SHARD
from requant.tasks.mtp_fix import mtp_fix, mtp_fix_key
from requant.tasks.recipe.loader import parse_recipe
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.store import Store
from tests.factories.checkpoints import all_tensors, file_from, write_checkpoint, write_packed
from tests.factories.pico import pico_base

SHARD = "model-00001-of-00001.safetensors"


def recipe(mtp: str = "keep", **more: Any) -> Recipe:
    return parse_recipe({"base": {"repo_id": "a/b"}, "mtp": mtp, **more})


def put(store: Store, folder: Path) -> Manifest:
    """A folder's files in the store, from copies."""
    files = []
    for path in sorted(folder.iterdir()):
        copy = folder.parent / f"copy-of-{path.name}"
        copy.write_bytes(path.read_bytes())
        files.append(file_from(path))
        store.put_blob(copy, files[-1])
    return Manifest.of(files)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = pico_base(tmp_path / "base")
    (folder / "README.md").write_text("# their card")
    (folder / ".gitattributes").write_text("theirs")
    return folder


def quantized_of(base: Path) -> Path:
    packed, out = base.parent / "packed", base.parent / "quantized"
    bits = write_packed(base, packed)
    assemble(Checkpoint.open(base), Checkpoint.open(packed), bits, out)
    return out


def fixed(store: Store, base: Path, mtp: str) -> tuple[Path, Manifest, Manifest, dict[str, Any]]:
    """The artifact as a folder, its manifest, the quantized one's, and what was recorded."""
    theirs, quantized = put(store, base), put(store, quantized_of(base))
    result = mtp_fix(store, recipe(mtp), theirs, quantized)
    folder = store.checkout(result.manifest, base.parent / f"result-{mtp}")
    return folder, result.manifest, quantized, result.provenance.document["mtp"]


def test_a_kept_head_joins_the_quantized_shards_and_every_other_file_of_the_base(store: Store, base: Path) -> None:
    folder, manifest, quantized, record = fixed(store, base, "keep")
    assert all_tensors(folder) == all_tensors(base.parent / "quantized") | {
        n: raw for n, raw in all_tensors(base).items() if n.startswith("mtp.")
    }
    assert manifest[SHARD] == quantized[SHARD]
    ours = {"config.json", INDEX, "quantization_config.json", SHARD, HEAD_SHARD}
    verbatim = {p.name for p in base.iterdir()} - ours - {"README.md", ".gitattributes"}
    verbatim = {n for n in verbatim if not n.endswith(".safetensors")}
    assert {f.path for f in manifest.files} == ours | verbatim
    assert {"tokenizer.json", "video_preprocessor_config.json", "chat_template.jinja"} <= verbatim
    for name in verbatim:
        assert (folder / name).read_bytes() == (base / name).read_bytes()
    assert Checkpoint.open(folder).problems == []
    assert record == {
        "asked": "keep", "in_base": True, "layout": "mtp", "tensors": 15, "bytes": manifest[HEAD_SHARD].size,
    }  # fmt: skip


def test_a_dropped_head_leaves_no_tensor_and_no_promise(store: Store, base: Path) -> None:
    folder, manifest, _, record = fixed(store, base, "drop")
    assert not [n for n in all_tensors(folder) if "mtp" in n] and HEAD_SHARD not in manifest
    assert json.loads((folder / "config.json").read_text())["text_config"]["mtp_num_hidden_layers"] == 0
    assert Checkpoint.open(folder).problems == []
    assert (record["asked"], record["bytes"]) == ("drop", 0)


def test_a_base_without_a_head_is_completed_all_the_same(store: Store, tmp_path: Path) -> None:
    base = pico_base(tmp_path / "base", head=False)
    folder, manifest, _, record = fixed(store, base, "keep")
    assert HEAD_SHARD not in manifest and record["in_base"] is False
    assert Checkpoint.open(folder).problems == []
    assert (folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_a_base_of_a_single_file_gives_its_head_too(store: Store, tmp_path: Path) -> None:
    sharded = pico_base(tmp_path / "sharded")
    config = json.loads((sharded / "config.json").read_text())
    base = write_checkpoint(tmp_path / "base", {SINGLE: all_tensors(sharded)}, config, index=False)
    folder, manifest, _, _ = fixed(store, base, "keep")
    assert SINGLE not in manifest and HEAD_SHARD in manifest
    assert len([n for n in all_tensors(folder) if n.startswith("mtp.")]) == 15
    assert Checkpoint.open(folder).problems == []


def test_the_shards_of_the_base_that_hold_no_head_are_not_read(store: Store, tmp_path: Path) -> None:
    """Cost follows the head: a shard that is not needed may even be lost."""
    base = pico_base(tmp_path / "base", shards=6)
    quantized = put(store, quantized_of(base))
    theirs = put(store, base)
    weight_map = json.loads((base / INDEX).read_text())["weight_map"]
    needed = {shard for name, shard in weight_map.items() if name.startswith("mtp.")}
    for file in theirs.files:
        if file.path.endswith(".safetensors") and file.path not in needed:
            store.backend.delete(f"blobs/sha256/{file.sha256[:2]}/{file.sha256}")
    assert HEAD_SHARD in mtp_fix(store, recipe(), theirs, quantized).manifest


def test_the_same_again_is_reused(store: Store, base: Path) -> None:
    theirs, quantized = put(store, base), put(store, quantized_of(base))
    states = [mtp_fix(store, recipe(), theirs, quantized).state for _ in range(2)]
    assert states == ["ran", "reused"]


A, B = "a" * 64, "b" * 64
FILES = Manifest.of(File(p, 1, A) for p in ("config.json", "tokenizer.json", "chat_template.jinja", "README.md", SHARD))
MADE = Manifest.of([File(SHARD, 2, B)])


def with_changed(path: str) -> Manifest:
    return Manifest.of(replace(f, sha256=B) if f.path == path else f for f in FILES.files)


def test_the_key_changes_with_every_file_that_joins_and_not_with_the_card() -> None:
    key = mtp_fix_key(recipe(), FILES, MADE)
    for path in ("config.json", "tokenizer.json", "chat_template.jinja", SHARD):
        assert mtp_fix_key(recipe(), with_changed(path), MADE) != key
    assert mtp_fix_key(recipe(), with_changed("README.md"), MADE) == key


def test_the_key_changes_with_the_quantized_weights_and_with_mtp_and_with_nothing_else_of_the_recipe() -> None:
    key = mtp_fix_key(recipe(), FILES, MADE)
    assert mtp_fix_key(recipe(), FILES, Manifest.of([File(SHARD, 3, B)])) != key
    assert mtp_fix_key(recipe("drop"), FILES, MADE) != key
    assert mtp_fix_key(recipe(quantize={"iters": 1}, gates={"min_top1_agreement": 0.1}), FILES, MADE) == key
