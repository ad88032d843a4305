"""Ask vLLM which tensors of a base its draft model reads. Runs in vLLM's interpreter, on the CPU and without weights.

Reads from stdin a JSON object: for each family, the config of its base and the names of its tensors. Writes for each
the draft model's class, how many layers it predicts, and the names that its own `load_weights` does not skip. That
method runs on an object without parameters, whose table of parameters says yes to every name and notes it.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from typing import Any, ClassVar
from unittest.mock import MagicMock

import torch
from transformers import PretrainedConfig
from vllm.config.speculative import SpeculativeConfig
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
from vllm.model_executor.models.registry import _SPECULATIVE_DECODING_MODELS

SIZES = {
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "n_routed_experts": 2, "num_experts": 2,
    "num_local_experts": 2, "n_shared_experts": 1, "hidden_size": 64, "num_layers": 1,
    "hc_count": 1, "linear_attn_config": {}, "is_moe": False, "tie_word_embeddings": False,
}  # fmt: skip


class EveryName(dict[str, Any]):
    """A table of parameters that has each name, and notes those that are asked for."""

    noted: ClassVar[list[str]] = []

    def __contains__(self, name: object) -> bool:
        return True

    def __getitem__(self, name: str) -> Any:
        self.noted.append(name)
        return MagicMock()

    def get(self, name: str, default: Any = None) -> Any:
        return self[name]


class Loader:
    """In place of AutoWeightsLoader, which hands each weight to the module of its name: notes the names."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def load_weights(self, weights: Any, *, mapper: Any = None) -> set[str]:
        names = [name for name, _ in weights]
        EveryName.noted += names
        return set(names)


class Drafter:
    """An object with a class's methods and no parameters."""

    def __init__(self, cls: type, config: Any) -> None:
        vars(self).update(_cls=cls, config=config, quant_config=None, model=MagicMock(), pad_shared_expert=False)
        start = 2 if cls.__name__ != "LongCatFlashMTP" else 0
        vars(self)["model"].mtp_start_layer_idx = start
        vars(self)["model"].num_mtp_layers = 3
        vars(self)["model"].layers = {"2": MagicMock()}

    def named_parameters(self, **_: Any) -> list[tuple[str, Any]]:
        return []

    def modules(self) -> list[Any]:
        return []

    def __getattr__(self, name: str) -> Any:
        found = inspect.getattr_static(self._cls, name, None)
        if found is None:
            return MagicMock()
        return found.__get__(self, self._cls) if hasattr(found, "__get__") else found


def main() -> None:
    answers = {}
    for family, asked in json.load(sys.stdin).items():
        try:
            answers[family] = ask(asked["config"], asked["names"])
        except Exception as error:
            answers[family] = {"error": f"{type(error).__name__}: {error}"[:300]}
    json.dump(answers, sys.stdout)


def ask(stated: dict[str, Any], names: list[str]) -> dict[str, Any]:
    config = SpeculativeConfig.hf_config_override(_config(stated))
    architecture = config.architectures[0]
    if architecture not in _SPECULATIVE_DECODING_MODELS:
        return {"class": None}
    module_name, class_name = _SPECULATIVE_DECODING_MODELS[architecture]
    module_name = module_name if module_name.startswith("vllm.") else f"vllm.model_executor.models.{module_name}"
    cls = getattr(importlib.import_module(module_name), class_name)
    if not hasattr(cls, "load_weights"):  # DeepSeek V4's is made for GPUs, and reads names there
        cls = getattr(importlib.import_module(f"{module_name}.nvidia.mtp"), class_name)
    config.num_hidden_layers = 2  # some are set to 0, which the draft model adds to its numbers
    module = sys.modules[cls.__module__]
    module.dict = lambda *_: EveryName()  # type: ignore[attr-defined]
    if hasattr(module, "AutoWeightsLoader"):
        module.AutoWeightsLoader = Loader  # type: ignore[attr-defined]
    vars(module).update(get_tensor_model_parallel_world_size=lambda: 1, get_tensor_model_parallel_rank=lambda: 0)
    text = getattr(config, "text_config", None) or config
    read = [name for name in names if _is_read(cls, text, name)]
    return {"class": class_name, "layers": config.n_predict, "read": read}


def _is_read(cls: Any, config: Any, name: str) -> bool:
    EveryName.noted.clear()
    try:
        with disable_mtp_completeness_check():
            cls.load_weights(Drafter(cls, config), iter([(name, torch.zeros(2, 2))]))
    except Exception as error:  # with the weights of one layer alone, some raise at the end
        if not EveryName.noted and "missing from checkpoint" not in str(error):
            raise
    return bool(EveryName.noted)


def _config(stated: dict[str, Any]) -> Any:
    text = stated.get("text_config")
    config = PretrainedConfig(**{**SIZES, **{k: v for k, v in stated.items() if k not in ("text_config", "dtype")}})
    config.model_type = stated["model_type"]
    if text is not None:
        config.text_config = PretrainedConfig(**{**SIZES, **{k: v for k, v in text.items() if k != "dtype"}})
        config.text_config.model_type = text.get("model_type", f"{stated['model_type']}_text")
        config.text_config.architectures = list(stated["architectures"])
    return config


if __name__ == "__main__":
    main()
