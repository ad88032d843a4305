"""The tiny model with its body packed, and its head and config in all the ways that people publish."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.factories.checkpoints import (
    FULL,
    NARROW,
    all_tensors,
    from_bf16,
    packed_names,
    quantization_config,
    rounded,
    write_checkpoint,
)
from tests.factories.paths import TINY

Raw = dict[str, tuple[str, tuple[int, ...], bytes]]
BODY = "model.language_model.layers"
IMAGE, VIDEO = "preprocessor_config.json", "video_preprocessor_config.json"
HEAD_LINEARS = tuple(
    f"mtp.layers.0.{name}"
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
                 "mlp.up_proj", "mlp.down_proj")
)  # fmt: skip
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "lm_head": False}


def make(
    folder: Path,
    *,
    packed: tuple[str, ...] = (),
    quantization: dict[str, Any] | None,
    body: bool = True,
    edit: Callable[[Raw, dict[str, Any]], None] | None = None,
    without: tuple[str, ...] = (),
    vision: bool = False,
) -> Path:
    """A checkpoint of the tiny model.

    `packed`: modules of the head; `body`: the decoder layers packed, as auto-round does; `edit` changes tensors and
    config at the end; `without`: files that are left out; `vision`: it is tried with the vision tower, without which
    vLLM asks for no processor and does not look at the tower's tensors.
    """
    tensors: Raw = all_tensors(TINY)
    config = json.loads((TINY / "config.json").read_text())
    for module in (*(packed_names(tensors) if body else ()), *packed):
        _, shape, data = tensors.pop(f"{module}.weight")
        parts = rounded(from_bf16(data, shape))[0]
        tensors |= {f"{module}.{part}": raw for part, raw in parts.items()}
    if quantization is not None:
        config["quantization_config"] = quantization
    if edit:
        edit(tensors, config)
    folder.mkdir(parents=True)
    for path in TINY.iterdir():
        if path.suffix != ".safetensors" and not path.name.startswith("model.") and path.name not in without:
            shutil.copyfile(path, folder / path.name)
    return write_checkpoint(folder, {"model-00001-of-00001.safetensors": tensors}, config)


def _drop(*names: str) -> Callable[[Raw, dict[str, Any]], None]:
    def edit(tensors: Raw, config: dict[str, Any]) -> None:
        for name in [n for n in tensors if n.startswith(names)]:
            del tensors[name]

    return edit


def _headless(tensors: Raw, config: dict[str, Any]) -> None:
    _drop("mtp.")(tensors, config)
    config["text_config"]["mtp_num_hidden_layers"] = 0


def _count(number: int | None) -> Callable[[Raw, dict[str, Any]], None]:
    def edit(tensors: Raw, config: dict[str, Any]) -> None:
        config["text_config"].pop("mtp_num_hidden_layers")
        if number is not None:
            config["text_config"]["mtp_num_hidden_layers"] = number

    return edit


def _second_layer(tensors: Raw, config: dict[str, Any]) -> None:
    again = {n.replace(".0.", ".1."): raw for n, raw in tensors.items() if n.startswith("mtp.layers.0.")}
    tensors |= again


def _auto_round(*blocks: str, **extra: Any) -> dict[str, Any]:
    """auto-round's config for the tiny model, with more blocks or entries."""
    return quantization_config(block_name_to_quantize=",".join((BODY, *blocks)), extra_config={**NARROW, **extra})


def _open() -> dict[str, Any]:
    """A config that lists no blocks."""
    config = quantization_config()
    del config["block_name_to_quantize"]
    return config


PLAIN_PATTERNS = {".*visual.*": FULL, ".*mtp.*": FULL, ".*in_proj_[ab]$": FULL, "lm_head": FULL}
WITH_FC = (*HEAD_LINEARS, "mtp.fc")
VARIANTS: dict[str, dict[str, Any]] = {
    "the base": {"quantization": None, "body": False},
    "the base without a matrix of the head": {
        "quantization": None, "body": False, "edit": _drop("mtp.layers.0.mlp.down_proj"),
    },
    "head as in the base": {"quantization": quantization_config()},
    "head as in the base, patterns and no block list": {"quantization": {**_open(), "extra_config": PLAIN_PATTERNS}},
    "as auto-round leaves it": {"packed": HEAD_LINEARS, "quantization": _auto_round("mtp.layers", **{"mtp.fc": FULL})},
    "fc packed, config silent": {"packed": WITH_FC, "quantization": _auto_round("mtp.layers")},
    "fc packed, config says so": {"packed": WITH_FC, "quantization": _auto_round("mtp")},
    "head plain, block list says packed": {"quantization": _auto_round("mtp.layers")},
    "head plain, no block list": {"quantization": _open()},
    "head plain, no block list, tried with vision": {"quantization": _open(), "vision": True},
    "head packed, block list says plain": {"packed": HEAD_LINEARS, "quantization": quantization_config()},
    "one of three fused parts packed": {"packed": HEAD_LINEARS[:1], "quantization": _auto_round("mtp.layers")},
    "config contradicts itself about fused parts": {
        "quantization": _auto_round(**{f"{BODY}.3.self_attn.q_proj": FULL}),
    },
    "another group size": {"quantization": quantization_config(group_size=64)},
    "no head": {"quantization": quantization_config(), "edit": _headless},
    "no head, though promised": {"quantization": quantization_config(), "edit": _drop("mtp.")},
    "a norm of the head missing": {"quantization": quantization_config(), "edit": _drop("mtp.norm")},
    "fc missing": {"quantization": quantization_config(), "edit": _drop("mtp.fc")},
    "head not counted": {"quantization": quantization_config(), "edit": _count(0)},
    "head counted nowhere": {"quantization": quantization_config(), "edit": _count(None)},
    "more layers than counted": {"quantization": quantization_config(), "edit": _second_layer},
    "packing that vLLM does not read": {"quantization": quantization_config(packing_format="auto_round:gptqmodel")},
    "packed, and no config": {"quantization": None},
    "tried with vision": {"quantization": quantization_config(), "vision": True},
    "no video processor": {"quantization": quantization_config(), "without": (VIDEO,), "vision": True},
    "no image processor": {"quantization": quantization_config(), "without": (IMAGE,), "vision": True},
    "no processors": {"quantization": quantization_config(), "without": (IMAGE, VIDEO), "vision": True},
    "gptq, head plain": {"quantization": dict(GPTQ)},
    "gptq, head packed": {"packed": WITH_FC, "quantization": dict(GPTQ)},
    "gptq, head packed and left out": {
        "packed": HEAD_LINEARS, "quantization": {**GPTQ, "dynamic": {"-:.*mtp.*": {}}},
    },
    "gptq, in order of activation": {"quantization": {**GPTQ, "desc_act": True}},
    "gptq, listed modules only": {
        "quantization": {**GPTQ, "modules_in_block_to_quantize": [["mlp.gate_proj", "mlp.up_proj"]]},
    },
}  # fmt: skip
