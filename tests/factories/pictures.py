"""Records to draw, and names that want to be more than text."""

from __future__ import annotations

from typing import Any

from requant.tasks.plots import Picture
from requant.tasks.plots.draw import draw
from requant.tasks.record import StageRecord
from requant.tasks.serving.result import BenchmarkResult, PromptResult, TokenGaps
from requant.tasks.validating.measured import Measured

HOSTILE = (
    "</text><script>alert(1)</script>", '"/><image href="x" onload="alert(1)"/>', "$x^{2}$ $", "\\frac{", "a\nb\tc",
    "\0\x1b[31m", "\u202egnp", "名前 🦉", "&lt;b&gt;", "]]>", "x" * 500, "", "\ud800",
)  # fmt: skip


def prompt(name: str, *, mtp: bool, speed: float = 50.0, **more: Any) -> PromptResult:
    values: dict[str, Any] = {
        "set": "card", "name": name, "mtp": mtp, "sampling": "greedy", "concurrency": 1, "tokens": 64,
        "tokens_per_second": speed, "first_token_seconds": 0.1, "inter_token_seconds": TokenGaps(),
    }  # fmt: skip
    if mtp:
        values |= {"acceptance": 0.8, "acceptance_by_position": (0.9, 0.7)}
    return PromptResult(**{**values, **more})


def benchmark(*prompts: PromptResult) -> BenchmarkResult:
    return BenchmarkResult(engine="vllm", prompts=prompts)


def model(count: int, **broken: float) -> dict[str, Any]:
    """What validate measures of a model of `count` blocks, the last of four with full attention."""
    kinds = ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(count)]
    errors = [0.01 * (1 + 0.03 * i) for i in range(count)]
    for block, error in broken.items():
        errors[int(block[1:])] = error
    names = ("linear_attn.out_proj", "mlp.down_proj")
    return {
        "blocks": [
            {"block": i, "kind": kind, "error": error, "drift": 0.02 + 0.01 * i}
            for i, (kind, error) in enumerate(zip(kinds, errors, strict=True))
        ],
        "matrices": [
            {"name": f"model.layers.{i}.{name}", "bits": 4, "slope": 1 + 0.0005 * (i % 3), "offset": 0.0, "error": 0.1}
            for i in range(count)
            for name in names
        ],
        "domains": {
            name: {
                "tokens": 8192,
                "base_perplexity": 10.0,
                "perplexity": 10.5,
                "perplexity_increase": 0.05,
                "kl_divergence": 0.05 * 2**i,
                "kl_divergence_interval": [0.04 * 2**i, 0.06 * 2**i],
                "kl_divergence_p99": 0.5,
                "kl_noise_floor": 0.001 * 2**i,
                "top1_agreement": 0.9,
            }
            for i, name in enumerate(("code", "prose", "chat"))
        },
        "mtp_acceptance_by_position": [0.871, 0.76, 0.61],
        "base_mtp_acceptance_by_position": [0.894, 0.8, 0.65],
    }


def tuned(count: int) -> list[dict[str, Any]]:
    names = [f"model.language_model.layers.{i}" for i in range(count)]
    return [{"name": n, "loss_before": 2e-5 * 4**i, "loss_after": 1e-5 * 4**i} for i, n in enumerate(names)]


def everything(count: int = 4) -> list[Picture]:
    """Every picture that there is."""
    prompts = [prompt("p", mtp=mtp, speed=50.0 + 40 * mtp) for mtp in (False, True)]
    return draw(Measured.from_json(model(count)), benchmark(*prompts), StageRecord({"blocks": tuned(count)}).blocks)
