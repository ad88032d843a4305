"""Speed in transformers, on the machine at hand: no engine's figure.

It loads the checkpoint as a user of transformers would, with auto-round's own kernels, and so also shows that it
loads there. Whatever keeps it from loading or running is one sentence, and the end of the run: nothing is published.
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
from requant.tasks.texts.text import EVALUATION

log = logging.getLogger(__name__)

PREFILL, DECODE = 128, 32  # tokens
REPEATS = 3


def measure_in_torch(folder: Path, *, remote_code: bool) -> dict[str, Any]:
    """Tokens per second of prompts of PREFILL tokens and of greedy decoding, batch 1; their medians at the top.

    Raises EngineFailed where transformers cannot load or run the checkpoint here.
    """
    os.environ.setdefault("AR_LOG_LEVEL", "ERROR")  # auto-round, which transformers imports here, reads it then
    import torch
    import transformers

    from requant.tasks.validating.model import load_tokenizer, pick_device

    device = pick_device(sum(path.stat().st_size for path in folder.glob("*.safetensors")) // 2)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {machine()['cpus']} cores"
    with as_sentences("load", folder, name):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=remote_code)
        auto = transformers.AutoModelForCausalLM
        if hasattr(config, "vision_config"):
            auto = transformers.AutoModelForImageTextToText
        model, info = auto.from_pretrained(
            folder, device_map=str(device), dtype="auto", trust_remote_code=remote_code, output_loading_info=True
        )
        _check_loaded(Checkpoint.open(folder), info["missing_keys"])
        model.eval()
    log.info(f"timing {PREFILL} + {DECODE} tokens in transformers on {name}")
    rows = []
    with as_sentences("run", folder, name):
        ids = load_tokenizer(folder, remote_code=remote_code)(EVALUATION.read_text())["input_ids"]
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


@contextlib.contextmanager
def as_sentences(doing: str, folder: Path, hardware: str) -> Iterator[None]:
    """Raise EngineFailed for whatever transformers, a kernel or a model's own code raises inside. What the machine runs
    out of is no fault of the checkpoint, and raised as it is."""
    try:
        yield
    except (RequantError, MemoryError):
        raise
    except Exception as error:
        short_of = isinstance(error, OSError) and explain_os_error(error) is not None
        if short_of or type(error).__name__ == "OutOfMemoryError":  # torch's own is a RuntimeError
            raise
        first = next(iter(str(error).splitlines()), "")[:300]
        raise EngineFailed(
            f"transformers cannot {doing} {folder.name} on this machine ({hardware}; {type(error).__name__}: {first}): "
            "measure it in vllm where that is installed, or set benchmark.engine to none"
        ) from error


def _check_loaded(checkpoint: Checkpoint, missing: Iterable[str]) -> None:
    """Raises ValueError if packed matrices did not arrive: transformers fills them with random numbers, and goes on."""
    modules = sorted(name.removesuffix(".weight") for name in missing if name.endswith(".weight"))
    lost = [name for name in modules if f"{name}.qweight" in checkpoint.tensors]
    if lost:
        raise ValueError(f"{len(lost)} packed matrices are left uninitialized, {lost[0]} is the first")


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
