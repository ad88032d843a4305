"""FP8 bases, made of BF16 ones without torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from requant.tasks.checkpoint.fp8 import values_of
from requant.tasks.checkpoint.header import read_header
from requant.tasks.checkpoint.packing import to_numpy
from tests.factories.checkpoints import safetensors_bytes

ROUTERS = ("mlp.gate.", "shared_expert_gate.")


def as_fp8(
    base: Path, folder: Path, *, scales: str = "blocks", head: bool = True, block: int = 32, kept: tuple[str, ...] = ()
) -> Path:
    """An FP8 base made of a BF16 one: every decoder layer's matrices but `kept` ones (parts of names), as Qwen's
    `-FP8` models have them, fused experts too. `scales`: `blocks` of `block` x `block`, or one a `tensor` (no fused
    experts then). `head`: the MTP head's too."""
    shutil.copytree(base, folder)
    codes = values_of("F8_E4M3")[:127]  # the positive ones, in order
    weight_map: dict[str, str] = {}
    total = 0
    left_alone = ("norm", "conv1d", "in_proj_a", "in_proj_b", "A_log", "dt_bias", "visual", "mtp.fc", *ROUTERS, *kept)
    skipped: list[str] = []
    for shard in sorted(folder.glob("*.safetensors")):
        entries: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
        for name, tensor in read_header(shard).items():
            entries[name] = (tensor.dtype, tensor.shape, tensor.read())
            wanted = ".layers." in name and len(tensor.shape) in {2, 3} and (head or not name.startswith("mtp."))
            if not wanted or any(part in name for part in left_alone):
                if name.endswith(".weight") and len(tensor.shape) == 2:
                    skipped.append(name.removesuffix(".weight"))
                continue
            weight = to_numpy(tensor)
            *experts, rows, columns = weight.shape
            high, wide = (block, block) if scales == "blocks" else (rows, columns)
            blocks = weight.reshape(*experts, rows // high, high, columns // wide, wide)
            scale = np.abs(blocks).max((-3, -1)).astype(np.float32) / 448
            near = np.abs(blocks / scale[..., :, None, :, None]).reshape(weight.shape)
            at = np.clip(np.searchsorted(codes, near), 1, 126)
            at = np.where(near - codes[at - 1] < codes[at] - near, at - 1, at).astype(np.uint8)
            at |= (np.signbit(weight).astype(np.uint8)) << 7
            entries[name] = ("F8_E4M3", tensor.shape, at.tobytes())
            shape: tuple[int, ...] = scale.shape if scales == "blocks" else ()
            entries[f"{name}_scale_inv"] = ("F32", shape, scale.tobytes())
        shard.write_bytes(safetensors_bytes(entries))
        weight_map |= dict.fromkeys(entries, shard.name)
        total += sum(len(raw) for _, _, raw in entries.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "modules_to_not_convert": skipped,
        "weight_block_size": [block, block] if scales == "blocks" else None,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder
