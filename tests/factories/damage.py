"""Checkpoints that somebody or something damaged, each in a way that loads, runs and looks fine.

`python -m tests.factories.damage CHECKPOINT BASE` prints what every gate says of each.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.factories.checkpoints import from_bf16, raw_tensors, safetensors_bytes, to_bf16

BLOCK = "model.language_model.layers"
Raw = tuple[str, tuple[int, ...], bytes]


class Edit:
    """The tensors of a copied checkpoint, by name, written back at the end."""

    def __init__(self, folder: Path) -> None:
        self.shards = {path: raw_tensors(path) for path in sorted(folder.glob("*.safetensors"))}

    def __getitem__(self, name: str) -> Raw:
        return next(tensors[name] for tensors in self.shards.values() if name in tensors)

    def __setitem__(self, name: str, raw: Raw) -> None:
        next(tensors for tensors in self.shards.values() if name in tensors)[name] = raw

    def names(self, *parts: str) -> list[str]:
        return [n for tensors in self.shards.values() for n in tensors if all(part in n for part in parts)]

    def change(self, name: str, kind: str, values: Callable[[Any], Any]) -> None:
        """Replace a tensor's values, read and written as numpy's `kind`."""
        dtype, shape, data = self[name]
        array = np.frombuffer(data, kind).reshape(shape)
        self[name] = (dtype, shape, np.ascontiguousarray(values(array.copy()), kind).tobytes())

    def write(self) -> None:
        for path, tensors in self.shards.items():
            path.write_bytes(safetensors_bytes(tensors))


def scales_off(folder: Path) -> None:
    """The scales of one block 5 % too large: as much error again as rounding makes, and less than a norm shows."""
    edit = Edit(folder)
    for name in edit.names(f"{BLOCK}.1.", ".scales"):
        edit.change(name, "<f2", lambda scales: scales.astype(np.float32) * 1.05)
    edit.write()


def scales_small(folder: Path) -> None:
    """The scales of one matrix 5 % too small."""
    edit = Edit(folder)
    edit.change(f"{BLOCK}.2.mlp.up_proj.scales", "<f2", lambda scales: scales.astype(np.float32) * 0.95)
    edit.write()


def blocks_swapped(folder: Path) -> None:
    """Two blocks of one kind have each other's weights."""
    edit = Edit(folder)
    for name in edit.names(f"{BLOCK}.0."):
        other = name.replace(f"{BLOCK}.0.", f"{BLOCK}.1.")
        edit[name], edit[other] = edit[other], edit[name]
    edit.write()


def packed_swapped(folder: Path) -> None:
    """The packed parts alone of two blocks are swapped: everything that is kept is in its place."""
    edit = Edit(folder)
    for name in edit.names(f"{BLOCK}.0."):
        if name.endswith((".qweight", ".scales", ".qzeros")):
            other = name.replace(f"{BLOCK}.0.", f"{BLOCK}.1.")
            edit[name], edit[other] = edit[other], edit[name]
    edit.write()


def zeros_off(folder: Path) -> None:
    """Zero points of one matrix off by one, as by a writer that does not subtract the one."""
    edit = Edit(folder)
    edit.change(f"{BLOCK}.1.mlp.down_proj.qzeros", "<u4", lambda words: words + np.uint32(0x11111111))
    edit.write()


def one_nan(folder: Path) -> None:
    """One value of one norm is no number."""
    edit = Edit(folder)
    name = f"{BLOCK}.1.input_layernorm.weight"
    dtype, shape, data = edit[name]
    edit[name] = (dtype, shape, b"\xc0\x7f" + data[2:])
    edit.write()


def nan_scale(folder: Path) -> None:
    """One scale is no number."""
    edit = Edit(folder)
    name = f"{BLOCK}.1.mlp.up_proj.scales"
    dtype, shape, data = edit[name]
    edit[name] = (dtype, shape, b"\x00\x7e" + data[2:])
    edit.write()


def wrong_tokenizer(folder: Path) -> None:
    """A tokenizer of the same size in which two common tokens have each other's number."""
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    vocabulary = document["model"]["vocab"]
    one, two = (next(t for t in vocabulary if t.lstrip("\u0120") == word) for word in ("self", "return"))
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    path.write_text(json.dumps(document))


def foreign_fc(folder: Path) -> None:
    """The head's fusion layer is another model's: the main model is as it was, and drafts are wrong."""
    edit = Edit(folder)
    dtype, shape, data = edit["mtp.fc.weight"]
    other = np.random.default_rng(5).normal(0, float(from_bf16(data, shape).std()), shape)
    edit["mtp.fc.weight"] = (dtype, shape, to_bf16(other))
    edit.write()


def vision_flipped(folder: Path) -> None:
    """A matrix of the vision tower is upside down."""
    edit = Edit(folder)
    name = "model.visual.merger.linear_fc2.weight"
    edit.change(name, "<u2", lambda rows: rows[::-1])
    edit.write()


def shorter_context(folder: Path) -> None:
    """A config with another rotary base."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["rope_parameters"]["rope_theta"] = 5000.0
    path.write_text(json.dumps(config))


# Damage by name, and the gates that must fail. Others may fail too.
DAMAGES: dict[str, tuple[Callable[[Path], None], set[str]]] = {
    "scales of a block 5 % too large": (scales_off, {"weight_slope"}),
    "scales of a matrix 5 % too small": (scales_small, {"weight_slope"}),
    "two blocks swapped": (blocks_swapped, {"weight_slope", "block_error", "lossless"}),
    "packed parts of two blocks swapped": (packed_swapped, {"weight_slope", "block_error"}),
    "zero points off by one": (zeros_off, {"weight_offset"}),
    "one value is no number": (one_nan, {"finite", "long_context"}),
    "one scale is no number": (nan_scale, {"finite", "weight_slope", "block_error"}),
    "tokenizer of another model": (wrong_tokenizer, {"files", "same_tokens"}),
    "mtp.fc of another model": (foreign_fc, {"lossless", "mtp_acceptance_ratio"}),
    "vision tensor flipped": (vision_flipped, {"lossless", "vision_output"}),
    "another rotary base": (shorter_context, {"context", "structure"}),
}


def damaged(folder: Path, into: Path, name: str) -> Path:
    """A copy of a checkpoint, damaged."""
    shutil.copytree(folder, into)
    for path in into.iterdir():
        path.chmod(0o644)
    DAMAGES[name][0](into)
    return into


def main(checkpoint: Path, base: Path) -> None:
    from requant.tasks.recipe.loader import load_recipe
    from requant.tasks.validate import validate_folders
    from requant.tasks.validating.gates import judge

    gates = load_recipe(Path("deployments/recipes/demo.yaml")).gates
    with tempfile.TemporaryDirectory() as scratch:
        for number, name in enumerate(("undamaged", *DAMAGES)):
            folder = damaged(checkpoint, Path(scratch) / str(number), name) if number else checkpoint
            print(f"\n## {name}")
            for gate in judge(validate_folders(folder, base), gates):
                value = "-" if gate.value is None else f"{gate.value:.4g}"
                print(f"{gate.name:22} {value:>10}  {'' if gate.passed else 'FAILED ' + gate.note}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
