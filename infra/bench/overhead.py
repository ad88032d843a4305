"""Measure what `requant run` costs over the same auto-round call in a plain script: `make bench`.

Both run ROUNDS times, in turn, on the tiny model with the settings of the demo recipe and an empty store. The table
shows where the difference comes from.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from infra.dev.hub.launch import HubStandIn
from requant.tasks.recipe.loader import load_recipe
from requant.tasks.texts.calibration import find_calibration

ROOT = Path(__file__).parent.parent.parent
MODEL = ROOT / "infra" / "dev" / "models" / "tiny-qwen3_5-mtp"
RECIPE = ROOT / "deployments" / "recipes" / "demo.yaml"
ROUNDS = 3

BARE = """
import json, sys, torch
from auto_round import AutoRound
from transformers import AutoModelForImageTextToText, AutoTokenizer
from requant.tasks.quantizing.samples import SampleSource, calibration_samples
job, out = json.loads(sys.argv[1]), sys.argv[2]
model = AutoModelForImageTextToText.from_pretrained(job["model"], dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(job["model"])
source = SampleSource(name="text", paths=[job["text"]])
samples = calibration_samples(tokenizer, [source], job["nsamples"], job["seqlen"])[0]
AutoRound(model, tokenizer, processor=tokenizer, scheme=job["scheme"], iters=job["iters"], seqlen=job["seqlen"],
          nsamples=job["nsamples"], dataset=samples, batch_size=job["batch_size"], low_gpu_mem_usage=False,
          enable_torch_compile=False, device_map="cpu", seed=job["seed"],
          layer_config={"mtp": {"bits": 16, "data_type": "fp"}}).quantize_and_save(out, format=job["format"])
"""


def main() -> None:
    """Print a table of medians, and write all figures to build/bench-overhead.json."""
    recipe = load_recipe(RECIPE)
    (source,) = find_calibration(recipe.quantize).sources
    job = {**recipe.quantize.model_dump(), "model": str(MODEL), "text": str(source.text.path)}
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, HubStandIn(Path(folder) / "hub") as hub:
        hub.seed("demo/tiny-qwen3_5-mtp", MODEL)
        for number in range(ROUNDS):
            scratch = Path(folder) / str(number)
            bare = timed([sys.executable, "-c", BARE, json.dumps(job), str(scratch / "bare")], {})[0]
            environment = {**hub.env, "REQUANT_STORE": (scratch / "store").as_uri()}
            command = [sys.executable, "-m", "requant", "run", str(RECIPE), "--json", "--set", "publish=null"]
            total, output = timed(command, environment)
            stages = {stage["name"]: stage["seconds"] for stage in json.loads(output)["stages"]}
            rounds.append({"bare": bare, "run": total, **stages})
            sys.stderr.write(f"round {number + 1}: bare {bare:.1f} s, requant run {total:.1f} s\n")
    medians = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    stages_only = sum(medians[s] for s in ("download", "quantize", "mtp_fix", "validate", "benchmark"))
    rows = [
        ("the bare auto-round script", medians["bare"]),
        ("requant run", medians["run"]),
        ("  start: Python, embedded Prefect, reports", medians["run"] - stages_only),
        ("  download", medians["download"]),
        ("  quantize over the bare script", medians["quantize"] - medians["bare"]),
        ("  mtp_fix", medians["mtp_fix"]),
        ("  validate", medians["validate"]),
        ("  benchmark", medians["benchmark"]),
    ]
    sys.stdout.write("\n".join(f"{name:46} {seconds:7.2f} s" for name, seconds in rows) + "\n")
    out = ROOT / "build" / "bench-overhead.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"rounds": rounds, "medians": medians}, indent=1))


def timed(command: list[str], environment: dict[str, str]) -> tuple[float, str]:
    """Run a command that must succeed, and return its wall-clock seconds and its stdout."""
    started = time.perf_counter()
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, check=True, text=True, capture_output=True
    )
    return time.perf_counter() - started, done.stdout


if __name__ == "__main__":
    main()
