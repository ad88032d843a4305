"""Measure what `requant validate` costs for models of several sizes: `python -m infra.bench.proof [SIZE ...]`.

Bases of 2, 20 and 200 million parameters get random weights and are quantized by rounding. Each pair is measured in a
process of its own: wall-clock time, peak memory, and the time of each gate's measurement.
"""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from infra.bench.shapes import (
    INDEX,
    Dimensions,
    Vision,
    base_config,
    base_tensors,
    is_head,
    packed_parts,
    quantization_config,
)
from requant.tasks.checkpoint.packing import PackingScheme, pack

ROOT = Path(__file__).parent.parent.parent
SMALL = Vision(depth=2, width=64, intermediate=128, heads=2, positions=64)
HEADS = {"heads": 2, "kv_heads": 2, "head_dim": 64, "linear_key_heads": 2, "linear_value_heads": 2, "vocab": 2048}
SIZES = {
    "2M": Dimensions(layers=4, hidden=128, intermediate=384, linear_head_dim=64, vision=SMALL, **HEADS),
    "20M": Dimensions(layers=8, hidden=384, intermediate=1536, vision=SMALL, **{**HEADS, "heads": 6}),
    "200M": Dimensions(
        layers=16, hidden=1024, intermediate=3072, vision=SMALL,
        **{**HEADS, "heads": 8, "head_dim": 128, "linear_key_heads": 8, "linear_value_heads": 8},
    ),
    "1B": Dimensions(
        layers=8, hidden=3072, intermediate=8192, vision=SMALL,
        **{**HEADS, "heads": 16, "head_dim": 256, "linear_key_heads": 16, "linear_value_heads": 32},
    ),
}  # fmt: skip
# The functions that are timed, and the gates that they measure for.
PARTS = {
    "requant.tasks.validate.account": "structure, lossless, finite, files, context",
    "requant.tasks.checkpoint.weight_error.fidelity": "weight_slope, weight_offset",
    "requant.tasks.validating.measure.run_blocks": "all that needs hidden states, long_context",
    "requant.tasks.validating.measure._next_tokens": "perplexity_increase, top1_agreement",
    "requant.tasks.validating.head.MtpHead.drafts": "mtp_acceptance_ratio",
    "requant.tasks.validating.measure._continuations": "most_repeated_token, speculative_decoding",
    "requant.tasks.validating.measure.features": "vision_output",
    "requant.tasks.validating.compare._block_errors": "block_error",
    "requant.tasks.validating.compare.kl_divergence": "kl_divergence",
}


def main(sizes: list[str]) -> None:
    """Print a table, and write all figures to build/bench-proof.json."""
    figures = {}
    for size in sizes:
        with tempfile.TemporaryDirectory() as scratch:
            base, ours = write_pair(Path(scratch), SIZES[size])
            command = [sys.executable, "-m", "infra.bench.proof", "--measure", str(ours), str(base)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        figures[size] = json.loads(done.stdout.splitlines()[-1])
        sys.stdout.write(table(size, figures[size]))
        sys.stdout.flush()
    (ROOT / "build").mkdir(exist_ok=True)
    (ROOT / "build" / "bench-proof.json").write_text(json.dumps(figures, indent=1) + "\n")


def write_pair(folder: Path, dims: Dimensions) -> tuple[Path, Path]:
    """Write a base with random weights, and the same with quantized blocks: W4A16, group size 128."""
    from infra.bench.shapes import _copy_other_files  # with the tokenizer of the tiny model

    base, ours = folder / "base", folder / "ours"
    random = torch.Generator().manual_seed(0)
    tensors = {
        name: (torch.randn(spec.shape, generator=random) * _spread(spec.shape)).bfloat16()
        for name, spec in base_tensors(dims).items()
    }
    config = base_config(dims)
    packed: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        module = name.removesuffix(".weight")
        within = ".layers." in name and not is_head(name) and value.dim() == 2
        if within and all(side % 32 == 0 for side in value.shape) and value.shape[1] % 128 == 0:
            parts = pack([value.float().numpy()], (value.shape[0], value.shape[1]), PackingScheme(4, 128))
            assert parts.keys() == {n.rpartition(".")[2] for n in packed_parts(module, tuple(value.shape))}
            packed |= {f"{module}.{part}": torch.from_numpy(array) for part, array in parts.items()}
        else:
            packed[name] = value
    quantized = {**config, "quantization_config": quantization_config(dims)}
    for path, weights, document in ((base, tensors, config), (ours, packed, quantized)):
        path.mkdir()
        _copy_other_files(path, skip=set())
        shard = "model-00001-of-00001.safetensors"
        save_file(weights, path / shard)
        total = sum(t.nbytes for t in weights.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(weights, shard)}
        (path / INDEX).write_text(json.dumps(index))
        (path / "config.json").write_text(json.dumps(document))
    return base, ours


def _spread(shape: tuple[int, ...]) -> float:
    return 0.02 if len(shape) == 1 else shape[-1] ** -0.5


def measure(ours: Path, base: Path) -> dict[str, Any]:
    """Validate a pair in this process, and return seconds, in all and of each function in PARTS, and peak memory."""
    import importlib

    from requant.tasks import validate
    from requant.tasks.checkpoint.checkpoint import Checkpoint
    from requant.tasks.validating import compare  # noqa: F401  functions of it are timed
    from requant.tasks.validating import measure as measuring

    spent: dict[str, float] = defaultdict(float)
    for path, gates in PARTS.items():
        owner, _, name = path.rpartition(".")
        module, _, kind = owner.rpartition(".") if owner.endswith("MtpHead") else (owner, "", "")
        place: Any = importlib.import_module(module)
        place = getattr(place, kind) if kind else place
        setattr(place, name, _timed(getattr(place, name), spent, gates))
    before = peak_bytes()
    began = time.monotonic()
    measured = validate.validate_folders(ours, base)
    settings = measuring.run_settings(base)
    peak = peak_bytes()
    return {
        "seconds": round(time.monotonic() - began, 2),
        "device": str(settings.device),
        "dtype": str(settings.dtype),
        "parameters": sum(math.prod(t.shape) for t in Checkpoint.open(base).tensors.values()),
        "peak_bytes": peak,
        "imports_bytes": before,
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if settings.device.type == "cuda" else None,
        "parts": {gates: round(seconds, 2) for gates, seconds in spent.items()},
        "perplexity_increase": measured.behaviour.perplexity_increase,
        "long_context_tokens": measured.behaviour.long_context_tokens,
    }


def peak_bytes() -> int:
    """Return the peak memory of this process. getrusage would include that of its parent."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def _timed(function: Callable[..., Any], spent: dict[str, float], name: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.monotonic()
        try:
            return function(*args, **kwargs)
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            spent[name] += time.monotonic() - began

    return timed


def table(size: str, figures: dict[str, Any]) -> str:
    peak = f"{figures['peak_bytes'] / 1e6:.0f} MB ({figures['imports_bytes'] / 1e6:.0f} MB of them imports)"
    if figures["peak_gpu_bytes"]:
        peak += f", GPU {figures['peak_gpu_bytes'] / 1e9:.2f} GB"
    where = f"{figures['device']}, {figures['dtype'].removeprefix('torch.')}"
    lines = [f"{size}: {figures['parameters'] / 1e6:.1f} M parameters, {where}: {figures['seconds']} s, {peak}"]
    lines += [f"  {seconds:8.2f} s  {gates}" for gates, seconds in figures["parts"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(Path(sys.argv[2]), Path(sys.argv[3]))))
    else:
        main(sys.argv[1:] or ["2M", "20M", "200M"])
