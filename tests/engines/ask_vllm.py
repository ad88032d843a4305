"""ask_vllm.py CASES.json: what vLLM's own config classes say to generated configs: {answers, tables} as JSON.

Runs in vLLM's interpreter and imports nothing of this project. A case is {method, config, architecture, draft, layers,
tensors}; its answer is one per layer: "plain", [bits, group_size, sym], or {"error": ...}; or one error for all.
The tables are those of each architecture and each draft's: renamed prefixes and fused layers.
Replaced are only the classes that build kernels (they need a GPU): they hand back the config they are given.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

LAYERS = "vllm.model_executor.layers"
QUANTIZATION = f"{LAYERS}.quantization"


class Made:
    """Stands for a quantized layer's method."""

    input_dtype = None

    def __init__(self, bits: Any, group_size: Any, sym: Any) -> None:
        self.values = [bits, list(group_size) if isinstance(group_size, tuple) else group_size, sym]

    @classmethod
    def of_config(cls, config: Any, *_: Any) -> Made:
        return cls(
            config.weight_bits, config.group_size, getattr(config, "is_sym", not getattr(config, "zero_point", 0))
        )

    @classmethod
    def of_arguments(cls, weights: Any, *_: Any) -> Made:
        return cls(weights.num_bits, weights.group_size, weights.symmetric)

    @staticmethod
    def get_min_capability() -> int:
        return 0


class Unquantized:
    def __init__(self, *_: Any) -> None:
        pass


def replace_kernels() -> None:
    """Put `Made` in the place of what would look for a kernel."""
    module = importlib.import_module

    def resolve(config: Any) -> Any:
        made = Made(config.bits, config.group_size, config.sym)
        return SimpleNamespace(get_linear_method=lambda *_: made, get_moe_method=lambda *_: made)

    module(f"{QUANTIZATION}.inc.schemes.factory").resolve_scheme = resolve
    for name, linear, experts in (
        ("auto_gptq", "AutoGPTQLinearMethod", "AutoGPTQMoEMethod"),
        ("auto_awq", "AutoAWQMarlinLinearMethod", "AutoAWQMoEMethod"),
    ):
        place = module(f"{QUANTIZATION}.{name}")
        setattr(place, linear, Made.of_config)
        setattr(place, experts, Made.of_config)
        place.check_moe_marlin_supports_layer = lambda *_, **__: True
        place.get_marlin_input_dtype = lambda *_: None
        place.UnquantizedFusedMoEMethod = Unquantized
    fp8 = module(f"{QUANTIZATION}.fp8")
    fp8.Fp8LinearMethod = fp8.Fp8MoEMethod = lambda *_: Made(8, None, True)
    fp8.get_marlin_input_dtype = lambda *_: None
    compressed = module(f"{QUANTIZATION}.compressed_tensors.compressed_tensors")
    compressed.CompressedTensorsConfig._get_scheme_from_parts = lambda self, weight_quant, **_: Made.of_arguments(
        weight_quant
    )
    experts = module(f"{QUANTIZATION}.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe")
    module(
        f"{QUANTIZATION}.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_wna16"
    ).CompressedTensorsWNA16MoEMethod = Made.of_arguments
    replace_modelopt(fp8)
    quark = module(f"{QUANTIZATION}.quark.quark")
    quark.QuarkConfig.get_scheme_cls = lambda *_: (None, None, object)
    quark.QuarkConfig.init_scheme = lambda *_, **__: Made(None, None, True)
    quark.QuarkMoEMethod.get_moe_method_target = lambda *_: (None, None, quark.QuarkMoEMethod)
    quark.QuarkMoEMethod.get_moe_method = lambda *_, **__: Made(None, None, True)
    quark.UnquantizedFusedMoEMethod = Unquantized
    for place in (experts, fp8, module(f"{QUANTIZATION}.inc.inc"), module(f"{QUANTIZATION}.utils.gptq_utils")):
        place.UnquantizedFusedMoEMethod = Unquantized


class MadeExperts(Made):
    """Stands for the method of ModelOpt's experts."""

    def __init__(self, quant_config: Any, moe_config: Any = None) -> None:
        super().__init__(4 if "NVFP4" in quant_config.quant_method else 8, None, True)


def replace_modelopt(fp8: Any) -> None:
    """Put `Made` in the place of ModelOpt's methods, which read sizes of the layer."""
    place = importlib.import_module(f"{QUANTIZATION}.modelopt")
    place.build_linear_method = lambda config, algo, prefix: Made(4 if "NVFP4" in algo else 8, None, True)
    for name in ("ModelOptFp8MoEMethod", "ModelOptNvFp4FusedMoE", "ModelOptMxFp8FusedMoE"):
        setattr(place, name, MadeExperts)
    place.Fp8MoEMethod = fp8.Fp8MoEMethod
    for config in (place.ModelOptFp8Config, place.ModelOptNvFp4Config, place.ModelOptMxFp8Config):
        config.FusedMoEMethodCls = MadeExperts


def method_of(config: dict[str, Any], quantization: Any) -> str:
    """The method that vLLM picks for a config, which it changes: as ModelConfig._verify_quantization does."""
    convertor = importlib.import_module("vllm.transformers_utils.model_arch_config_convertor")
    normalize = convertor.ModelArchConfigConvertorBase._normalize_quantization_config
    normalize(None, SimpleNamespace(quantization_config=config))
    for name in quantization.QUANTIZATION_METHODS:
        model = SimpleNamespace(model_type="qwen3_5")
        chosen = quantization.get_quantization_config(name).override_quantization_method(config, None, hf_config=model)
        if chosen is not None:
            return chosen
    return config["quant_method"]


def stub(kind: str, cls: str) -> Any:
    """A layer without weights, of the class that vLLM would build."""
    linear = importlib.import_module(f"{LAYERS}.linear")
    if cls == "FusedMoE":  # the class before RoutedExperts: a branch of the parser goes by its name
        made: type = type("FusedMoE", (importlib.import_module(f"{LAYERS}.fused_moe").RoutedExperts,), {})
    elif kind == "experts":
        made = importlib.import_module(f"{LAYERS}.fused_moe").RoutedExperts
    elif kind == "lm_head":
        made = importlib.import_module(f"{LAYERS}.vocab_parallel_embedding").ParallelLMHead
    else:
        made = getattr(linear, cls)
    layer = object.__new__(made)
    layer.__dict__.update(moe_config=None, ckpt_gate_proj_name="gate_proj", ckpt_up_proj_name="up_proj")
    layer.__dict__.update(ckpt_down_proj_name="down_proj")
    return layer


def parsed(case: dict[str, Any], models: Any) -> Any:
    """The quantization config as it is when the case's model is built."""
    quantization = importlib.import_module(QUANTIZATION)
    stated = copy.deepcopy(case["config"])
    method = method_of(stated, quantization)
    if not method:
        return None
    config = quantization.get_quantization_config(method).from_config(stated)
    metadata = {name: {"dtype": dtype} for name, dtype in case["tensors"].items()}
    for name in ("auto_gptq", "auto_awq"):
        importlib.import_module(f"{QUANTIZATION}.{name}").get_safetensors_params_metadata = lambda *_, **__: metadata
    config.maybe_update_config("model")
    configure = importlib.import_module("vllm.model_executor.model_loader.utils").configure_quant_config
    main, draft = models[case["architecture"]]
    configure(config, main)
    if case["draft"]:
        configure(config, draft)
    return config


def answer(config: Any, layer: dict[str, str]) -> Any:
    prefix = layer["name"]
    try:
        made = stub(layer["kind"], layer["cls"])
        method = config.get_quant_method(made, prefix)
        if type(method).__name__ in ("CompressedTensorsLinearMethod", "QuarkLinearMethod"):
            method = made.__dict__["scheme"]
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:200]}
    return method.values if isinstance(method, Made) else "plain"


def table(model: Any) -> list[Any]:
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    prefixes = dict(mapper.get_rename_mapper().orig_to_new_prefix) if mapper else {}
    return [prefixes, getattr(model, "packed_modules_mapping", None)]


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    document = json.loads(Path(sys.argv[1]).read_text())
    registry = importlib.import_module("vllm.model_executor.models.registry").ModelRegistry
    models = {
        name: (registry._try_load_model_cls(name), registry._try_load_model_cls(draft))
        for name, draft in document["architectures"].items()
    }
    tables = {
        name: table(model)
        for pair, both in zip(document["architectures"].items(), models.values(), strict=True)
        for name, model in zip(pair, both, strict=True)
    }
    replace_kernels()
    answers: list[Any] = []
    for case in document["cases"]:
        try:
            config = parsed(case, models)
        except Exception as error:
            answers.append({"error": f"{type(error).__name__}: {error}"[:200]})
            continue
        answers.append(["plain" if config is None else answer(config, layer) for layer in case["layers"]])
    json.dump({"answers": answers, "tables": tables}, out)
    out.close()


if __name__ == "__main__":
    main()
