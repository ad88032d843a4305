"""The fix-up script of the reference card, written again: `python -m infra.bench.card_script FOLDER`.

It follows the steps that the card (`Qwen3.6-27B INT4 AutoRound`) describes:

1. read every tensor of the shard that auto-round writes for the head;
2. dequantize only `mtp.fc`, with the zero point as it is stored (7 for 8, so that every weight becomes one scale too
   high);
3. overwrite that shard;
4. read every tensor of every shard to compute `total_size`, and write the index.

Because of step 4, the cost depends on the size of the checkpoint. How much data is read depends on safetensors:
`get_tensor` of version 0.8 returns a view of the mapped file, of which about half the pages are loaded by page faults
and readahead. Where files cannot be mapped, everything is read. The script prints the bytes of the tensors it read.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

HEAD_SHARD = "model_extra_tensors.safetensors"
INDEX = "model.safetensors.index.json"
MODULE, PARTS = "mtp.fc", ("qweight", "qzeros", "scales")
GROUP = 128


def main(folder: Path) -> None:
    """Dequantize `mtp.fc` in `folder`, and correct `total_size`. Intermediate tensors are never freed."""
    head: dict[str, torch.Tensor] = {}
    with safe_open(folder / HEAD_SHARD, framework="pt") as shard:
        metadata = shard.metadata() or {}
        for name in shard.keys():  # noqa: SIM118
            head[name] = shard.get_tensor(name)

    qweight, qzeros, scales = (head[f"{MODULE}.{part}"] for part in PARTS)
    into, out = 8 * qweight.shape[0], qweight.shape[1]
    codes = nibbles(qweight, 1).reshape(into, out)
    zeros = nibbles(qzeros, 2).reshape(into // GROUP, out)
    grouped = codes.view(into // GROUP, GROUP, out).to(torch.float32)
    values = (grouped - zeros.unsqueeze(1).to(torch.float32)) * scales.unsqueeze(1).to(torch.float32)
    weight = values.view(into, out).t().contiguous().to(torch.bfloat16)

    for part in PARTS:
        del head[f"{MODULE}.{part}"]
    head[f"{MODULE}.weight"] = weight
    save_file(head, folder / HEAD_SHARD, metadata=metadata)

    index = json.loads((folder / INDEX).read_text())
    for part in PARTS:
        index["weight_map"].pop(f"{MODULE}.{part}", None)
    index["weight_map"][f"{MODULE}.weight"] = HEAD_SHARD
    total = 0
    for path in sorted(set(index["weight_map"].values())):
        with safe_open(folder / path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                tensor = shard.get_tensor(name)
                total += tensor.numel() * tensor.element_size()
    index["metadata"]["total_size"] = total
    (folder / INDEX).write_text(json.dumps(index, indent=2))
    sys.stdout.write(json.dumps({"tensor_bytes": total}))


def nibbles(words: torch.Tensor, axis: int) -> torch.Tensor:
    """Unpack the eight 4-bit values of each int32 word along a new axis, the lowest bits first."""
    shape = [1, 1, 1]
    shape[axis] = 8
    shifts = torch.arange(0, 32, 4, dtype=torch.int32).reshape(shape)
    return ((words.unsqueeze(axis) >> shifts) & 15).to(torch.int8)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
