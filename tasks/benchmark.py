"""benchmark: prefill and decode speed of the checkpoint in transformers, on the machine at hand.

It loads the checkpoint as a user of transformers would, with auto-round's own kernels, and so also shows that it
loads there. It says nothing about an engine's speed, and its record says so.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect import task

from tasks.artifact import Manifest
from tasks.checkpoint.writer import write_json
from tasks.errors import CheckpointError
from tasks.prefect_stage import options, say, shown
from tasks.recipe import Recipe
from tasks.stage import Made, Stage, StageResult, machine, put_files, run_stage
from tasks.store import Store, open_store
from tasks.text import EVALUATION

STAGE = Stage("benchmark", 1, tools=("transformers", "auto-round"))
RESULT = "benchmark.json"
PREFILL, DECODE = 128, 32  # tokens
REPEATS = 3
log = logging.getLogger(__name__)


def benchmark_key(recipe: Recipe, artifact: Manifest) -> str:
    return STAGE.key(
        reads={"artifact": artifact.digest},
        settings={"engine": _engine(recipe), "allow_remote_code": recipe.allow_remote_code},
    )


def benchmark(store: Store, recipe: Recipe, artifact: Manifest, say: Callable[[str], None] = log.info) -> StageResult:
    """Measure an artifact's speed; what was measured is in the artifact `benchmark.json`."""

    def work(folder: Path) -> Made:
        values: dict[str, Any] = {"engine": "none"}
        if _engine(recipe) != "none":
            store.hand_out(artifact, folder / "artifact")
            values = measure_speed(folder / "artifact", remote_code=recipe.allow_remote_code, say=say)
        files = [write_json(folder / "out", RESULT, values)]
        put_files(store, folder / "out", files)
        return Made(Manifest.of(files), {"measured": values})

    return run_stage(store, STAGE, benchmark_key(recipe, artifact), work, say)


def _engine(recipe: Recipe) -> str:
    return "torch" if recipe.benchmark.engine == "auto" else recipe.benchmark.engine


def measure_speed(folder: Path, *, remote_code: bool = False, say: Callable[[str], None] = log.info) -> dict[str, Any]:
    """Tokens per second of prompts of PREFILL tokens and of greedy decoding, batch 1, medians of REPEATS."""
    os.environ.setdefault("AR_LOG_LEVEL", "ERROR")  # auto-round, which transformers imports here, reads it then
    import torch
    import transformers

    from tasks.model import load_tokenizer, pick_device

    device = pick_device(sum(path.stat().st_size for path in folder.glob("*.safetensors")) // 2)
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=remote_code)
    auto = transformers.AutoModelForCausalLM
    if hasattr(config, "vision_config"):
        auto = transformers.AutoModelForImageTextToText
    try:
        model = auto.from_pretrained(folder, device_map=str(device), dtype="auto", trust_remote_code=remote_code)
    except (ValueError, ImportError, KeyError) as error:
        first = next(iter(str(error).splitlines()), "")
        raise CheckpointError(f"transformers cannot load the result ({type(error).__name__}: {first})") from error
    model.eval()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {machine()['cpus']} cores"
    say(f"timing {PREFILL} + {DECODE} tokens in transformers on {name}")
    ids = load_tokenizer(folder, remote_code=remote_code)(EVALUATION.read_text())["input_ids"]
    prompts = []
    for number in range(REPEATS + 1):
        prompt = torch.tensor([ids[number * PREFILL : (number + 1) * PREFILL]], device=device)
        seconds = [_seconds(device, model, prompt, new) for new in (1, 1 + DECODE)]
        decode = max(seconds[1] - seconds[0], 1e-9)
        prompts.append({"prefill": PREFILL / seconds[0], "decode": DECODE / decode, "first_token_s": seconds[0]})
    warm = prompts[1:]
    return {
        "engine": f"transformers {transformers.__version__}, batch 1, no speculative decoding, on {name}",
        "prompts": [{k: round(v, 4) for k, v in p.items()} for p in warm],
        "prefill_tokens_per_second": round(statistics.median(p["prefill"] for p in warm), 2),
        "tokens_per_second": round(statistics.median(p["decode"] for p in warm), 2),
        "acceptance": None,
    }


def _seconds(device: Any, model: Any, prompt: Any, new: int) -> float:
    """Wall time of one greedy generation of exactly `new` tokens."""
    import torch

    from tasks.model import greedy

    started = time.perf_counter()
    with torch.inference_mode():
        greedy(model, prompt, new)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def read_values(store: Store, result: StageResult) -> dict[str, Any]:
    """What a benchmark stage measured."""
    values: dict[str, Any] = json.loads(store.read_blob(result.manifest[RESULT]))
    return values


@task(**options("benchmark", hours=4))
def benchmark_task(recipe: Recipe, artifact: Manifest) -> Any:
    return shown(benchmark(open_store(), recipe, artifact, say()))
