"""Measure what quantizing Qwen3.6-27B takes on this machine's GPU: `make bench-gpu`.

Two linear-attention and two full-attention blocks of its dimensions, with random weights, are tuned by AutoRound with
the flags of the reference card and by the stage `quantize`, each in a process with a compile cache of its own. The
first block includes the cold start, the second shows the steady state; the time of the complete model is computed from
both. A table is printed, and the figures are written to tasks/planning/gpu-figures.json, which `requant plan` reads.

    make bench-gpu                 # about 15 minutes on an H100
    make bench-gpu MINUTES=9.5     # ends within this time; the same command again measures the rest
    make bench-gpu SEEDS=3         # also the losses with three more orders of the samples, 8 minutes each

Between orders of the samples, losses vary more than between the two variants. The mean over several orders, with its
standard error, shows whether one variant tunes better.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from infra.bench.gpu_piece import ROOT, Size

FIGURES = ROOT / "tasks" / "planning" / "gpu-figures.json"
FOLDER = ROOT / "build" / "bench-gpu"
VARIANTS = ("auto-round", "requant")
LAYERS = {"linear": 48, "full": 16}  # of Qwen3.6-27B
SEED = 42  # the recipe's default
# Upper bounds of the seconds that a piece takes on an H100: with an empty compile cache, and with a full one.
EXPECTED_S = {
    ("linear", "auto-round"): (450, 270),
    ("linear", "requant"): (115, 100),
    ("full", "auto-round"): (270, 210),
    ("full", "requant"): (115, 100),
}
RATE_MATRIX_SIZE = 8192
RATE = f"""
import time, torch
a, b = (torch.randn({RATE_MATRIX_SIZE}, {RATE_MATRIX_SIZE}, device="cuda", dtype=torch.bfloat16) for _ in range(2))
for count in (3, 20):
    torch.cuda.synchronize(); began = time.perf_counter()
    for _ in range(count): a @ b
    torch.cuda.synchronize(); spent = time.perf_counter() - began
print(count * 2 * {RATE_MATRIX_SIZE}**3 / spent, torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1], sep="\\n")
"""


@dataclass(frozen=True)
class Piece:
    """One measurement: a kind of block, a variant and an order of the samples. It runs in a process of its own."""

    kind: str
    variant: str
    seed: int = SEED

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.variant}" + (f"-seed-{self.seed}" if self.seed != SEED else "")

    @property
    def expected_s(self) -> int:
        return EXPECTED_S[self.kind, self.variant][self.seed != SEED]

    @property
    def caches(self) -> Path:
        """The compile caches: empty ones for the default seed, which is timed, and shared ones for the other seeds."""
        return FOLDER / (self.name if self.seed == SEED else f"compiled-{self.variant}")


Results = Mapping[Piece, dict[str, Any]]


def main() -> int:
    """Run the pieces that have no result yet. Return 0 if all have one now, 3 if time was too short."""
    began_s, minutes = time.monotonic(), float(os.environ.get("MINUTES") or "inf")
    size = Size(**json.loads(os.environ.get("BENCH_SIZE") or "{}"))
    seeds = [SEED, *range(int(os.environ.get("SEEDS") or 0))]
    pieces = [Piece(kind, variant, seed) for seed in seeds for variant in VARIANTS for kind in LAYERS]
    for piece in pieces:
        left_s = 60 * minutes - (time.monotonic() - began_s)
        if result(piece, size) is None and piece.expected_s <= left_s:
            run(piece, size)
    results = {piece: done for piece in pieces if (done := result(piece, size))}
    if missing := [piece.name for piece in pieces if piece not in results]:
        sys.stdout.write(f"too little time left for {', '.join(missing)}: run the same command again\n")
        return 3
    figures = summary(results, size, *card()) | {"losses_by_seed": losses_by_seed(results, seeds)}
    sys.stdout.write(table(figures))
    if size == Size():
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def result(piece: Piece, size: Size) -> dict[str, Any] | None:
    """Read the result of a piece; None if there is none of this size."""
    path = FOLDER / piece.name / "result.json"
    done: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return done if done and done["size"] == asdict(size) else None


def run(piece: Piece, size: Size) -> None:
    """Run a piece, and delete everything but its result and its log."""
    folder = FOLDER / piece.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    compiled = {f"{name}_CACHE_DIR": str(piece.caches / name.lower()) for name in ("TORCHINDUCTOR", "TRITON")}
    sys.stdout.write(f"{piece.kind} blocks, {piece.variant}, seed {piece.seed}: ")
    sys.stdout.flush()
    began = time.monotonic()
    words = [piece.kind, piece.variant, str(folder), json.dumps(asdict(size)), json.dumps({"seed": piece.seed})]
    command = [sys.executable, "-m", "infra.bench.gpu_piece", *words]
    with (folder / "log.txt").open("w") as log:
        ended = subprocess.run(command, cwd=ROOT, env={**os.environ, **compiled}, stdout=log, stderr=log, check=False)
    if ended.returncode:
        raise SystemExit(f"failed: see {folder / 'log.txt'}")
    for name in ("store", "base", "out", "torchinductor", "triton"):
        shutil.rmtree(folder / name, ignore_errors=True)
    sys.stdout.write(f"{time.monotonic() - began:.0f} s\n")


def card() -> tuple[float, str, int]:
    """Return the GPU's rate of BF16 matrix products in FLOP/s, its name and its bytes of memory; zeros without one."""
    done = subprocess.run([sys.executable, "-c", RATE], capture_output=True, text=True, check=False)
    if done.returncode:
        return 0.0, "cpu", 0
    rate, name, total = done.stdout.strip().splitlines()
    return float(rate), name, int(total)


def losses_by_seed(results: Results, seeds: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    """Compare final losses by kind and block: ours divided by AutoRound's, less 1, over all orders of samples."""
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for kind in LAYERS:
        runs = [[results[Piece(kind, v, seed)]["blocks"] for v in ("requant", "auto-round")] for seed in seeds]
        for index in range(len(runs[0][0])):
            differences = [ours[index]["loss_after"] / theirs[index]["loss_after"] - 1 for ours, theirs in runs]
            error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else None
            mean, rounded = statistics.fmean(differences), [round(difference, 5) for difference in differences]
            by_kind.setdefault(kind, []).append({"more": rounded, "mean": mean, "standard_error": error})
    return by_kind


def summary(results: Results, size: Size, rate: float, name: str, total: int) -> dict[str, Any]:
    """Make the figures for each kind and variant, and the seconds of the complete model.

    These are the time before the first block, the cold start of each kind, and the steady time of every layer.
    """
    pieces: dict[str, dict[str, Any]] = {}
    model_s: dict[str, float] = {}
    for variant in VARIANTS:
        model_s[variant] = results[Piece("linear", variant)]["blocks"][0]["began"]
        for kind, layers in LAYERS.items():
            blocks = results[Piece(kind, variant)]["blocks"]
            steady = sum(b["seconds"] for b in blocks[1:]) / len(blocks[1:])
            model_s[variant] += blocks[0]["seconds"] - steady + layers * steady
            pieces.setdefault(kind, {})[variant] = {
                "cold_seconds": round(blocks[0]["seconds"], 1),
                "steady_seconds": round(steady, 1),
                "peak_gpu_bytes": results[Piece(kind, variant)]["peak_gpu_bytes"],
                "losses_before": [b["loss_before"] for b in blocks],
                "losses": [b["loss_after"] for b in blocks],
                "best_iterations": [b["best_iteration"] for b in blocks],
                "output_errors": [b["output_error"] for b in blocks],
                "settings": results[Piece(kind, variant)]["settings"],
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
        "whole_seconds": {v: round(s) for v, s in model_s.items()},
        "whole_floor_seconds": round(sum(LAYERS[k] * (floor[k] or 0) for k in LAYERS)) if rate else None,
        "speedup": round(model_s["auto-round"] / model_s["requant"], 2),
    }


def table(figures: dict[str, Any]) -> str:
    """Write the figures for a terminal."""
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
    model_seconds = figures["whole_seconds"]
    lines.append("")
    lines += [f"whole model, {variant}: {model_seconds[variant]} s" for variant in VARIANTS]
    lines.append(f"arithmetic floor: {figures['whole_floor_seconds']} s; speedup {figures['speedup']}")
    for kind, blocks in figures["losses_by_seed"].items():
        for number, block in enumerate(blocks, 1):
            error = f" ± {block['standard_error']:.2%}" if block["standard_error"] is not None else ""
            what = f"{kind} block {number}, {len(block['more'])} orders of the samples"
            lines.append(f"{what}: requant's final loss {block['mean']:+.2%}{error} to auto-round's")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
