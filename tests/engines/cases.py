"""Generated quantization configs, and the layers to ask about. Seeded: the same ones every time."""

from __future__ import annotations

from random import Random
from typing import Any

ARCHITECTURES = {  # the main model's class -> its draft's
    "Qwen3_5ForConditionalGeneration": "Qwen3_5MTP",
    "Qwen3_5MoeForConditionalGeneration": "Qwen3_5MoeMTP",
    "Qwen3_5ForCausalLM": "Qwen3_5MTP",
    "Qwen3NextForCausalLM": "Qwen3NextMTP",
    "Glm4MoeForCausalLM": "Glm4MoeMTPModel",
}
BODY = {
    "Qwen3_5ForConditionalGeneration": "model.language_model.layers",
    "Qwen3_5MoeForConditionalGeneration": "model.language_model.layers",
    "Qwen3_5ForCausalLM": "model.layers",
    "Qwen3NextForCausalLM": "model.layers",
    "Glm4MoeForCausalLM": "model.layers",
}
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEAR_ATTENTION = (
    "linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.in_proj_b", "linear_attn.in_proj_a",
    "linear_attn.out_proj",
)  # fmt: skip
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
SHARED = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj")
VALUES: list[Any] = [
    {"bits": 16}, {"bits": 16, "data_type": "fp"}, {"bits": 8}, {"bits": 4}, {"group_size": 64}, {"sym": False},
    {}, {"bits": 4, "group_size": 32, "sym": True}, {"bits": 32}, {"bits": 2},
]  # fmt: skip
JUNK: list[Any] = [5, None, "fp16", [], {"bits": None}, {"bits": "4"}, {"group_size": [1, 2]}, {"group_size": "128"}]


def modules(architecture: str, draft: bool) -> list[str]:
    """Names of linear modules as a checkpoint of this architecture has them."""
    body, moe = BODY[architecture], "Moe" in architecture or "Next" in architecture
    if draft:
        layers = [f"{body}.2"] if "Glm" in architecture else ["mtp.layers.0"]
        extra = [f"{body}.2.eh_proj"] if "Glm" in architecture else ["mtp.fc"]
    else:
        layers, extra = [f"{body}.{n}" for n in (0, 1, 11)], ["lm_head", "model.visual.blocks.0.attn.qkv"]
    names = list(extra)
    for number, layer in enumerate(layers):
        mixing = ATTENTION if draft or number == 1 or "Glm" in architecture else LINEAR_ATTENTION
        inner = (*SHARED, *(f"mlp.experts.{e}.{p}" for e in (0, 1) for p in ("gate_proj", "up_proj", "down_proj")))
        names += [f"{layer}.{part}" for part in (*mixing, *(inner if moe else MLP))]
    return names


def tensors(random: Random, names: list[str]) -> dict[str, str]:
    """Tensor names with dtypes, some modules packed: what GPTQ and AWQ take their lists from."""
    found: dict[str, str] = {"model.embed_tokens.weight": "BF16"}
    packed_all = random.random() < 0.5
    for name in names:
        if (packed_all and "mtp" not in name) or random.random() < 0.3:
            found |= {f"{name}.qweight": "I32", f"{name}.scales": "F16"}
        else:
            found[f"{name}.weight"] = "BF16"
        if "linear_attn.out_proj" in name and random.random() < 0.5:
            found[name.replace("out_proj", "A_log")] = "F32"
    return found


def pattern(random: Random, names: list[str]) -> str:
    """A regular expression as tools write them, or nearly."""
    name = random.choice(names)
    body = name.replace(".", r"\.")
    return random.choice([
        ".*mtp.*", r"mtp\..*", "^mtp", r".*mlp\.(gate|up)_proj$", r"model\.language_model\..*in_proj_[ab]",
        r".*\.layers\.[0-3]\..*", r".*experts.*", r".*self_attn\.[qkv]_proj", "mtp.*fc", ".*", "lm_head$", body,
        f"^{body}$", f".*{body.rpartition('.')[2]}", name.replace(".0.", ".*."), "*.mlp", "([", "mtp.layers.0.(?!mlp)",
        r".*(in_proj_qkvz|in_proj_ba|qkv_proj|gate_up_proj)", r"(?i).*MTP.*", r"layers\.1\.",
    ])  # fmt: skip


def key(random: Random, names: list[str]) -> str:
    """A key of `extra_config`, or an entry of a list."""
    name = random.choice(names)
    fused = name.rpartition(".")[0] + "." + random.choice(["qkv_proj", "gate_up_proj", "in_proj_ba", "in_proj_qkvz"])
    return random.choice([
        name, name, name, pattern(random, names), pattern(random, names), name.split(".", 2)[-1],
        name.rpartition(".")[2], f"model.{name}", fused, "lm_head", "mtp", name.rpartition(".")[0],
        name.replace("model.language_model", "language_model.model"),
    ])  # fmt: skip


def siblings(name: str) -> list[str]:
    """The modules that are fused with one."""
    stem, _, leaf = name.rpartition(".")
    for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("in_proj_b", "in_proj_a"),
                  ("in_proj_qkv", "in_proj_z")):  # fmt: skip
        if leaf in group:
            return [f"{stem}.{other}" for other in group]
    return [name]


def auto_round(random: Random, names: list[str], body: str) -> dict[str, Any]:
    config: dict[str, Any] = {
        "quant_method": "auto-round",
        "bits": random.choice([4, 4, 4, 8, 2, 3]),
        "group_size": random.choice([128, 32, -1]),
        "sym": random.choice([True, True, False]),
    }
    if random.random() < 0.6:
        config["packing_format"] = random.choice(
            ["auto_round:auto_gptq", "auto_round:auto_gptq", "auto_round:auto_awq"]
        )
    if random.random() < 0.7:
        blocks = random.choice([
            body, [body], f"{body},mtp.layers", [body, "mtp"], "", [], "model.visual.blocks," + body, f"{body}.1", None,
            ["mtp.layers.0.mlp"], "lm_head," + body,
        ])  # fmt: skip
        config[random.choice(["block_name_to_quantize", "block_name_to_quantize", "to_quant_block_names"])] = blocks
    if random.random() < 0.85:
        extra: dict[str, Any] = {}
        for _ in range(random.randint(0, 6)):
            value, one = random.choice(VALUES), key(random, names)
            together = siblings(one) if random.random() < 0.5 else [one]
            extra |= dict.fromkeys(together, value)
        if random.random() < 0.08:
            extra[key(random, names)] = random.choice(JUNK)
        config["extra_config"] = extra
    if random.random() < 0.15:  # what is refused at once, and what just is not
        config |= random.choice([
            {"bits": 16}, {"bits": 1}, {"bits": "4"}, {"group_size": "x"}, {"group_size": [128, 128]},
            {"packing_format": "auto_round"}, {"packing_format": "auto_round:gptqmodel"}, {"packing_format": None},
            {"backend": "exllamav2"}, {"backend": "auto"}, {"vllm_backend": "marlin"}, {"data_type": "float"},
            {"data_type": "int"}, {"extra_config": "mtp"}, {"extra_config": None},
            {"block_name_to_quantize": [None]}, {"block_name_to_quantize": 5},
            {"block_name_to_quantize": [["model.layers.0"]]},
            {"data_type": "fp8", "bits": 8, "group_size": [128, 128], "sym": True, "packing_format": "auto_round:fp8"},
            {"data_type": "fp", "bits": 8, "group_size": [128, 128], "sym": True, "packing_format": None},
            {"data_type": "mx_fp", "bits": 4, "group_size": 32, "sym": True, "packing_format": None},
            {"data_type": "mx_fp", "bits": 8, "group_size": 32, "sym": True, "packing_format": None, "act_bits": 8},
            {"data_type": "mx_fp", "bits": 8, "group_size": 32, "sym": True, "packing_format": None, "act_bits": 4},
        ])  # fmt: skip
        if random.random() < 0.1:
            config.pop(random.choice(["bits", "group_size", "sym"]), None)
    return config


def gptq(random: Random, names: list[str], body: str) -> dict[str, Any]:
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": random.choice([4, 4, 8]),
        "group_size": random.choice([128, 32, -1]),
        "sym": True,
        "desc_act": random.random() < 0.1,
    }
    if random.random() < 0.7:
        dynamic: dict[str, Any] = {}
        for _ in range(random.randint(0, 4)):
            rule = pattern(random, names)
            if rule in ("*.mlp", "([") and random.random() < 0.8:
                continue
            sign = random.choice(["-:", "-:", "+:", ""])
            value = (
                {}
                if sign == "-:"
                else random.choice(
                    [
                        {"bits": 8},
                        {"group_size": 64},
                        {},
                        {"bits": 3},
                        {"sym": False},
                        {"bits": None},
                        {"desc_act": True},
                    ]
                )
            )
            dynamic[sign + rule] = value
        config["dynamic"] = random.choice([dynamic, dynamic, dynamic, None])
    if random.random() < 0.4:
        names_short = [n.split("layers.")[-1].partition(".")[2] or n for n in names]
        listed: Any = [random.choice([random.choice(names), random.choice(names_short)]) for _ in range(5)]
        listed += siblings(listed[0])
        config["modules_in_block_to_quantize"] = random.choice([listed, [listed], []])
    if random.random() < 0.2:
        config |= random.choice([{"lm_head": True}, {"bits": 3}, {"sym": False}, {"dynamic": "mtp"}, {"bits": "4"}])
    if random.random() < 0.05:
        config.pop(random.choice(["desc_act", "sym", "bits"]))
    return config


def awq(random: Random, names: list[str], body: str) -> dict[str, Any]:
    config: dict[str, Any] = {"quant_method": "awq", "group_size": 128, "zero_point": random.choice([True, False])}
    config[random.choice(["bits", "w_bit"])] = random.choice([4, 4, 4, 4, 4, 8])
    if random.random() < 0.6:
        skipped = [key(random, names) for _ in range(random.randint(0, 4))]
        skipped += siblings(random.choice(names)) if random.random() < 0.5 else []
        config["modules_to_not_convert"] = random.choice([skipped, skipped, None, ["visual", "mtp"]])
    if random.random() < 0.1:
        config["lm_head"] = True
    return config


def compressed_tensors(random: Random, names: list[str], body: str) -> dict[str, Any]:
    def target() -> str:
        return random.choice(
            ["Linear", "Linear", f"re:{pattern(random, names)}", random.choice(names), "RoutedExperts"]
        )

    groups = {}
    for number in range(random.randint(1, 3)):
        weights = {"num_bits": random.choice([4, 8]), "type": "int", "symmetric": random.choice([True, False])}
        weights |= {"strategy": "group", "group_size": random.choice([128, 32])}
        targets = [target() for _ in range(random.randint(1, 3))]
        if random.random() < 0.3:
            targets += siblings(random.choice(names))
        groups[f"group_{number}"] = {"targets": targets, "weights": weights, "input_activations": None}
    ignore = ["lm_head"] if random.random() < 0.7 else []
    for _ in range(random.randint(0, 4)):
        one = key(random, names)
        ignore += [f"re:{one}"] if random.random() < 0.4 else siblings(one) if random.random() < 0.6 else [one]
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": groups,
        "ignore": ignore,
    }
    if random.random() < 0.08:
        group = groups["group_0"]
        group |= random.choice(
            [
                {"targets": None},
                {"weights": None},
                {"weights": {**group["weights"], "actorder": "group"}},
                {"targets": ["Qwen3NextAttention"]},
            ]
        )
    return config


def fp8(random: Random, names: list[str], body: str) -> dict[str, Any]:
    config: dict[str, Any] = {
        "quant_method": "fp8",
        "activation_scheme": random.choice(["dynamic", "dynamic", "static"]),
    }
    if random.random() < 0.7:
        config["weight_block_size"] = random.choice([[128, 128], [128, 128], None, [128]])
    if random.random() < 0.8:
        listed = [key(random, names) for _ in range(random.randint(0, 5))] + siblings(random.choice(names))
        config[random.choice(["ignored_layers", "modules_to_not_convert"])] = listed
    return config


def left_out(random: Random, names: list[str]) -> list[str]:
    """Entries of ModelOpt's list: names, parts of names and wildcards."""
    one = random.choice(names)
    stem = one.rpartition(".")[0]
    known = [
        "lm_head", "mtp*", "mtp.*", "mtp", "*mtp*", "*.mlp.experts*", f"{stem}*", f"{stem}.*", stem, one,
        "model.language_model.visual*", "model.visual*", "*self_attn*", "*[qk]_proj", "*gate_proj", "proj", "visual",
        key(random, names),
    ]  # fmt: skip
    listed = [random.choice(known) for _ in range(random.randint(0, 4))]
    return listed + (siblings(one) if random.random() < 0.5 else [])


def modelopt(random: Random, names: list[str], body: str) -> dict[str, Any]:
    fp8, other = ["FP8", "FP8_PER_CHANNEL_PER_TOKEN", "fp8_pb_wo"], ["W4A16_NVFP4", "MXFP8", "INT4_AWQ", "", None]
    algorithm = random.choice(["FP8", "NVFP4", "NVFP4", "MIXED_PRECISION", "MIXED_PRECISION", *fp8, *other])
    values: dict[str, Any] = {"quant_algo": algorithm, "group_size": random.choice([16, 16, None, "16", "x"])}
    if algorithm == "MIXED_PRECISION" and random.random() < 0.95:
        layers: dict[str, Any] = {}
        for _ in range(random.randint(1, 6)):
            one = random.choice(names)
            stated = random.choice(["FP8", "FP8", "NVFP4", "nvfp4", "W4A16_NVFP4", "MXFP8", "FP8_BLOCK_SCALES", "INT8"])
            where = siblings(one) if random.random() < 0.7 else [random.choice([one, one.rpartition(".")[0]])]
            layers |= {name: {"quant_algo": stated} for name in where}
        values["quantized_layers"] = layers
    nested = random.random() < 0.5
    if random.random() < 0.95:
        values["exclude_modules" if nested else "ignore"] = left_out(random, names)
    if random.random() < 0.03:
        values["exclude_modules" if nested else "ignore"] = random.choice(["lm_head", [5], None])
    if not nested:
        method = random.choice(["modelopt", "modelopt", "modelopt", "modelopt_fp4"])
        return {"quant_method": method, **values, "config_groups": {"group_0": {"targets": ["Linear"]}}}
    if random.random() < 0.95:
        values["kv_cache_quant_algo"] = random.choice([None, "FP8", "NVFP4"])
    document = {"quantization": values, "producer": {"name": "modelopt", "version": "0.29.0"}}
    return document if random.random() < 0.6 else {"quant_method": "modelopt", "quantization": values}


def mxfp8(random: Random, names: list[str], body: str) -> dict[str, Any]:
    config: dict[str, Any] = {"quant_method": "mxfp8", "ignored_layers": left_out(random, names)}
    if random.random() < 0.1:
        config |= random.choice([{"quant_algo": "FP8"}, {"quant_algo": "MXFP8"}, {"ignored_layers": None}])
    if random.random() < 0.05:
        config["ignored_layers"] = random.choice(["lm_head", [5]])
    return config


def quark(random: Random, names: list[str], body: str) -> dict[str, Any]:
    excluded = ["lm_head"] if random.random() < 0.7 else []
    for _ in range(random.randint(0, 4)):
        one = key(random, names)
        excluded += [f"re:{one}"] if random.random() < 0.4 else siblings(one) if random.random() < 0.6 else [one]
    if random.random() < 0.3:
        excluded.append(f"{random.choice(names).partition('.mlp')[0]}.mlp.experts.*.down_proj")
    weight = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False}
    config: dict[str, Any] = {
        "quant_method": "quark",
        "export": {"kv_cache_group": [], "pack_method": "reorder"},
        "global_quant_config": {"weight": weight, "input_tensors": None},
        "layer_type_quant_config": {},
        "layer_quant_config": {},
        "exclude": excluded,
    }
    if random.random() < 0.05:
        config |= random.choice([{"export": None}, {"export": {}}])
    return config


METHODS = {
    "auto-round": auto_round, "gptq": gptq, "awq": awq, "compressed-tensors": compressed_tensors, "fp8": fp8,
    "modelopt": modelopt, "mxfp8": mxfp8, "quark": quark,
}  # fmt: skip


def generate(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """`count` cases; half of them auto-round. Layers are added by the test, which knows how vLLM names them."""
    random = Random(seed)
    found = []
    for _ in range(count):
        method = random.choice([*METHODS, "auto-round", "auto-round", "auto-round"])
        architecture, draft = random.choice(list(ARCHITECTURES)), random.random() < 0.5
        names = modules(architecture, draft)
        everything = names + modules(architecture, not draft)
        config = METHODS[method](random, everything, BODY[architecture])
        found.append({
            "method": method, "config": config, "architecture": architecture, "draft": draft, "modules": names,
            "tensors": tensors(random, everything),
        })  # fmt: skip
    return found
