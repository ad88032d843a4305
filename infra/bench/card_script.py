"""The fix-up script of the reference card, done again: `python -m infra.bench.card_script FOLDER`.

A reconstruction from the steps that the card (`Qwen3.6-27B INT4 AutoRound`) describes and shows, in words of our own:

1. read every tensor of the shard that auto-round writes for the head;
2. dequantize `mtp.fc` and nothing else, with the stored zero point as it is (7 for 8: every weight comes out one
   scale too high);
3. save that shard over the old one, where it lies;
4. for `total_size`, get every tensor of every shard, one after the other; write the index.

Step 4 is what makes its cost follow the checkpoint. How much data it moves is up to safetensors: `get_tensor` of 0.8
hands out a view of the mapped file, whose pages come in by faults and readahead, about half of them; versions and
file systems that cannot map files read all. Prints the bytes of the tensors that it got.
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
    """Give `folder` a plain `mtp.fc`, and its index the true total_size. Every intermediate lives to the end."""
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
    """The eight values of each int32 word along a new axis, lowest bits first."""
    shape = [1, 1, 1]
    shape[axis] = 8
    shifts = torch.arange(0, 32, 4, dtype=torch.int32).reshape(shape)
    return ((words.unsqueeze(axis) >> shifts) & 15).to(torch.int8)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
