"""What quantizing Qwen3.6-27B costs on this machine's GPU: `make bench-gpu`.

Tunes two linear-attention and two full-attention blocks of its dimensions (random weights), once through AutoRound's
own entry with the reference card's flags and once through our stage, each in a process with a compile cache of its own.
The first block is the cold start, the second the steady state; from both follows the time of the whole model. Prints a
table; the figures go to tasks/planning/gpu-figures.json, which `requant plan` reads.

    make bench-gpu                 # about 15 minutes on an H100
    make bench-gpu MINUTES=9.5     # ends before that; the same command again does what is left
    make bench-gpu SEEDS=3         # and the losses with three more orders of the samples, 8 minutes each

One order of the samples says little of the losses: they vary from run to run more than the variants differ. Over
several orders the mean of the ratio, with its standard error, shows whether one variant tunes better.
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
SEED = 42  # the recipe's
# Seconds to set aside for a piece when time is short (H100, with room to spare): from nothing, and with all compiled.
EXPECTED = {
    ("linear", "auto-round"): (450, 270),
    ("linear", "requant"): (115, 100),
    ("full", "auto-round"): (270, 210),
    ("full", "requant"): (115, 100),
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


@dataclass(frozen=True)
class Piece:
    """One kind of block, one variant, one order of the samples: a process of its own."""

    kind: str
    variant: str
    seed: int = SEED

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.variant}" + (f"-seed-{self.seed}" if self.seed != SEED else "")

    @property
    def expected(self) -> int:
        return EXPECTED[self.kind, self.variant][self.seed != SEED]

    @property
    def caches(self) -> Path:
        """What is timed finds nothing compiled; the other seeds share what they compile."""
        return FOLDER / (self.name if self.seed == SEED else f"compiled-{self.variant}")


Results = Mapping[Piece, dict[str, Any]]


def main() -> int:
    """Run what is not there yet. 0: everything is; 3: time is up, run again."""
    began, minutes = time.monotonic(), float(os.environ.get("MINUTES") or "inf")
    size = Size(**json.loads(os.environ.get("BENCH_SIZE") or "{}"))
    seeds = [SEED, *range(int(os.environ.get("SEEDS") or 0))]
    pieces = [Piece(kind, variant, seed) for seed in seeds for variant in VARIANTS for kind in LAYERS]
    for piece in pieces:
        left = 60 * minutes - (time.monotonic() - began)
        if result(piece, size) is None and piece.expected <= left:
            run(piece, size)
    results = {piece: found for piece in pieces if (found := result(piece, size))}
    if missing := [piece.name for piece in pieces if piece not in results]:
        sys.stdout.write(f"too little time left for {', '.join(missing)}: run the same command again\n")
        return 3
    figures = summary(results, size, *card()) | {"losses_by_seed": losses_by_seed(results, seeds)}
    sys.stdout.write(table(figures))
    if size == Size():
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def result(piece: Piece, size: Size) -> dict[str, Any] | None:
    path = FOLDER / piece.name / "result.json"
    done: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return done if done and done["size"] == asdict(size) else None


def run(piece: Piece, size: Size) -> None:
    """One piece, from nothing: its own process."""
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
    """The rate of bfloat16 matrix products (FLOP/s), the card's name, its bytes; zeros without a GPU."""
    done = subprocess.run([sys.executable, "-c", RATE], capture_output=True, text=True, check=False)
    if done.returncode:
        return 0.0, "cpu", 0
    rate, name, total = done.stdout.strip().splitlines()
    return float(rate), name, int(total)


def losses_by_seed(results: Results, seeds: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    """By kind and block: our final loss over AutoRound's less one for each order of samples, the mean, its error."""
    found: dict[str, list[dict[str, Any]]] = {}
    for kind in LAYERS:
        runs = [[results[Piece(kind, v, seed)]["blocks"] for v in ("requant", "auto-round")] for seed in seeds]
        for index in range(len(runs[0][0])):
            more = [ours[index]["loss_after"] / theirs[index]["loss_after"] - 1 for ours, theirs in runs]
            error = statistics.stdev(more) / len(more) ** 0.5 if len(more) > 1 else None
            found.setdefault(kind, []).append(
                {"more": [round(m, 5) for m in more], "mean": statistics.fmean(more), "standard_error": error}
            )
    return found


def summary(results: Results, size: Size, rate: float, name: str, total: int) -> dict[str, Any]:
    """The figures: per kind and variant, and the whole model's seconds: start, cold extra of each kind, every layer."""
    pieces: dict[str, dict[str, Any]] = {}
    whole: dict[str, float] = {}
    for variant in VARIANTS:
        whole[variant] = results[Piece("linear", variant)]["blocks"][0]["began"]
        for kind, layers in LAYERS.items():
            blocks = results[Piece(kind, variant)]["blocks"]
            steady = sum(b["seconds"] for b in blocks[1:]) / len(blocks[1:])
            whole[variant] += blocks[0]["seconds"] - steady + layers * steady
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
    for kind, blocks in figures["losses_by_seed"].items():
        for number, block in enumerate(blocks, 1):
            error = f" ± {block['standard_error']:.2%}" if block["standard_error"] is not None else ""
            what = f"{kind} block {number}, {len(block['more'])} orders of the samples"
            lines.append(f"{what}: requant's final loss {block['mean']:+.2%}{error} to auto-round's")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
