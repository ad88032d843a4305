"""Sparse checkpoints of the size of Qwen3.6-27B: real headers, index and configs, and holes in place of weights.

`write_base` makes the BF16 model, and `write_quantized` what auto-round makes of it, both from the dimensions. The MTP
head has random data with the usual spread; all other tensors read as zeros. Names and config fields are those of
`infra/dev/models/tiny-qwen3_5-mtp`. The names and the number of tensors and the layout of the quantized model are those
of auto-round 0.16.1 run on that model. Qwen3.6-27B has 1199 tensors, and 2013 if all but `mtp.fc` are quantized.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

TINY = Path(__file__).parent.parent / "dev" / "models" / "tiny-qwen3_5-mtp"
INDEX = "model.safetensors.index.json"
EXTRA = "model_extra_tensors.safetensors"  # auto-round's shard for tensors that transformers does not load
VIDEO = "video_preprocessor_config.json"  # auto-round does not copy this file
GROUP = 128
FULL_PRECISION = {"bits": 16, "data_type": "fp"}
DTYPE_BYTES = {"BF16": 2, "F16": 2, "F8_E4M3": 1, "I32": 4}
ROWS_AT_A_TIME = 1024

Floats = npt.NDArray[np.float32]
Shape = tuple[int, ...]


class Spec(NamedTuple):
    """Dtype, as safetensors names it, and shape of a tensor."""

    dtype: str
    shape: Shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


Specs = Mapping[str, Spec]


@dataclass(frozen=True)
class Vision:
    """Dimensions of the vision tower."""

    depth: int = 27
    width: int = 1152
    intermediate: int = 4304
    heads: int = 16
    positions: int = 2304
    channels: int = 3
    patch: int = 16
    temporal: int = 2
    merge: int = 2


@dataclass(frozen=True)
class Dimensions:
    """Dimensions of a dense Qwen3.5 or 3.6 with vision. The defaults are those of Qwen3.6-27B.

    Every `period`-th layer has full attention, the others are gated DeltaNets. `q_proj` has twice the rows that the
    heads need, since it also computes the output gate.
    """

    layers: int = 64
    hidden: int = 5120
    intermediate: int = 17408
    period: int = 4
    heads: int = 24
    kv_heads: int = 4
    head_dim: int = 256
    linear_key_heads: int = 16
    linear_value_heads: int = 48
    linear_head_dim: int = 128
    conv_kernel: int = 4
    vocab: int = 248320
    mtp_layers: int = 1
    vision: Vision = field(default_factory=Vision)

    @property
    def layer_types(self) -> list[str]:
        full, linear = "full_attention", "linear_attention"
        return [linear if (layer + 1) % self.period else full for layer in range(self.layers)]


QWEN36_27B = Dimensions()


def base_tensors(dims: Dimensions = QWEN36_27B) -> dict[str, Spec]:
    """Return all tensors of the BF16 model in the order of its shards, with the MTP head last."""
    shapes: dict[str, Shape] = {"model.language_model.embed_tokens.weight": (dims.vocab, dims.hidden)}
    for layer, kind in enumerate(dims.layer_types):
        shapes |= _layer(f"model.language_model.layers.{layer}", kind, dims)
    shapes |= {"model.language_model.norm.weight": (dims.hidden,), "lm_head.weight": (dims.vocab, dims.hidden)}
    shapes |= _vision(dims.vision, dims.hidden)
    shapes |= _head(dims)
    return {name: Spec("BF16", shape) for name, shape in shapes.items()}


def quantized_tensors(dims: Dimensions = QWEN36_27B) -> dict[str, Spec]:
    """Return all tensors of W4A16, group size 128, `auto_round:auto_gptq`, in the order blocks, others, head.

    Linear layers whose sides are multiples of 32 are quantized, also those of the head and `mtp.fc`. This is what
    auto-round made before 0.16, and no engine loads it.
    """
    tensors: dict[str, Spec] = {}
    for name, spec in base_tensors(dims).items():
        module = name.removesuffix(".weight")
        tensors |= packed_parts(module, spec.shape) if _is_packed(name, spec) else {name: spec}
    blocks = {n: s for n, s in tensors.items() if n.startswith("model.language_model.layers.")}
    head = {n: s for n, s in tensors.items() if is_head(n)}
    others = {n: s for n, s in tensors.items() if n not in blocks and n not in head}
    return {**blocks, **others, **head}


def packed_parts(module: str, shape: Shape) -> dict[str, Spec]:
    """Return the three tensors of a packed `[out, in]` matrix."""
    out, into = shape
    return {
        f"{module}.qweight": Spec("I32", (into // 8, out)),
        f"{module}.qzeros": Spec("I32", (into // GROUP, out // 8)),
        f"{module}.scales": Spec("F16", (into // GROUP, out)),
    }


def is_head(name: str) -> bool:
    """Check whether a tensor belongs to the MTP head."""
    return name.startswith("mtp.")


def write_base(
    folder: Path, dims: Dimensions = QWEN36_27B, *, data: bool = True, max_shard: int = 4_500_000_000
) -> Path:
    """Write the BF16 model: 55.6 GB in 13 shards. With `data`, the 0.85 GB of the head are on the disk.

    The last shard has the head, after `lm_head` and the vision tower.
    """
    folder.mkdir(parents=True)
    _copy_other_files(folder, skip=set())
    _write_json(folder / "config.json", base_config(dims))
    tensors = base_tensors(dims)
    shards = split(tensors, max_shard)
    for name, specs in shards.items():
        write_sparse(folder / name, specs, {"format": "pt"}, data=data)
    _write_json(folder / INDEX, index_of(shards, {"total_size": sum(spec.nbytes for spec in tensors.values())}))
    return folder


def write_quantized(
    folder: Path,
    dims: Dimensions = QWEN36_27B,
    *,
    data: bool = True,
    stale_total: bool = True,
    max_shard: int = 5_000_000_000,
) -> Path:
    """Write the model as auto-round leaves it: 19 GB, with a quantized head in a shard of its own.

    The head's data is that of the base, rounded to nearest. `total_size` does not include the head (`stale_total`),
    `video_preprocessor_config.json` is missing, and the two quantization configs name different blocks.
    """
    folder.mkdir(parents=True)
    _copy_other_files(folder, skip={VIDEO})
    tensors = quantized_tensors(dims)
    body = {name: spec for name, spec in tensors.items() if not is_head(name)}
    shards = split(body, max_shard)
    total = sum(spec.nbytes for spec in (body if stale_total else tensors).values())
    metadata = {
        "format": "safetensors",
        "total_shards": len(shards),
        "total_parameters": sum(math.prod(spec.shape) for spec in body.values()),
        "total_size": total,
    }
    shards[EXTRA] = {name: spec for name, spec in tensors.items() if is_head(name)}
    for name, specs in shards.items():
        write_sparse(folder / name, specs, None, data=data)
    _write_json(folder / INDEX, index_of(shards, metadata))
    own_file = quantization_config(dims)
    in_config = {**own_file, "block_name_to_quantize": [own_file["block_name_to_quantize"], "mtp.layers"]}
    _write_json(folder / "config.json", {**base_config(dims), "quantization_config": dict(sorted(in_config.items()))})
    _write_json(folder / "quantization_config.json", own_file)
    return folder


def base_config(dims: Dimensions = QWEN36_27B) -> dict[str, Any]:
    """Return the tiny model's config.json with these dimensions."""
    config: dict[str, Any] = json.loads((TINY / "config.json").read_text())
    rotary = int(dims.head_dim * config["text_config"]["partial_rotary_factor"]) // 2
    config["text_config"] |= {
        "head_dim": dims.head_dim,
        "hidden_size": dims.hidden,
        "intermediate_size": dims.intermediate,
        "layer_types": dims.layer_types,
        "linear_conv_kernel_dim": dims.conv_kernel,
        "linear_key_head_dim": dims.linear_head_dim,
        "linear_num_key_heads": dims.linear_key_heads,
        "linear_num_value_heads": dims.linear_value_heads,
        "linear_value_head_dim": dims.linear_head_dim,
        "max_position_embeddings": 262144,
        "mtp_num_hidden_layers": dims.mtp_layers,
        "num_attention_heads": dims.heads,
        "num_hidden_layers": dims.layers,
        "num_key_value_heads": dims.kv_heads,
        "rope_parameters": {
            **config["text_config"]["rope_parameters"],
            "mrope_section": [(rotary + 2) // 3, (rotary + 1) // 3, rotary // 3],
            "rope_theta": 10000000,
        },
        "vocab_size": dims.vocab,
    }
    config["vision_config"] |= {
        "depth": dims.vision.depth,
        "hidden_size": dims.vision.width,
        "in_channels": dims.vision.channels,
        "intermediate_size": dims.vision.intermediate,
        "num_heads": dims.vision.heads,
        "num_position_embeddings": dims.vision.positions,
        "out_hidden_size": dims.hidden,
        "patch_size": dims.vision.patch,
        "spatial_merge_size": dims.vision.merge,
        "temporal_patch_size": dims.vision.temporal,
    }
    return config


def quantization_config(dims: Dimensions = QWEN36_27B) -> dict[str, Any]:
    """Return auto-round's quantization_config.json, which does not name the head."""
    small = [
        f"model.language_model.layers.{layer}.linear_attn.{name}"
        for layer, kind in enumerate(dims.layer_types)
        for name in ("in_proj_b", "in_proj_a")
        if kind == "linear_attention"
    ]
    return {
        "bits": 4,
        "data_type": "int",
        "group_size": GROUP,
        "sym": True,
        "amp": False,
        "autoround_version": "0.16.1",
        "block_name_to_quantize": "model.language_model.layers",
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "extra_config": {module: dict(FULL_PRECISION) for module in small},
    }


def split(tensors: Specs, limit: int) -> dict[str, Specs]:
    """Distribute tensors in their order over shards `model-0000i-of-0000n.safetensors` of at most `limit` bytes."""
    groups: list[dict[str, Spec]] = [{}]
    size = 0
    for name, spec in tensors.items():
        if groups[-1] and size + spec.nbytes > limit:
            groups.append({})
            size = 0
        groups[-1][name] = spec
        size += spec.nbytes
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def write_sparse(path: Path, tensors: Specs, metadata: Mapping[str, str] | None, *, data: bool) -> None:
    """Write a safetensors file with a hole in place of the data. With `data`, tensors of the head have data."""
    tensors = dict(sorted(tensors.items(), key=lambda item: (-DTYPE_BYTES[item[1].dtype], item[1].dtype, item[0])))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets: dict[str, int] = {}
    end = 0
    for name, spec in tensors.items():
        offsets[name], end = end, end + spec.nbytes
        header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offsets[name], end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    start = 8 + len(raw)
    with path.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        stream.truncate(start + end)
        head = {name: (start + offsets[name], spec) for name, spec in tensors.items() if is_head(name)}
        if data and head:
            _fill(stream, head)
            stream.flush()
            os.fsync(stream.fileno())


def _fill(stream: BinaryIO, tensors: Mapping[str, tuple[int, Spec]]) -> None:
    """Write the tensors of the head: as BF16, or for a quantized one the same values rounded to nearest."""
    for name, (begin, spec) in tensors.items():
        module, _, part = name.rpartition(".")
        if part in {"weight", "bias"}:
            stream.seek(begin)
            for rows in _values(name, spec.shape):
                stream.write((rows.view(np.uint32) >> 16).astype("<u2").tobytes())
        elif part == "qweight":
            places = {p: tensors[f"{module}.{p}"][0] for p in ("qweight", "qzeros", "scales")}
            _fill_packed(stream, places, module, (spec.shape[1], 8 * spec.shape[0]))


def _fill_packed(stream: BinaryIO, places: Mapping[str, int], module: str, shape: Shape) -> None:
    """Quantize a matrix of shape `[out, in]` and write its parts. Rows of the matrix are columns of the parts."""
    out, into = shape
    qweight = np.empty((into // 8, out), dtype="<u4")
    scales = np.empty((into // GROUP, out), dtype="<f2")
    done = 0
    for rows in _values(f"{module}.weight", shape):
        count = len(rows)
        groups = rows.reshape(count, into // GROUP, GROUP)
        scale = (np.abs(groups).max(-1) / 7).astype(np.float16)
        codes = np.clip(np.rint(groups / scale[..., None].astype(np.float32)), -8, 7).astype(np.int8) + 8
        pairs = codes.astype(np.uint8).reshape(count, into // 2, 2)
        packed = np.ascontiguousarray(pairs[..., 0] | pairs[..., 1] << 4).view("<u4")  # lowest bits first
        qweight[:, done : done + count] = packed.T
        scales[:, done : done + count] = scale.T
        done += count
    stream.seek(places["qweight"])
    stream.write(qweight.tobytes())
    stream.seek(places["scales"])
    stream.write(scales.tobytes())
    stream.seek(places["qzeros"])
    stream.write(b"\x77" * (into // GROUP * out // 2))  # the zero point 8 is stored minus one


def _values(name: str, shape: Shape) -> Iterator[Floats]:
    """Yield the values of a tensor in pieces of ROWS_AT_A_TIME rows. They depend on the name only."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    if len(shape) == 1:
        yield random.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
        return
    for begin in range(0, shape[0], ROWS_AT_A_TIME):
        rows = random.standard_normal((min(ROWS_AT_A_TIME, shape[0] - begin), shape[1]), dtype=np.float32)
        yield rows * np.float32(shape[1] ** -0.5)


def _is_packed(name: str, spec: Spec) -> bool:
    within = name.startswith(("model.language_model.layers.", "mtp."))
    return within and len(spec.shape) == 2 and all(side % 32 == 0 for side in spec.shape)


def _layer(prefix: str, kind: str, dims: Dimensions) -> dict[str, Shape]:
    attention = _full_attention(prefix, dims) if kind == "full_attention" else _linear_attention(prefix, dims)
    return {
        **attention,
        f"{prefix}.mlp.gate_proj.weight": (dims.intermediate, dims.hidden),
        f"{prefix}.mlp.up_proj.weight": (dims.intermediate, dims.hidden),
        f"{prefix}.mlp.down_proj.weight": (dims.hidden, dims.intermediate),
        f"{prefix}.input_layernorm.weight": (dims.hidden,),
        f"{prefix}.post_attention_layernorm.weight": (dims.hidden,),
    }


def _full_attention(prefix: str, dims: Dimensions) -> dict[str, Shape]:
    width, narrow = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
    return {
        f"{prefix}.self_attn.q_proj.weight": (2 * width, dims.hidden),
        f"{prefix}.self_attn.k_proj.weight": (narrow, dims.hidden),
        f"{prefix}.self_attn.v_proj.weight": (narrow, dims.hidden),
        f"{prefix}.self_attn.o_proj.weight": (dims.hidden, width),
        f"{prefix}.self_attn.q_norm.weight": (dims.head_dim,),
        f"{prefix}.self_attn.k_norm.weight": (dims.head_dim,),
    }


def _linear_attention(prefix: str, dims: Dimensions) -> dict[str, Shape]:
    values = dims.linear_value_heads * dims.linear_head_dim
    mixed = 2 * dims.linear_key_heads * dims.linear_head_dim + values
    return {
        f"{prefix}.linear_attn.A_log": (dims.linear_value_heads,),
        f"{prefix}.linear_attn.dt_bias": (dims.linear_value_heads,),
        f"{prefix}.linear_attn.conv1d.weight": (mixed, 1, dims.conv_kernel),
        f"{prefix}.linear_attn.in_proj_a.weight": (dims.linear_value_heads, dims.hidden),
        f"{prefix}.linear_attn.in_proj_b.weight": (dims.linear_value_heads, dims.hidden),
        f"{prefix}.linear_attn.in_proj_qkv.weight": (mixed, dims.hidden),
        f"{prefix}.linear_attn.in_proj_z.weight": (values, dims.hidden),
        f"{prefix}.linear_attn.norm.weight": (dims.linear_head_dim,),
        f"{prefix}.linear_attn.out_proj.weight": (dims.hidden, values),
    }


def _head(dims: Dimensions) -> dict[str, Shape]:
    if not dims.mtp_layers:
        return {}
    shapes: dict[str, Shape] = {"mtp.fc.weight": (dims.hidden, 2 * dims.hidden)}
    for layer in range(dims.mtp_layers):
        shapes |= _layer(f"mtp.layers.{layer}", "full_attention", dims)
    norms = ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    return {**shapes, **{f"mtp.{norm}.weight": (dims.hidden,) for norm in norms}}


def _vision(vision: Vision, out: int) -> dict[str, Shape]:
    width, merged = vision.width, vision.width * vision.merge**2
    matrices: dict[str, Shape] = {
        "patch_embed.proj": (width, vision.channels, vision.temporal, vision.patch, vision.patch)
    }
    norms = ["merger.norm"]
    for block in range(vision.depth):
        prefix = f"blocks.{block}"
        matrices |= {
            f"{prefix}.attn.qkv": (3 * width, width),
            f"{prefix}.attn.proj": (width, width),
            f"{prefix}.mlp.linear_fc1": (vision.intermediate, width),
            f"{prefix}.mlp.linear_fc2": (width, vision.intermediate),
        }
        norms += [f"{prefix}.norm1", f"{prefix}.norm2"]
    matrices |= {"merger.linear_fc1": (merged, merged), "merger.linear_fc2": (out, merged)}
    shapes: dict[str, Shape] = {"model.visual.pos_embed.weight": (vision.positions, width)}
    shapes |= {f"model.visual.{name}.weight": shape for name, shape in matrices.items()}
    shapes |= {f"model.visual.{name}.bias": shape[:1] for name, shape in matrices.items()}
    return shapes | {f"model.visual.{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}


def index_of(shards: Mapping[str, Iterable[str]], metadata: Mapping[str, Any]) -> dict[str, Any]:
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    return {"metadata": dict(metadata), "weight_map": dict(sorted(weight_map.items()))}


def _copy_other_files(folder: Path, skip: set[str]) -> None:
    """Copy the tokenizer and processor files of the tiny model."""
    for path in sorted(TINY.iterdir()):
        weights = path.suffix == ".safetensors" or path.name in {"config.json", INDEX}
        if not weights and path.name not in {"README.md", *skip}:
            shutil.copyfile(path, folder / path.name)


def _write_json(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n")
