"""Finds the tensors of an MTP head.

There are two layouts. `mtp`: tensors `mtp.*` (Qwen3.5, Qwen3.6), whose layers `mtp_num_hidden_layers` counts.
`inlined`: decoder layers behind the last one of the model, `model.layers.{num_hidden_layers + i}` (DeepSeek, GLM),
which `num_nextn_predict_layers` counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from requant.tasks.checkpoint.config import ModelConfig

LAYER_NAME = re.compile(r"^(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.(\d+)\.")
# Modules of an inlined layer that are copies of the main model's, which engines use instead. Sources: vLLM 0.32.0,
# v1/spec_decode/llm_base_proposer.py (_maybe_share_embeddings, _maybe_share_lm_head); SGLang 0.5.23,
# srt/models/deepseek_nextn.py, which has none.
SHARED_MODULES = frozenset({"embed_tokens", "shared_head.head"})


@dataclass(frozen=True)
class Head:
    """The MTP head: its layout, and the sorted names of its tensors."""

    layout: Literal["mtp", "inlined"]
    names: tuple[str, ...]

    @property
    def modules(self) -> list[str]:
        """Names of the linear modules, as far as names say: all modules with a weight, except norms."""
        stems = {n.rpartition(".")[0] for n in self.names if n.rpartition(".")[2] in {"weight", "qweight"}}
        return sorted(s for s in stems if "norm" not in s.rpartition(".")[2])

    @property
    def prefixes(self) -> list[str]:
        """Module prefixes that cover all of the head: `mtp`, or `model.layers.N` for each inlined layer."""
        if self.layout == "mtp":
            return sorted({n[: n.index("mtp") + 3] for n in self.names})
        return sorted({m.group(0).rstrip(".") for n in self.names if (m := LAYER_NAME.match(n))})


def find_head(names: Iterable[str], config: ModelConfig) -> Head | None:
    """Return the MTP head among the names of a checkpoint's tensors, or None."""
    names = list(names)
    named_mtp = sorted(n for n in names if re.match(r"^(?:model\.)?mtp\.", n))
    if named_mtp:
        return Head("mtp", tuple(named_mtp))
    layers = config.text.integer("num_hidden_layers")
    if layers is None or not config.mtp_layers:
        return None
    inlined = sorted(n for n in names if (m := LAYER_NAME.match(n)) and int(m.group(1)) >= layers)
    return Head("inlined", tuple(inlined)) if inlined else None
