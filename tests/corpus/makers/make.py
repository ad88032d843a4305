"""Make the checkpoints of this folder anew, with the quantizers of others, in an environment of their own.

    python -m venv build/makers
    build/makers/bin/pip install llmcompressor==0.14.0.1 auto-round==0.16.1
    PYTHONPATH=. build/makers/bin/python tests/corpus/makers/make.py [NAME ...]

llm-compressor 0.14.0.1 needs an older auto-round; `--auto-round COMMAND` names the one to run.

Every checkpoint is made of `pico_llama`. A folder keeps its config.json and the tensors that are not the base's, in one
file: tests/factories/makers.py puts them together. versions.json says what made it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tests.factories.checkpoints import raw_tensors, safetensors_bytes
from tests.factories.pico import pico_llama

HERE = Path(__file__).parent
TEXT = "The maker reads this text to see which inputs a layer has, and rounds the weights of the layer by it. " * 8
GROUPS = {"strategy": "group", "group_size": 32}
# Names of llm-compressor's schemes, or the arguments of a scheme's weights.
LLM_COMPRESSOR: dict[str, str | dict[str, Any]] = {
    "w4a16": {"num_bits": 4, "type": "int", "symmetric": True, **GROUPS},
    "w4a16-asymmetric": {"num_bits": 4, "type": "int", "symmetric": False, **GROUPS},
    "w3a16": {"num_bits": 3, "type": "int", "symmetric": True, **GROUPS},
    "w8a16-channel": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
    "w8a8": "W8A8",
    "fp8-dynamic": "FP8_DYNAMIC",
    "fp8-block": "FP8_BLOCK",
    "nvfp4": "NVFP4",
    "mxfp4a16": "MXFP4A16",
    "mxfp8a16": "MXFP8A16",
}
# Arguments of auto-round's command.
AUTO_ROUND = {
    "auto-round-nvfp4": ["--scheme", "NVFP4", "--format", "auto_round"],
    "auto-round-mxfp4": ["--scheme", "MXFP4", "--format", "auto_round"],
    "auto-round-fp8": ["--scheme", "FP8_STATIC", "--format", "auto_round"],
}


def with_llm_compressor(base: Path, out: Path, scheme: str | dict[str, Any]) -> list[str]:
    """Quantize with llm-compressor, and return the packages whose versions count."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked: dict[str, Any] = {"scheme": scheme, "targets": "Linear"}
    if isinstance(scheme, dict):
        asked = {"config_groups": {"all": QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**scheme))}}
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = Dataset.from_list([{"input_ids": tokenizer(TEXT)["input_ids"][:64], "attention_mask": [1] * 64}] * 4)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    modifier = QuantizationModifier(ignore=["lm_head"], **asked)
    oneshot(model=model, recipe=modifier, dataset=rows, num_calibration_samples=4, max_seq_length=64)
    model.save_pretrained(out, save_compressed=True)
    return ["llmcompressor", "compressed-tensors", "transformers", "torch"]


def with_auto_round(base: Path, out: Path, arguments: list[str], command: str) -> None:
    """Quantize with auto-round's command."""
    rows = out.with_name("rows.jsonl")
    rows.write_text("\n".join([json.dumps({"text": TEXT})] * 4))
    few = ["--iters", "0", "--nsamples", "2", "--seqlen", "64", "--ignore_layers", "lm_head", "--dataset", str(rows)]
    subprocess.run([command, "--model", str(base), *arguments, *few, "--output_dir", str(out)], check=True)


def keep(base: Path, made: Path, folder: Path, made_by: dict[str, Any]) -> None:
    """Keep what of a checkpoint is not the base's."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    theirs = raw_tensors(base / "model.safetensors")
    config = next(made.rglob("config.json"))
    tensors = raw_tensors(next(config.parent.glob("*.safetensors")))
    own = {name: value for name, value in tensors.items() if theirs.get(name) != value}
    (folder / "own.safetensors").write_bytes(safetensors_bytes(own))
    shutil.copyfile(config, folder / "config.json")
    (folder / "versions.json").write_text(json.dumps(made_by, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--auto-round", default="auto-round")
    arguments = parser.parse_args()
    for name in arguments.names or [*LLM_COMPRESSOR, *AUTO_ROUND]:
        with tempfile.TemporaryDirectory() as scratch:
            base, out = pico_llama(Path(scratch) / "base"), Path(scratch) / "out"
            if name in AUTO_ROUND:
                with_auto_round(base, out, AUTO_ROUND[name], arguments.auto_round)
                made_by: dict[str, Any] = {"auto-round": json.loads(next(out.rglob("config.json")).read_text())[
                    "quantization_config"].get("autoround_version"), "arguments": AUTO_ROUND[name]}  # fmt: skip
            else:
                packages = with_llm_compressor(base, out, LLM_COMPRESSOR[name])
                made_by = {package: importlib.metadata.version(package) for package in packages}
                made_by["scheme"] = LLM_COMPRESSOR[name]
            keep(base, out, HERE / name, made_by)


if __name__ == "__main__":
    main()
