"""Quantization configs of every method that has rules, sound and with changes."""

from __future__ import annotations

from typing import Any

Changes = dict[str, Any]
ENDLESS = "(?R)"  # calls itself: the regex module is not brought down by the usual repeats of repeats


def auto_round(**more: Any) -> Changes:
    return {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True, **more}


def gptq(**more: Any) -> Changes:
    return {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False, **more}


def awq(**more: Any) -> Changes:
    return {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, **more}


def compressed(ignore: Any, *targets: str) -> Changes:
    weights = {"num_bits": 4, "group_size": 128, "symmetric": True, "strategy": "group", "type": "int"}
    groups = {"group_0": {"targets": list(targets or ("Linear",)), "weights": weights}}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups, "ignore": ignore,
    }  # fmt: skip


SOUND: dict[str, Changes] = {
    "auto-round": auto_round(),
    "gptq": gptq(),
    "awq": awq(),
    "compressed-tensors": compressed([]),
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
}
