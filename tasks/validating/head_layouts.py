"""The layouts of MTP heads that can be run in torch: the names of their tensors, and what their decoder layer is."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.heads.layouts import INLINED
from requant.tasks.checkpoint.modules import split_name
from requant.tasks.checkpoint.mtp import Head

# Values of model_type in the text config of models whose inlined heads compute what MtpHead does: DeepSeek V3 and V3.2,
# GLM-4.5 to 4.7, GLM-4.7-Flash, GLM-5. Source: vLLM 0.32.0, config/speculative.py (hf_config_override).
INLINED_MODELS = frozenset({"deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa"})
LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True)
class HeadLayout:
    """The names of a head's modules below its prefix, and what engines do with its input.

    before: the modules before the decoder layer: norm of the embedding, norm of the hidden state, fusion of both.
    after: the norm behind it.
    shared: modules whose weights engines take from the main model.
    masks_first: whether engines put zeros in place of the embedding at position 0.
    """

    before: tuple[str, str, str]
    after: str
    shared: frozenset[str] = frozenset()
    masks_first: bool = False

    def stated(self, name: str) -> str:
        """Return the name below the head's layer of a tensor of MtpHead's model of one layer."""
        module, part = split_name(name)
        return f"{self.after}.{part}" if module == "norm" else name.removeprefix("layers.0.")


LAYOUTS = {
    # vLLM 0.32.0, model_executor/models/qwen3_5_mtp.py.
    "mtp": HeadLayout(("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc"), "norm"),
    # vLLM 0.32.0, deepseek_mtp.py, glm4_moe_mtp.py and glm4_moe_lite_mtp.py there.
    "inlined": HeadLayout(
        ("enorm", "hnorm", "eh_proj"),
        "shared_head.norm",
        shared=frozenset(key.removeprefix(f"{INLINED.layers}.") for key in INLINED.shared),
        masks_first=True,
    ),
}


def can_be_run(checkpoint: Checkpoint) -> bool:
    """Check whether a checkpoint has a head, and MtpHead computes it as engines do."""
    if checkpoint.head is None:
        return False
    if checkpoint.head.layout == "inlined":
        return checkpoint.text_config.get("model_type") in INLINED_MODELS
    return checkpoint.head.layout in LAYOUTS


def layers_of(head: Head) -> list[int]:
    """Return the numbers in the names of a head's decoder layers, in order."""
    return sorted({int(match[1]) for name in head.names if (match := LAYER.search(name))})


def name_in_model(name: str, layout: HeadLayout, layer: int) -> str | None:
    """Return the name of one of a head's tensors in MtpHead's model of one layer, which is the head's `layer`.

    Returns None for tensors that MtpHead does not read: those of other layers, and of modules shared with the main
    model.
    """
    match = LAYER.search(name)
    if match and int(match[1]) != layer:
        return None
    below = name[match.end() :] if match else name.rpartition("mtp.")[2]
    module, part = split_name(below)
    if module in layout.shared:
        return None
    if module in layout.before:
        return below
    return f"norm.{part}" if module == layout.after else f"layers.0.{below}"


def config_of_layer(config: Any, head: Head) -> Any:
    """Return a text model's config, changed to that of a model of one layer, which is as the head's.

    It has experts if the head has some, full attention, and an indexer of its own if the model has indexers.
    """
    config = copy.deepcopy(config)
    config.num_hidden_layers = 1
    config.vocab_size, config.pad_token_id = 1, None
    experts = any(".experts." in name for name in head.names)
    last_type = (getattr(config, "layer_types", None) or [None])[-1]
    kinds = {
        "layer_types": ["full_attention" if head.layout == "mtp" else last_type],
        "mlp_layer_types": ["sparse" if experts else "dense"],
        "indexer_types": ["full"],
        "first_k_dense_replace": 0 if experts else 1,
    }
    for key, value in kinds.items():
        if getattr(config, key, None) is not None:
            setattr(config, key, value)
    return config
