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


def modelopt(**more: Any) -> Changes:
    return {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"], **more}


SOUND: dict[str, Changes] = {
    "auto-round": auto_round(),
    "gptq": gptq(),
    "awq": awq(),
    "compressed-tensors": compressed([]),
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "modelopt": modelopt(),
    "modelopt_mixed": modelopt(quant_algo="MIXED_PRECISION", quantized_layers={"lm_head": {"quant_algo": "FP8"}}),
    "modelopt, own file": {
        "producer": {"name": "modelopt"},
        "quantization": {
            "quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"],
        },
    },
    "mxfp8": {"quant_method": "mxfp8", "ignored_layers": []},
    "quark": {"quant_method": "quark", "export": {"kv_cache_group": []}, "exclude": ["lm_head"]},
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "mlx": {"group_size": 32, "bits": 4},
    "not known to anybody": {"quant_method": "my-own", "bits": 4},
}  # fmt: skip
