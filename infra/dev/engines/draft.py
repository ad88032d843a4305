"""Generate text with vLLM and a checkpoint's MTP head: `draft.py MODEL_DIR PROMPTS.json --tokens N`.

It runs in the interpreter that infra/dev/engines/install makes, and imports nothing of this project. vLLM runs in this
process and decodes all prompts in one call, greedily, with one draft per step or `--drafts`. The result is printed as
JSON. Draft acceptance rates measured on a CPU are valid; speeds are not.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
# Threads do not make small models faster, and while other processes run they make them ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

SKIPPED = ("not found in params", "skip", "not initialized", "nexpected", "gnoring")


def draft(
    model: Path,
    prompts: list[str],
    tokens: int,
    *,
    mtp: bool = True,
    vision: bool = False,
    dtype: str = "bfloat16",
    drafts: int = 1,
) -> dict[str, Any]:
    """Load a checkpoint and continue the prompts by `tokens` tokens each, with drafts of its MTP head if `mtp`.

    Without `vision`, vLLM builds no vision tower and needs no processor. In the result, `error` is that of vLLM if it
    does not start, and `warnings` are those of vLLM about weights.
    """
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    weight_warnings = _WeightWarnings()
    logging.getLogger("vllm").addHandler(weight_warnings)
    began = time.perf_counter()
    result: dict[str, Any] = {"model": str(model), "mtp": mtp, "error": None, "drafted": 0, "accepted": 0}
    result |= {"acceptance": None, "outputs": [], "load_seconds": None, "generate_seconds": None}
    llm = None
    try:
        llm = LLM(
            model=str(model),
            dtype=dtype,
            enforce_eager=True,
            enable_prefix_caching=False,  # needs Triton in hybrid models
            max_model_len=512,
            disable_log_stats=False,
            **({} if vision else {"limit_mm_per_prompt": {"image": 0, "video": 0}, "skip_mm_profiling": True}),
            speculative_config={"method": "mtp", "num_speculative_tokens": drafts} if mtp else None,
        )
        result["load_seconds"] = round(time.perf_counter() - began, 2)
        began = time.perf_counter()
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        answers = llm.generate(prompts, sampling, use_tqdm=False)
        result["generate_seconds"] = round(time.perf_counter() - began, 2)
        result["outputs"] = [list(answer.outputs[0].token_ids) for answer in answers]
        counted = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
        result["drafted"] = int(counted.get("vllm:spec_decode_num_draft_tokens", 0))
        result["accepted"] = int(counted.get("vllm:spec_decode_num_accepted_tokens", 0))
        if result["drafted"]:
            result["acceptance"] = round(result["accepted"] / result["drafted"], 4)
    except Exception as error:  # any error of vLLM is a result
        result["error"] = f"{type(error).__name__}: {error}"[:1000]
    finally:
        logging.getLogger("vllm").removeHandler(weight_warnings)
        del llm
        _clean_up()
    return {**result, "warnings": weight_warnings.texts}


class _WeightWarnings(logging.Handler):
    """A log handler that collects warnings about weights."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if about_weights(text) and len(self.texts) < 20:
            self.texts.append(text[:300])


def about_weights(warning: str) -> bool:
    """Check whether a warning of vLLM says that weights are missing, superfluous or skipped."""
    return any(word in warning for word in SKIPPED) and "CPU backend" not in warning


def _clean_up() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory  # type: ignore[import-not-found]

    gc.collect()
    cleanup_dist_env_and_memory()


def quiet_stdout() -> Any:
    """Redirect everything that is printed to stderr, and return a stream that writes to the real stdout."""
    real = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return real


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("prompts", type=Path, help="a JSON list of texts")
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--drafts", type=int, default=1)
    parser.add_argument("--no-mtp", action="store_true")
    parser.add_argument("--vision", action="store_true")
    arguments = parser.parse_args()
    out = quiet_stdout()
    prompts = json.loads(arguments.prompts.read_text())
    options = {"mtp": not arguments.no_mtp, "vision": arguments.vision, "dtype": arguments.dtype}
    options["drafts"] = arguments.drafts
    result = draft(arguments.model, prompts, arguments.tokens, **options)
    json.dump(result, out)
    out.write("\n")
    out.flush()
    sys.exit(1 if result["error"] else 0)


if __name__ == "__main__":
    main()
