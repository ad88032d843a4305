"""The process that does the work of `make run-27b`: `python -m infra.bench.whole.worker FOLDER LAYERS ITERS`.

It has a session of its own, so it goes on while nobody waits for it. If it was killed, a new one goes on where it
ended: the shards of the base, and the artifacts in the store, are not made again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from infra.bench.whole.base import REPO_ID, dimensions
from infra.bench.whole.sampler import sampling
from infra.bench.whole.table import RECORDED, measure, record_stages, write_figures
from infra.dev.hub.launch import HubStandIn
from requant.tasks import hardware
from requant.tasks.store import open_store

TEXTS = Path(__file__).parents[3] / "tasks" / "texts" / "builtin"


def recipe(layers: int, iters: int) -> dict[str, object]:
    """Return the recipe: the reference, with no limits on what random weights cannot pass."""
    small = {} if layers else {"nsamples": 8, "seqlen": 128, "batch_size": 4}
    unlimited = (
        "max_perplexity_increase", "max_kl_divergence", "min_top1_agreement", "min_mtp_acceptance_ratio",
        "max_block_error", "max_weight_slope_error", "max_weight_offset",
    )  # fmt: skip
    return {
        "base": REPO_ID,
        "quantize": {"scheme": "W4A16", "iters": iters, "calibration": "builtin:mixed", **small},
        "gates": dict.fromkeys(unlimited),
        "benchmark": {"engine": "none"},
        "publish": {"repo_id": "me/Qwen3.6-27B-int4-AutoRound", "private": True},
    }


def main(folder: Path, layers: int, iters: int) -> int:
    """Make the base, plan, run, and write the figures. Return the exit status of the run."""
    state, store_folder = folder / "hub", folder / "store"
    os.environ["REQUANT_STORE"] = store_folder.as_uri()
    base_is_made = folder / "base.made"
    if not base_is_made.exists():
        # A process of its own gives the memory of the GPU back.
        subprocess.run([sys.executable, "-m", "infra.bench.whole.base", str(state), str(layers)], check=True)
        base_is_made.touch()
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe(layers, iters), indent=1))  # JSON is YAML too.
    with HubStandIn(state) as hub:
        environment = {**os.environ, **hub.env}
        if not (folder / "plan.json").exists():  # Later, the plan would be of what is left.
            _requant(folder / "plan.json", ["plan", str(path), "--json"], environment)
        status = _requant(folder / "run.json", ["run", str(path), "--json"], environment, folder, store_folder)
    if status == 0:
        plan, run = (json.loads((folder / name).read_text()) for name in ("plan.json", "run.json"))
        stages = measure(open_store(), plan, run, folder / "samples.jsonl")
        write_figures(folder, dimensions(layers).layers, iters, stages)
        if layers and hardware.machine().gpus:
            record_stages(RECORDED, layers, iters, stages)
    (folder / "status").write_text(str(status))
    return status


def _requant(
    output: Path,
    arguments: list[str],
    environment: Mapping[str, str],
    sampled: Path | None = None,
    store: Path | None = None,
) -> int:
    """Run a command of Requant with its document in a file. Return its exit status."""
    part = output.with_suffix(".part")
    with part.open("wb") as stream:
        process = subprocess.Popen([sys.executable, "-m", "requant", *arguments], env=environment, stdout=stream)
        if sampled is not None and store is not None:
            with sampling(process.pid, store, sampled / "samples.jsonl"):
                process.wait()
        else:
            process.wait()
    part.replace(output)
    return process.returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
