"""Speed in transformers on this machine, which says little about the speed in an engine.

The checkpoint is loaded as a user of transformers would load it, with auto-round's kernels, and this shows that it can
be. If it cannot be loaded or run, the run fails with a sentence, and nothing is published.
"""

from __future__ import annotations

import contextlib
import logging
import os
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.errors import EngineFailed, RequantError, explain_os_error
from requant.tasks.hardware import machine
from requant.tasks.progress import progress
from requant.tasks.serving.result import BenchmarkResult, PromptResult, TokenGaps
from requant.tasks.texts.text import EVALUATION

log = logging.getLogger(__name__)

PREFILL_TOKENS, DECODE_TOKENS = 128, 32
REPEATS = 3


def measure_in_torch(folder: Path, *, remote_code: bool) -> BenchmarkResult:
    """Measure tokens per second of prompts of PREFILL_TOKENS and of decoding DECODE_TOKENS greedily, at batch size 1.

    Raises EngineFailed if transformers cannot load or run the checkpoint on this machine.
    """
    os.environ.setdefault("AR_LOG_LEVEL", "ERROR")  # auto-round reads it when transformers imports it below
    import torch
    import transformers

    from requant.tasks.validating.model import load_tokenizer, pick_device

    device = pick_device(sum(path.stat().st_size for path in folder.glob("*.safetensors")) // 2)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {machine().cpus} cores"
    log.info(f"loading {folder.name} in transformers on {name}")
    with explain_errors("load", folder, name):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=remote_code)
        auto = transformers.AutoModelForCausalLM
        if hasattr(config, "vision_config"):
            auto = transformers.AutoModelForImageTextToText
        model, info = auto.from_pretrained(
            folder, device_map=str(device), dtype="auto", trust_remote_code=remote_code, output_loading_info=True
        )
        _check_loaded(Checkpoint.open(folder), info["missing_keys"])
        model.eval()
    log.info(f"timing {PREFILL_TOKENS} + {DECODE_TOKENS} tokens in transformers")
    rows, prefill_seconds = [], []
    runs = range(REPEATS + 1)
    with explain_errors("run", folder, name), progress("benchmark", len(runs), "runs") as bar:
        ids = load_tokenizer(folder, remote_code=remote_code)(EVALUATION.read_text())["input_ids"]
        for number in runs:
            prompt = torch.tensor([ids[number * PREFILL_TOKENS : (number + 1) * PREFILL_TOKENS]], device=device)
            seconds = [_seconds(device, model, prompt, new) for new in (1, 1 + DECODE_TOKENS)]
            prefill_seconds.append(seconds[0])
            rows.append(_row(number, seconds[0], max(seconds[1] - seconds[0], 1e-9)))
            bar.advance()
    warm = rows[1:]  # the first generation is slower: libraries initialize themselves
    return BenchmarkResult(
        engine="torch",
        prompts=tuple(warm),
        tokens_per_second=round(statistics.median(row.tokens_per_second for row in warm), 2),
        prefill_tokens_per_second=round(
            statistics.median(PREFILL_TOKENS / seconds for seconds in prefill_seconds[1:]), 2
        ),
        acceptance=None,
        version=f"transformers {transformers.__version__}",
        hardware=name,
        peak_gpu_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


@contextlib.contextmanager
def explain_errors(doing: str, folder: Path, hardware: str) -> Iterator[None]:
    """Raise EngineFailed for any error of transformers, a kernel or a model's own code in the block.

    Errors for a lack of memory or disk space are raised as they are: they are not the checkpoint's fault.
    """
    try:
        yield
    except (RequantError, MemoryError):
        raise
    except Exception as error:
        no_resources = isinstance(error, OSError) and explain_os_error(error) is not None
        if no_resources or type(error).__name__ == "OutOfMemoryError":  # torch's is a RuntimeError
            raise
        first = next(iter(str(error).splitlines()), "")[:300]
        raise EngineFailed(
            f"transformers cannot {doing} {folder.name} on this machine ({hardware}; {type(error).__name__}: {first}): "
            "measure it in vllm where that is installed, or set benchmark.engine to none"
        ) from error


def _check_loaded(checkpoint: Checkpoint, missing: Iterable[str]) -> None:
    """Raise ValueError if packed matrices were not loaded: transformers fills them with random numbers and goes on."""
    modules = sorted(name.removesuffix(".weight") for name in missing if name.endswith(".weight"))
    lost = [name for name in modules if f"{name}.qweight" in checkpoint.tensors]
    if lost:
        raise ValueError(f"{len(lost)} packed matrices are left uninitialized, {lost[0]} is the first")


def _row(number: int, prefill_s: float, decode_s: float) -> PromptResult:
    return PromptResult(
        set="text",
        name=f"window {number}",
        mtp=False,
        sampling="greedy",
        concurrency=1,
        tokens=DECODE_TOKENS,
        tokens_per_second=round(DECODE_TOKENS / decode_s, 4),
        prefill_tokens_per_second=round(PREFILL_TOKENS / prefill_s, 4),
        first_token_seconds=round(prefill_s, 5),
        inter_token_seconds=TokenGaps(median=round(decode_s / DECODE_TOKENS, 6), p99=None),
        acceptance=None,
        acceptance_by_position=(),
    )


def _seconds(device: Any, model: Any, prompt: Any, new: int) -> float:
    """Measure the wall-clock time of generating exactly `new` tokens greedily."""
    import torch

    started = time.perf_counter()
    with torch.inference_mode():
        _greedy(model, prompt, new)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _greedy(model: Any, prompt: Any, new: int) -> None:
    """Generate exactly `new` tokens after `prompt` (int64, `[1, n]`) greedily."""
    model.generate(
        input_ids=prompt,
        attention_mask=prompt.new_ones(prompt.shape),
        do_sample=False,
        min_new_tokens=new,
        max_new_tokens=new,
        pad_token_id=0,
    )
