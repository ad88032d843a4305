"""Checkpoints that other people's quantizers made of `pico_llama`: see tests/corpus/makers/make.py."""

from __future__ import annotations

import json
from pathlib import Path

from tests.factories.checkpoints import raw_tensors, write_checkpoint
from tests.factories.paths import CORPUS
from tests.factories.pico import pico_llama

MAKERS = CORPUS / "makers"
KINDS = sorted(folder.name for folder in MAKERS.iterdir() if (folder / "own.safetensors").is_file())


def made_by_others(kind: str, base: Path, folder: Path) -> Path:
    """The checkpoint of a kind: its own tensors, and those of the base that it did not quantize.

    `base` is what `pico_llama` wrote.
    """
    pico_llama(folder)
    own = raw_tensors(MAKERS / kind / "own.safetensors")
    quantized = {name.rpartition(".")[0] for name in own}
    kept = {
        name: value
        for name, value in raw_tensors(base / "model.safetensors").items()
        if name.rpartition(".")[0] not in quantized
    }
    config = json.loads((MAKERS / kind / "config.json").read_text())
    return write_checkpoint(folder, {"model.safetensors": {**kept, **own}}, config, index=False)
