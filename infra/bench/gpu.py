"""What quantizing Qwen3.6-27B costs on this machine's GPU: `make bench-gpu`.

Tunes two linear-attention and two full-attention blocks of its dimensions (random weights), once through AutoRound's
own entry with the reference card's flags and once through our stage, each in a process with a compile cache of its own.
The first block is the cold start, the second the steady state; from both follows the time of the whole model. Prints a
table; the figures go to infra/gpu-figures.json, which `requant plan` reads.

    make bench-gpu                 # about 15 minutes on an H100
    make bench-gpu MINUTES=9.5     # ends before that; the same command again does what is left
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from importlib import metadata
from typing import Any

from infra.bench.gpu_piece import ROOT, Size

FIGURES = ROOT / "infra" / "gpu-figures.json"
FOLDER = ROOT / "build" / "bench-gpu"
VARIANTS = ("auto-round", "requant")
LAYERS = {"linear": 48, "full": 16}  # of Qwen3.6-27B
# Seconds to set aside for a piece when time is short (H100, with room to spare).
EXPECTED = {
    ("linear", "auto-round"): 450,
    ("linear", "requant"): 115,
    ("full", "auto-round"): 270,
    ("full", "requant"): 115,
}
TRIED = 8192  # side of the matrices that the card's rate is measured with
RATE = f"""
import time, torch
a, b = (torch.randn({TRIED}, {TRIED}, device="cuda", dtype=torch.bfloat16) for _ in range(2))
for count in (3, 20):
    torch.cuda.synchronize(); began = time.perf_counter()
    for _ in range(count): a @ b
    torch.cuda.synchronize(); spent = time.perf_counter() - began
print(count * 2 * {TRIED}**3 / spent, torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1], sep="\\n")
"""


def main() -> int:
    """Run what is not there yet. 0: everything is; 3: time is up, run again."""
    began, minutes = time.monotonic(), float(os.environ.get("MINUTES") or "inf")
    size = Size(**json.loads(os.environ.get("BENCH_SIZE") or "{}"))
    pieces = [(kind, variant) for variant in VARIANTS for kind in LAYERS]
    for piece in pieces:
        left = 60 * minutes - (time.monotonic() - began)
        if result(*piece, size) is None and EXPECTED[piece] <= left:
            run(*piece, size)
    missing = [" ".join(piece) for piece in pieces if result(*piece, size) is None]
    if missing:
        sys.stdout.write(f"too little time left for {', '.join(missing)}: run the same command again\n")
        return 3
    figures = summary({(k, v): result(k, v, size) or {} for k in LAYERS for v in VARIANTS}, size, *card())
    sys.stdout.write(table(figures))
    if size == Size():
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def result(kind: str, variant: str, size: Size) -> dict[str, Any] | None:
    path = FOLDER / f"{kind}-{variant}" / "result.json"
    done: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return done if done and done["size"] == asdict(size) else None


def run(kind: str, variant: str, size: Size) -> None:
    """One piece, from nothing: its own process, its own compile cache."""
    folder = FOLDER / f"{kind}-{variant}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}
    sys.stdout.write(f"{kind} blocks, {variant}: ")
    sys.stdout.flush()
    began = time.monotonic()
    command = [
        sys.executable,
        "-m",
        "infra.bench.gpu_piece",
        kind,
        variant,
        str(folder),
        json.dumps(asdict(size)),
        "{}",
    ]
    with (folder / "log.txt").open("w") as log:
        ended = subprocess.run(command, cwd=ROOT, env={**os.environ, **caches}, stdout=log, stderr=log, check=False)
    if ended.returncode:
        raise SystemExit(f"failed: see {folder / 'log.txt'}")
    for name in ("store", "base", "out", "inductor", "triton"):
        shutil.rmtree(folder / name, ignore_errors=True)
    sys.stdout.write(f"{time.monotonic() - began:.0f} s\n")


def card() -> tuple[float, str, int]:
    """The rate of bfloat16 matrix products (FLOP/s), the card's name, its bytes; zeros without a GPU."""
    done = subprocess.run([sys.executable, "-c", RATE], capture_output=True, text=True, check=False)
    if done.returncode:
        return 0.0, "cpu", 0
    rate, name, total = done.stdout.strip().splitlines()
    return float(rate), name, int(total)


def summary(
    results: dict[tuple[str, str], dict[str, Any]], size: Size, rate: float, name: str, total: int
) -> dict[str, Any]:
    """The figures: per kind and variant, and the whole model's seconds: start, cold extra of each kind, every layer."""
    pieces: dict[str, dict[str, Any]] = {}
    whole: dict[str, float] = {}
    for variant in VARIANTS:
        whole[variant] = results["linear", variant]["blocks"][0]["began"]
        for kind, layers in LAYERS.items():
            blocks = results[kind, variant]["blocks"]
            steady = sum(b["seconds"] for b in blocks[1:]) / len(blocks[1:])
            whole[variant] += blocks[0]["seconds"] - steady + layers * steady
            pieces.setdefault(kind, {})[variant] = {
                "cold_seconds": round(blocks[0]["seconds"], 1),
                "steady_seconds": round(steady, 1),
                "peak_gpu_bytes": results[kind, variant]["peak_gpu_bytes"],
                "losses_before": [b["loss_before"] for b in blocks],
                "losses": [b["loss_after"] for b in blocks],
                "best_iterations": [b["best_iteration"] for b in blocks],
                "output_errors": [b["output_error"] for b in blocks],
                "settings": results[kind, variant]["settings"],
            }
    floor = {k: round(size.flops(k) / rate, 1) if rate else None for k in LAYERS}
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "card": {"name": name, "bytes": total, "bf16_flops": round(rate)},
        "versions": {
            "python": platform.python_version(),
            **{n: metadata.version(n) for n in ("torch", "transformers", "auto-round")},
        },
        "model": {"size": asdict(size), "layers": LAYERS},
        "blocks": pieces,
        "floor_seconds": floor,
        "whole_seconds": {v: round(s) for v, s in whole.items()},
        "whole_floor_seconds": round(sum(LAYERS[k] * (floor[k] or 0) for k in LAYERS)) if rate else None,
        "speedup": round(whole["auto-round"] / whole["requant"], 2),
    }


def table(figures: dict[str, Any]) -> str:
    lines = [f"{figures['card']['name']}, {figures['date']}, {figures['versions']}", ""]
    head = f"{'block':8} {'variant':11} {'cold s':>8} {'steady s':>9} {'peak GB':>8} {'floor s':>8}   output errors"
    lines.append(head)
    for kind, variants in figures["blocks"].items():
        for variant, piece in variants.items():
            peak = f"{piece['peak_gpu_bytes'] / 1e9:.1f}" if piece["peak_gpu_bytes"] else "-"
            errors = ", ".join(f"{e:.3e}" for e in piece["output_errors"])
            floor = figures["floor_seconds"][kind] or "-"
            seconds = f"{piece['cold_seconds']:8} {piece['steady_seconds']:9}"
            lines.append(f"{kind:8} {variant:11} {seconds} {peak:>8} {floor:>8}   {errors}")
    whole = figures["whole_seconds"]
    lines.append("")
    lines += [f"whole model, {variant}: {whole[variant]} s" for variant in VARIANTS]
    lines.append(f"arithmetic floor: {figures['whole_floor_seconds']} s; speedup {figures['speedup']}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
