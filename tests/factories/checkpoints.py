"""What unit tests are made of: checkpoints written byte by byte, without the code under test."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from requant.tasks.artifact import File

GROUP = 32
BITS = 4
# (dtype, shape, bytes) by name.
Raw = Mapping[str, tuple[str, tuple[int, ...], bytes]]


def safetensors_bytes(tensors: Raw) -> bytes:
    """A safetensors file in the order given."""
    header: dict[str, Any] = {}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + len(data)]}
        position += len(data)
    return with_header(json.dumps(header).encode(), b"".join(data for _, _, data in tensors.values()))


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def write_checkpoint(folder: Path, shards: Mapping[str, Raw], config: dict[str, Any], *, index: bool = True) -> Path:
    """A checkpoint folder with these shards; `index` false: no index, for a single file."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map, total = {}, 0
    for shard, tensors in shards.items():
        (folder / shard).write_bytes(safetensors_bytes(tensors))
        weight_map |= dict.fromkeys(tensors, shard)
        total += sum(len(data) for _, _, data in tensors.values())
    if index:
        document = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(document))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def raw_tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a safetensors file, read by safetensors' own reader."""
    from safetensors import deserialize

    return {n: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for n, t in deserialize(path.read_bytes())}


def all_tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a folder's shards."""
    found: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        found |= raw_tensors(shard)
    return found


@contextmanager
def edited(folder: Path, shard: str) -> Iterator[dict[str, tuple[str, tuple[int, ...], bytes]]]:
    """The tensors of a shard, written back as they are left, with an index that agrees."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    tensors = raw_tensors(folder / shard)
    gone = set(tensors)
    yield tensors
    (folder / shard).write_bytes(safetensors_bytes(tensors))
    names = {n: s for n, s in index["weight_map"].items() if n not in gone} | dict.fromkeys(tensors, shard)
    total = sum(len(data) for _, _, data in all_tensors(folder).values())
    path.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": names}))


def from_bf16(data: bytes, shape: tuple[int, ...]) -> Any:
    return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)


def to_bf16(values: Any) -> bytes:
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()


def rounded(weight: Any) -> tuple[dict[str, tuple[str, tuple[int, ...], bytes]], Any]:
    """Round `[out, in]` to nearest, 4 bits, symmetric, groups of 32: GPTQ v1 parts, and the weight they stand for."""
    out, inputs = weight.shape
    groups = weight.reshape(out, inputs // GROUP, GROUP)
    scales = (np.abs(groups).max(-1, keepdims=True) / 7).astype(np.float16).astype(np.float32)
    scales[scales == 0] = 1
    levels = np.clip(np.round(groups / scales) + 8, 0, 15).astype(np.uint32)
    meant = ((levels.astype(np.float32) - 8) * scales).reshape(out, inputs)
    rows = levels.reshape(out, inputs).T.reshape(inputs // 8, 8, out)
    words = sum(rows[:, i] << np.uint32(4 * i) for i in range(8)).astype("<u4")
    zeros = np.full((inputs // GROUP, out // 8), 0x77777777, "<u4")
    by_group = np.ascontiguousarray(scales[..., 0].T.astype("<f2"))
    return {
        "qweight": ("I32", words.shape, words.tobytes()),
        "qzeros": ("I32", zeros.shape, zeros.tobytes()),
        "scales": ("F16", by_group.shape, by_group.tobytes()),
    }, meant


def packed_names(names: Any) -> list[str]:
    """The modules that auto-round would pack in a pico base: matrices of decoder blocks whose sides 32 divides."""
    skipped = ("conv1d", "in_proj_a", "in_proj_b", "norm")
    return [
        name.removesuffix(".weight")
        for name in names
        if name.startswith("model.language_model.layers.")
        if name.endswith("_proj.weight") or "in_proj_" in name
        if not any(s in name for s in skipped)
    ]


def experts_apart(tensors: Raw) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """BF16 tensors with one for each matrix of an expert in place of fused ones, but for the MTP head's."""
    apart: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for name, (dtype, shape, data) in tensors.items():
        stem, _, fused = name.rpartition(".experts.")
        if name.startswith("mtp.") or fused not in ("gate_up_proj", "down_proj"):
            apart[name] = dtype, shape, data
            continue
        for expert, weight in enumerate(np.frombuffer(data, "<u2").reshape(shape)):
            half = len(weight) // 2
            parts = {"down": weight} if fused == "down_proj" else {"gate": weight[:half], "up": weight[half:]}
            for part, matrix in parts.items():
                apart[f"{stem}.experts.{expert}.{part}_proj.weight"] = dtype, matrix.shape, matrix.tobytes()
    return apart


FULL = {"bits": 16, "data_type": "fp"}
# Shapes that 32 does not divide stay 16 bit, and auto-round names them.
NARROW = {f"model.language_model.layers.{n}.linear_attn.in_proj_{side}": FULL for n in range(3) for side in "ab"}


def quantization_config(**more: Any) -> dict[str, Any]:
    """auto-round's, for a pico model."""
    return {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "bits": BITS,
        "group_size": GROUP,
        "sym": True,
        "block_name_to_quantize": "model.language_model.layers",
        "extra_config": NARROW,
        **more,
    }


def write_packed(
    base: Path, folder: Path, *, config: dict[str, Any] | None = None, kept: str | None = None
) -> dict[str, int]:
    """What auto-round would write for a pico base: packed parts, and everything else as F32. Returns its bits.
    `kept`: what the modules have in their names that stay at 16 bits."""
    tensors = experts_apart(all_tensors(base))
    modules = [name for name in packed_names(tensors) if kept is None or kept not in name]
    result: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for name, (_, shape, data) in tensors.items():
        values, module = from_bf16(data, shape), name.removesuffix(".weight")
        if module in modules:
            result |= {f"{module}.{part}": raw for part, raw in rounded(values)[0].items()}
        else:
            result[name] = ("F32", shape, values.astype("<f4").tobytes())
    base_config = json.loads((base / "config.json").read_text())
    extra = NARROW if kept is None else {**NARROW, f".*{re.escape(kept)}.*": FULL}
    quantization = config if config is not None else quantization_config(extra_config=extra)
    write_checkpoint(
        folder, {"model.safetensors": result}, {**base_config, "quantization_config": quantization}, index=False
    )
    return dict.fromkeys(modules, BITS) | {"lm_head": 16}


def file_from(path: Path, name: str | None = None) -> File:
    data = path.read_bytes()
    return File(name or path.name, len(data), hashlib.sha256(data).hexdigest())


def write_files(folder: Path, files: Mapping[str, bytes]) -> list[File]:
    """Write files below a folder and describe them."""
    made = []
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        made.append(File(name, len(data), hashlib.sha256(data).hexdigest()))
    return made


def write_quantized(base: Path, folder: Path, *, head: bool = True, kept: str | None = None) -> Path:
    """A base quantized as the pipeline does it, with rounding in place of auto-round: `folder/made`."""
    from requant.tasks.checkpoint.assemble import assemble
    from requant.tasks.checkpoint.checkpoint import Checkpoint
    from requant.tasks.checkpoint.experts import split_fused_experts
    from requant.tasks.checkpoint.head import HeadFiles, keep_head, without_head

    bits = write_packed(base, folder / "packed", kept=kept)
    out = folder / "made"
    source = Checkpoint.open(base)
    assemble(split_fused_experts(source), Checkpoint.open(folder / "packed"), bits, out)
    if head:
        keep_head(HeadFiles.read(out), source, out)
    else:
        without_head(HeadFiles.read(out), source.head).write(out)
    for path in base.iterdir():
        if not path.name.startswith("model") and path.suffix != ".md" and path.name != "config.json":
            (out / path.name).write_bytes(path.read_bytes())
    return out
