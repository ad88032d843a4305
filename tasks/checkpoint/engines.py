"""Will each engine load a checkpoint, and will MTP draft there? Rules as observed, with their versions.

vLLM 0.32/0.33 and SGLang 0.5.23 build the head's `fc` as a plain linear layer: packed, it has no parameter to go to.
Both decide for every other layer of the head by the quantization config. transformers 5.23 ignores `mtp.*`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tasks.checkpoint.assemble import packed_parts
from tasks.checkpoint.checkpoint import Checkpoint

VIDEO, IMAGE = "video_preprocessor_config.json", "preprocessor_config.json"


def verdicts(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """`{engine: {loads, mtp, reason}}`. `mtp` is False without a head; `reason` names what to change."""
    vision = (
        f"{missing[0]} is missing: copy it from the base" if (missing := missing_vision_files(checkpoint)) else None
    )
    drafting = draft_problem(checkpoint)
    broken = checkpoint.fatal[0] if checkpoint.fatal else None
    first = vision or broken
    loads = first is None
    engine = {"loads": loads, "mtp": loads and drafting is None, "reason": first or drafting or "nothing is in the way"}
    return {
        "vllm": engine,
        "sglang": dict(engine),
        "transformers": {
            "loads": broken is None,
            "mtp": False,
            "reason": broken or "transformers ignores the MTP head",
        },
    }


def missing_vision_files(checkpoint: Checkpoint) -> list[str]:
    """The processor files without which vLLM refuses a vision model."""
    if not isinstance(checkpoint.config.get("vision_config"), dict):
        return []
    needed = [IMAGE, VIDEO] if "video_token_id" in checkpoint.config else [IMAGE]
    return [name for name in needed if not (checkpoint.folder / name).is_file()]


def draft_problem(checkpoint: Checkpoint) -> str | None:
    """Why no engine would draft from this checkpoint's head, or None."""
    head = checkpoint.head
    if head is None:
        return "there is no MTP head"
    packed = sorted(packed_parts(checkpoint.tensors[name] for name in head.names))
    plain = [m for m in packed if m.endswith((".fc", ".eh_proj"))]
    if plain:
        return f"{plain[0]}.qweight is packed, and the engine's layer is plain: run requant mtp-fix"
    quantization = checkpoint.config.get("quantization_config")
    if not isinstance(quantization, dict):
        return None
    for module in head.modules:
        expects = expects_packed(quantization, module)
        if expects != (module in packed) and f"{module}.weight" not in _vectors(checkpoint):
            state = "packed" if module in packed else "not packed"
            return f"{module} is {state}, and quantization_config says otherwise (extra_config): run requant mtp-fix"
    return None


def expects_packed(quantization: Mapping[str, Any], module: str) -> bool:
    """Whether vLLM expects packed weights in an auto-round checkpoint's module.

    Exact key in `extra_config`, then a regex key (re.search, needs a metacharacter), then the block list: absent, it
    means everything. Source: vLLM 0.32, model_executor/layers/quantization/inc.py.
    """
    extra = quantization.get("extra_config")
    extra = extra if isinstance(extra, dict) else {}
    if module in extra:
        return _packs(extra[module], quantization)
    for key, layer in extra.items():
        if re.search(r"[*+?^$()\[\]{}|\\]", key) and _matches(key, module):
            return _packs(layer, quantization)
    blocks = quantization.get("block_name_to_quantize")
    names = blocks.split(",") if isinstance(blocks, str) else blocks
    if not isinstance(names, list) or not names:
        return _packs({}, quantization)
    return any(isinstance(name, str) and module.startswith(name) for name in names)


def _packs(layer: Any, quantization: Mapping[str, Any]) -> bool:
    bits = layer.get("bits") if isinstance(layer, dict) else None
    bits = quantization.get("bits", 4) if bits is None else bits
    return isinstance(bits, int) and bits < 16


def _matches(pattern: str, module: str) -> bool:
    try:
        return re.search(pattern, module) is not None
    except re.error:
        return False


def _vectors(checkpoint: Checkpoint) -> set[str]:
    return {name for name, tensor in checkpoint.tensors.items() if len(tensor.shape) < 2}
