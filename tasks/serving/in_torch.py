"""Speed in transformers, on the machine at hand: no engine's figure.

It loads the checkpoint as a user of transformers would, with auto-round's own kernels, and so also shows that it
loads there.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.errors import CheckpointError
from tasks.stage import machine
from tasks.text import EVALUATION

PREFILL, DECODE = 128, 32  # tokens
REPEATS = 3


def measure_in_torch(folder: Path, *, remote_code: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Tokens per second of prompts of PREFILL tokens and of greedy decoding, batch 1; their medians at the top."""
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
    rows = []
    for number in range(REPEATS + 1):
        prompt = torch.tensor([ids[number * PREFILL : (number + 1) * PREFILL]], device=device)
        seconds = [_seconds(device, model, prompt, new) for new in (1, 1 + DECODE)]
        rows.append(_row(number, seconds[0], max(seconds[1] - seconds[0], 1e-9)))
    warm = rows[1:]
    return {
        "version": f"transformers {transformers.__version__}",
        "hardware": name,
        "tokens_per_second": round(statistics.median(row["tokens_per_second"] for row in warm), 2),
        "prefill_tokens_per_second": round(statistics.median(row["prefill_tokens_per_second"] for row in warm), 2),
        "acceptance": None,
        "prompts": warm,
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def _row(number: int, first: float, decode: float) -> dict[str, Any]:
    return {
        "set": "text",
        "name": f"window {number}",
        "mtp": False,
        "sampling": "greedy",
        "concurrency": 1,
        "tokens": DECODE,
        "tokens_per_second": round(DECODE / decode, 4),
        "prefill_tokens_per_second": round(PREFILL / first, 4),
        "first_token_seconds": round(first, 5),
        "inter_token_seconds": {"median": round(decode / DECODE, 6), "p99": None},
        "acceptance": None,
        "acceptance_by_position": [],
    }


def _seconds(device: Any, model: Any, prompt: Any, new: int) -> float:
    """Wall time of one greedy generation of exactly `new` tokens."""
    import torch

    started = time.perf_counter()
    with torch.inference_mode():
        _greedy(model, prompt, new)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _greedy(model: Any, prompt: Any, new: int) -> None:
    """Exactly `new` tokens after `prompt` (int64 `[1, n]`), greedy, never ending early."""
    model.generate(
        input_ids=prompt,
        attention_mask=prompt.new_ones(prompt.shape),
        do_sample=False,
        min_new_tokens=new,
        max_new_tokens=new,
        pad_token_id=0,
    )
