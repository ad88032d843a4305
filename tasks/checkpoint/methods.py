"""The quantization methods that people bring: how a config names them, and how their tensors are named.

A method is recognized by `quant_method`, by a file of its own, or by the shape of its config. What is known about its
tensors is in `METHODS`; engines' lists of methods and rules are in `compat`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from requant.tasks.checkpoint.config import ModelConfig, QuantizationConfig
from requant.tasks.checkpoint.untrusted import shown

MODELOPT_FILE = "hf_quant_config.json"  # ModelOpt writes its config there too, in words of its own


@dataclass(frozen=True)
class Method:
    """A quantization method.

    name: as people write it; stated: values of `quant_method`, in lower case.
    tensors: a regular expression of the tensors' names with the groups `module` and `part`. None: the names of GPTQ and
    compressed-tensors (modules.py), and `more_parts`.
    readable: whether Requant knows how its tensors hold weights. If not, what is quantized is named and not judged.
    """

    name: str
    stated: frozenset[str]
    tensors: str | None = None
    readable: bool = False
    more_parts: tuple[str, ...] = ()

    @property
    def named(self) -> bool:
        """Whether it is known how its tensors are named, so that modules can be told from their names."""
        return self.readable or self.tensors is not None


def _method(name: str, *stated: str, parts: str | None = None, tensors: str | None = None) -> Method:
    """Make a method that Requant cannot read. `parts`: the parts of its modules, as alternatives of an expression."""
    if parts is not None:
        tensors = rf"(?P<module>.+?)\.(?P<part>weight|bias|{parts})"
    return Method(name, frozenset(stated), tensors)


# Sources of the parts: AutoAWQ, AutoGPTQ and compressed-tensors in modules.py; transformers 5.23.0, integrations/ and
# quantizers/ for all that follow `Quark`; mlx-lm, utils.py (`scales`, `biases`); exllamav2 and exllamav3, ext/linear.
METHODS = (
    Method("auto-round", frozenset({"auto-round", "inc"}), readable=True),
    Method("GPTQ", frozenset({"gptq", "gptq_marlin", "auto_gptq"}), readable=True),
    Method("AWQ", frozenset({"awq", "awq_marlin", "auto_awq"}), readable=True),
    Method("compressed-tensors", frozenset({"compressed-tensors"}), readable=True),
    Method("FP8", frozenset({"fp8"}), readable=True, more_parts=("scale",)),  # DeepSeek V4 calls it so
    Method("FBGEMM FP8", frozenset({"fbgemm_fp8"}), readable=True),
    Method(
        "ModelOpt",
        frozenset({"modelopt", "modelopt_fp4", "modelopt_fp8", "modelopt_mxfp8", "modelopt_mixed"}),
        readable=True,
    ),
    Method("MXFP8", frozenset({"mxfp8"}), readable=True),
    Method("Quark", frozenset({"quark", "quark_mxfp4", "quark_int4fp8_moe"}), readable=True),
    _method(
        "bitsandbytes",
        "bitsandbytes",
        "bitsandbytes_4bit",
        "bitsandbytes_8bit",
        parts=r"SCB|weight_format|weight\.[\w.]+",
    ),
    _method("MXFP4", "mxfp4", "gpt_oss_mxfp4", tensors=r"(?P<module>.+?)[._](?P<part>blocks|scales|weight|bias)"),
    _method("DeepSeek V4 FP8", "deepseek_v4_fp8", parts="scale"),
    _method("MLX", "mlx_q4", "mlx_q8", parts="scales|biases"),
    _method("torchao", "torchao", tensors=r"(?P<module>.+)[.](?P<part>weight|bias|_?weight_\w+|weight:\w+)"),
    _method("HQQ", "hqq", parts=r"W_q|scale|zero|meta|shape|nbits|group_size|axis|W_q\.\w+"),
    _method("Quanto", "quanto", parts=r"weight\._\w+|input_scale|output_scale"),
    _method("EETQ", "eetq", parts="qweight|weight_scales"),
    _method("AQLM", "aqlm", parts="codes|codebooks|scales"),
    _method("VPTQ", "vptq", parts=r"indices|centroids\.\w+|res_centroids\.\w+|weight_scale|weight_bias|perm"),
    _method("SpQR", "spqr", parts="dense_weights|row_offsets|col_vals|in_perm"),
    _method("QuIP#", "quip", parts="Qidxs|SU|SV|Wscale|codebook_id"),
    _method("HIGGS", "higgs", parts=r"scales|tables|tables2"),
    _method("FP-Quant", "fp_quant", parts=r"qweight|scales|weight_global_scale|act_global_scale|\w+_hadamard_matrix"),
    _method("BitNet", "bitnet", parts="weight_scale"),
    _method("SINQ", "sinq", parts=r"W_q|scales?|zeros?|scale2|meta"),
    _method("EXL2", "exl2", parts="q_weight|q_scale|q_scale_max|q_groups|q_group_map|q_invperm|q_perm"),
    _method("EXL3", "exl3", parts="trellis|suh|svh|su|sv|mcg|mul1"),
    _method("GGUF", "gguf"),
    _method("experts_int8", "experts_int8"),
    _method("moe_wna16", "moe_wna16"),
    _method("quantized at load", "online", "fp8_per_tensor", "fp8_per_block", "fp8_per_channel"),
    _method("Petit NVFP4", "petit_nvfp4"),
    _method("W8A8 INT8", "w8a8_int8", "blockwise_int8", "auto-round-int8"),
    _method("W8A8 FP8", "w8a8_fp8"),
    _method("W4AFP8", "w4afp8"),
    _method("humming", "humming"),
    _method("ModelSlim", "modelslim"),
)
BY_STATED = {stated: method for method in METHODS for stated in method.stated}
MLX = BY_STATED["mlx_q4"]
# Values of quant_method whose configs have the same words.
AUTO_ROUND_METHODS = BY_STATED["auto-round"].stated
GPTQ_METHODS = BY_STATED["gptq"].stated
AWQ_METHODS = BY_STATED["awq"].stated
FP8_METHODS = BY_STATED["fp8"].stated | BY_STATED["fbgemm_fp8"].stated
MODELOPT_METHODS = BY_STATED["modelopt"].stated
QUARK_METHODS = BY_STATED["quark"].stated


def method_of(config: ModelConfig, quantization: QuantizationConfig) -> Method | None:
    """Return the method of a checkpoint; None if nothing says that it is quantized.

    A method that is not in the table gets an entry of its own, which is not readable.
    """
    stated = quantization.method
    if stated:
        return BY_STATED.get(stated) or Method(shown(stated), frozenset({stated}))
    if quantization.string("quant_algo"):
        return BY_STATED["modelopt"]
    if any(_is_mlx(part) for part in (config.child("quantization"), quantization)):
        return MLX
    return None


def full_name(method: Method, quantization: QuantizationConfig) -> str:
    """Return a method's name with the algorithm that its config names, as `ModelOpt NVFP4`."""
    inner = quantization.child("quantization") or quantization
    algorithm = inner.string("quant_algo") or ""
    if quantization.get("load_in_4bit") is True:
        algorithm = quantization.string("bnb_4bit_quant_type") or ""
    return f"{method.name} {algorithm.upper()}" if re.fullmatch(r"\w{1,40}", algorithm) else method.name


def quantizes_cache_only(quantization: QuantizationConfig) -> bool:
    """Check whether a config of ModelOpt or compressed-tensors asks for a quantized KV cache, and nothing else."""
    inner = quantization.child("quantization") or quantization
    cache = inner.get("kv_cache_quant_algo") or inner.get("kv_cache_scheme")
    return bool(cache) and not inner.get("quant_algo") and not inner.get("config_groups")


def _is_mlx(config: object) -> bool:
    """Check whether a config is MLX's: bits and group size without a method.

    Source: SGLang 0.5.23, layers/quantization/mlx.py (override_quantization_method).
    """
    return (
        isinstance(config, dict)
        and "quant_method" not in config
        and type(config.get("bits")) is int
        and type(config.get("group_size")) is int
    )
