"""transformers: what it loads. It ignores the tensors of an MTP head and does not draft with them.

Source: transformers 5.23.0, quantizers/auto.py (AUTO_QUANTIZER_MAPPING), models/qwen3_5/modeling_qwen3_5.py
(`_keys_to_ignore_on_load_unexpected = [r"^mtp.*"]`), models/deepseek_v3 and models/glm4_moe (layers beyond
`num_hidden_layers` likewise), modeling_utils.py (_get_resolved_checkpoint_files).
"""

from __future__ import annotations

from requant.tasks.checkpoint.checkpoint import INDEX, SINGLE, Checkpoint
from requant.tasks.checkpoint.compat.rule import Finding, NotLoadable, shorten
from requant.tasks.checkpoint.compat.vllm import no_rules, quantization_in
from requant.tasks.checkpoint.methods import MLX
from requant.tasks.checkpoint.shards import missed_by_transformers
from requant.tasks.checkpoint.untrusted import shown
from requant.tasks.errors import CheckpointError

VERSION = "5.23.0"
METHODS = {
    "awq", "bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit", "gptq", "aqlm", "quanto", "quark", "fouroversix",
    "fp_quant", "eetq", "higgs", "hqq", "compressed-tensors", "fbgemm_fp8", "torchao", "bitnet", "vptq", "spqr", "fp8",
    "gguf", "nvfp4", "mxfp8", "auto-round", "mxfp4", "metal", "sinq", "gemma",
}  # fmt: skip
JUDGED = {"auto-round", "gptq", "awq", "fp8", "compressed-tensors"}  # whose tensors were tried or read in its source
IGNORED = "transformers ignores the MTP head"


def load_problem(checkpoint: Checkpoint) -> Finding:
    """Return why transformers would not load a checkpoint, or None."""
    contents = checkpoint.contents
    if contents is not None and not contents.named and SINGLE not in checkpoint.shards:
        return f"there is no {INDEX}, without which transformers reads {SINGLE} alone"
    if contents is not None and (missed := missed_by_transformers(contents, checkpoint.config)) is not None:
        return f"it reads {SINGLE} alone, which lies beside the index, and misses {shown(missed)}"
    if checkpoint.method is MLX:
        return "the weights are MLX's, which transformers does not know"
    try:
        quantization = quantization_in(checkpoint.config)
    except NotLoadable as refusal:
        return f"transformers refuses quantization_config: {refusal}"
    packed = next((module for module in checkpoint.modules.values() if module.quantized), None)
    if quantization is None:
        if packed is not None:
            return f"{packed.tensor.name} is quantized, and config.json has no quantization_config: restore it"
        return None
    method = quantization.get("quant_method")
    if not isinstance(method, str) or method not in METHODS:
        return f"quant_method is {shorten(method)}, which transformers does not know"
    if method not in JUDGED:
        return no_rules(checkpoint)
    return _uneven(checkpoint) if method == "auto-round" else None


def _uneven(checkpoint: Checkpoint) -> str | None:
    """Return why auto-round, which unpacks for transformers, cannot load a layer whose last group is smaller; or None.

    Source: auto_round 0.16.1, inference/backend.py. Every kernel for CPUs needs inputs that are a multiple of the group
    size, which was tried with transformers 5.23.0. By its source, the Triton kernel for GPUs takes other inputs too,
    which was not tried.
    """
    for module in checkpoint.modules.values():
        if not {"qweight", "qzeros", "scales"} <= module.parts.keys():
            continue
        try:
            scheme = checkpoint.reading.scheme(module)
        except CheckpointError:
            continue
        shape = scheme.weight_shape(module.packed_parts)
        if shape and scheme.group_size > 0 and shape[1] % scheme.group_size:
            return (
                f"{module.name} has {shape[1]} inputs, no multiple of group_size {scheme.group_size}: auto-round "
                "0.16.1, which unpacks it for transformers, has no kernel for that on a CPU (on a GPU it was not tried)"
            )
    return None
