"""Says from headers and config alone what a checkpoint is: quantized how, with which head, loaded by whom."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from tasks.checkpoint.assemble import QUANTIZATION, configs_agree, packed_parts
from tasks.checkpoint.checkpoint import Checkpoint
from tasks.checkpoint.engines import verdicts
from tasks.checkpoint.mtp import layer_count


def inspect_checkpoint(folder: Path) -> dict[str, Any]:
    """The document of `requant inspect --json`. Raises CheckpointError if the folder is no checkpoint."""
    checkpoint = Checkpoint.open(folder)
    quantization = checkpoint.config.get("quantization_config")
    quantization = quantization if isinstance(quantization, dict) else {}
    packed = packed_parts(checkpoint.tensors.values())
    head = checkpoint.head
    problems = list(checkpoint.problems)
    if quantization and not configs_agree(checkpoint):
        problems.append(f"{QUANTIZATION} and config.json disagree about the quantization")
    promised = layer_count(checkpoint.text_config)
    if promised and head is None:
        problems.append(f"config.json promises {promised} MTP layers, and there are no tensors of a head")
    dtypes = sorted({checkpoint.tensors[name].dtype for name in (head.names if head else ())})
    return {
        "tensors": len(checkpoint.tensors),
        "bytes": checkpoint.nbytes,
        "dtypes": dict(Counter(t.dtype for t in checkpoint.tensors.values()).most_common()),
        "quantized": {
            "count": len(packed),
            "bits": quantization.get("bits"),
            "group_size": quantization.get("group_size"),
        },
        "mtp": {
            "present": head is not None,
            "layout": head.layout if head else None,
            "layers": promised if head else 0,
            "precision": "+".join(dtypes) if dtypes else None,
        },
        "engines": verdicts(checkpoint),
        "problems": problems,
    }


def as_text(name: str, result: dict[str, Any]) -> str:
    """The same for a person."""
    quantized, mtp = result["quantized"], result["mtp"]
    lines = [f"{name}: {result['tensors']:,} tensors, {result['bytes']:,} bytes"]
    if quantized["count"]:
        lines.append(
            f"quantized     {quantized['count']} matrices, {quantized['bits']} bits, group {quantized['group_size']}"
        )
    else:
        lines.append("quantized     nothing")
    head = f"{mtp['layers']} layers, {mtp['layout']}, {mtp['precision']}" if mtp["present"] else "none"
    lines.append(f"MTP head      {head}")
    for engine, verdict in result["engines"].items():
        words = (
            f"{'loads' if verdict['loads'] else 'does not load'}, {'drafts' if verdict['mtp'] else 'does not draft'}"
        )
        lines.append(f"{engine:13} {words}: {verdict['reason']}")
    lines += [f"problem       {problem}" for problem in result["problems"]] or ["problems      none"]
    return "\n".join(lines)
