"""One measurement of `make bench-gpu`: one kind of block and one variant, in a process of its own.

    python -m infra.bench.gpu_piece KIND VARIANT FOLDER SIZE CHANGES    # prints nothing; writes FOLDER/result.json

SIZE and CHANGES are JSON: fields of `Size`, and settings of the recipe's section `quantize` (for auto-round only
`seed`).

The variant `auto-round` calls AutoRound with the flags of the reference card. The variant `requant` runs the stage
`quantize` with a store of its own. Both quantize the same model of two equal blocks with the same samples.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
TINY = ROOT / "infra" / "dev" / "models" / "tiny-qwen3_5-mtp"
KINDS = {
    "linear": ["linear_attention"] * 2,
    "full": ["full_attention"] * 2,
    "mixed": ["linear_attention", "full_attention"],
}


@dataclass(frozen=True)
class Size:
    """Dimensions of the model and settings of tuning. Defaults are those of Qwen3.6-27B and of the reference card."""

    hidden: int = 5120
    intermediate: int = 17408
    heads: int = 24
    kv_heads: int = 4
    head_dim: int = 256
    key_heads: int = 16
    value_heads: int = 48
    linear_dim: int = 128
    blocks: int = 2
    nsamples: int = 128
    seqlen: int = 2048
    iters: int = 200
    batch_size: int = 8

    def weights(self, kind: str) -> int:
        """Count the weights of a block's large matrices."""
        mlp = 3 * self.hidden * self.intermediate
        if kind == "full":
            return mlp + self.hidden * self.head_dim * (3 * self.heads + 2 * self.kv_heads)
        keys, values = self.key_heads * self.linear_dim, self.value_heads * self.linear_dim
        return mlp + self.hidden * (2 * keys + 3 * values)

    def flops(self, kind: str) -> float:
        """Count the operations of tuning a block: for each weight and token, 2 forward and 4 backward."""
        return 6.0 * self.weights(kind) * self.batch_size * self.seqlen * self.iters


def build_model(folder: Path, kind: str, size: Size) -> Path:
    """Save a text-only Qwen3.5 of equal blocks with the random weights that transformers gives it, unless it exists."""
    import torch
    import transformers

    if (folder / "done").exists():
        return folder
    config = json.loads((TINY / "config.json").read_text())["text_config"]
    for name in ("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"):
        config.pop(name, None)
    config |= {
        "hidden_size": size.hidden, "intermediate_size": size.intermediate, "head_dim": size.head_dim,
        "num_attention_heads": size.heads, "num_key_value_heads": size.kv_heads,
        "linear_num_key_heads": size.key_heads, "linear_num_value_heads": size.value_heads,
        "linear_key_head_dim": size.linear_dim, "linear_value_head_dim": size.linear_dim,
        "num_hidden_layers": size.blocks, "layer_types": (KINDS[kind] * size.blocks)[: size.blocks],
        "max_position_embeddings": max(4096, size.seqlen),
    }  # fmt: skip
    section = size.head_dim // 4 // 2
    config["rope_parameters"] |= {"mrope_section": [section - 2 * (section // 3), section // 3, section // 3]}
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        made = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**config), dtype=torch.bfloat16
        )
    made.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    del made
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    (folder / "done").touch()
    return folder


def auto_round(model_folder: Path, folder: Path, size: Size, seed: int = 42) -> dict[str, Any]:
    """Quantize with AutoRound and the flags of the reference card: low_gpu_mem_usage, enable_torch_compile."""
    import torch
    import transformers
    from auto_round import AutoRound

    from requant.tasks.quantizing.auto_round import TuningRun, patched, profile_patches, progress_patches
    from requant.tasks.quantizing.events import EventWriter
    from requant.tasks.quantizing.loop.profile import Profile
    from requant.tasks.quantizing.samples import SampleSource, calibration_samples
    from requant.tasks.texts.text import find_text

    report = EventWriter(folder / "events.jsonl").write
    clock = Profile(Path(os.environ["REQUANT_PROFILE"])) if os.environ.get("REQUANT_PROFILE") else None
    # The seed sets only the order of the samples, block by block as in our stage, so that losses can be compared.
    run = TuningRun(report, seed, loop=None, clock=clock)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype="auto")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    text = find_text("builtin:python").path
    assert text is not None
    source = SampleSource(name="builtin:python", paths=[text])
    with patched([*progress_patches(run), *(profile_patches(clock) if clock else [])], report):
        rounder = AutoRound(
            model,
            tokenizer,
            scheme="W4A16",
            iters=size.iters,
            seqlen=size.seqlen,
            nsamples=size.nsamples,
            dataset=calibration_samples(tokenizer, [source], size.nsamples, size.seqlen)[0],
            batch_size=size.batch_size,
            low_gpu_mem_usage=True,
            enable_torch_compile=torch.cuda.is_available(),
            device_map="cuda" if torch.cuda.is_available() else "cpu",
            seed=seed,
        )
        rounder.quantize_and_save(str(folder / "out"), format="auto_round")
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {"peak_gpu_bytes": peak, "settings": {"low_gpu_mem": True, "torch_compile": torch.cuda.is_available()}}


def requant(model_folder: Path, folder: Path, size: Size, changes: dict[str, Any]) -> dict[str, Any]:
    """Quantize with the stage `quantize`: the base is the model's files in a local store."""
    from requant.tasks.artifact import Manifest, file_of
    from requant.tasks.quantize import quantize
    from requant.tasks.quantizing.events import line_of
    from requant.tasks.recipe.loader import parse_recipe
    from requant.tasks.store import open_store
    from requant.tasks.texts.calibration import find_calibration

    store = open_store((folder / "store").as_uri())
    base = Manifest.of(file_of(model_folder, p.name) for p in sorted(model_folder.iterdir()) if p.name != "done")
    for file in base.files:
        copy = folder / "base" / file.path
        copy.parent.mkdir(exist_ok=True)
        os.link(model_folder / file.path, copy)
        store.put_blob(copy, file)
    settings = {"nsamples": size.nsamples, "seqlen": size.seqlen, "iters": size.iters, "batch_size": size.batch_size}
    asked = {"calibration": "builtin:python", **settings, **changes}  # the text that the variant auto-round uses
    recipe = parse_recipe({"base": {"repo_id": "bench/random"}, "mtp": "drop", "quantize": asked})
    calibration = find_calibration(recipe.quantize)
    with (folder / "events.jsonl").open("a") as stream:
        result = quantize(
            store, recipe, base, calibration, lambda event: print(line_of(event), file=stream, flush=True)
        )
    return {k: result.provenance.document[k] for k in ("peak_gpu_bytes", "settings", "attempts", "blocks", "seconds")}


def blocks_of(events: Path, variant: str) -> list[dict[str, Any]]:
    """List the blocks with their seconds and losses. auto-round's seconds exclude measuring the output error."""
    from requant.tasks.quantizing.events import BlockDone, BlockLoss, BlockOutput, BlockStarted, read_events

    blocks: list[dict[str, Any]] = []
    for event in read_events(events)[1]:
        match event:
            case BlockStarted():
                blocks.append({"name": event.name, "began": event.seconds})
            case BlockLoss():
                blocks[-1] |= {"loss_before": event.before, "loss_after": event.after}
                blocks[-1] |= {"best_iteration": event.iteration}
            case BlockDone() if blocks:
                seconds = event.seconds - blocks[-1]["began"] - blocks[-1].get("spent", 0)
                blocks[-1]["seconds"] = round(seconds, 3)
            case BlockOutput():
                blocks[-1] |= {"output_error": event.error, "spent": event.spent if variant == "auto-round" else 0}
    return blocks


def main(kind: str, variant: str, folder: Path, size: Size, changes: dict[str, Any]) -> None:
    """Run the measurement and write result.json."""
    started = time.time()
    folder.mkdir(parents=True, exist_ok=True)
    model = build_model(folder.parent / f"model-{kind}", kind, size)
    built = time.time()
    if variant == "auto-round":
        result = auto_round(model, folder, size, **changes)
    else:
        result = requant(model, folder, size, changes)
    result |= {"kind": kind, "variant": variant, "blocks": blocks_of(folder / "events.jsonl", variant)}
    result |= {"size": asdict(size), "built_seconds": round(built - started, 1)}
    result |= {"whole_seconds": round(time.time() - built, 1)}
    temporary = folder / "result.json.part"
    temporary.write_text(json.dumps(result, indent=1))
    temporary.rename(folder / "result.json")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Size(**json.loads(sys.argv[4])), json.loads(sys.argv[5]))
