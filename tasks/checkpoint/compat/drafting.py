"""Which engines draft with an MTP head: whether they have a draft model for the architecture and the head's layout,
and whether the head is complete and counted as they count it.

Sources: those of `heads/layouts.py`. How a quantization config names the layers of a draft model is in `vllm` and
`sglang`, for the architectures that they know.
"""

from __future__ import annotations

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.compat import sglang, vllm
from requant.tasks.checkpoint.compat.rule import Finding, NotJudged
from requant.tasks.checkpoint.heads.layout import HeadLayout, architecture_of
from requant.tasks.checkpoint.heads.layouts import LAYOUTS, promised_layers
from requant.tasks.checkpoint.heads.missing import depths_of, stated_count
from requant.tasks.checkpoint.inventory import missing_parts
from requant.tasks.checkpoint.mtp import Head
from requant.tasks.checkpoint.untrusted import shown

NO_HEAD = "there is no MTP head"
ENGINES = {"vllm": f"vLLM {vllm.VERSION}", "sglang": f"SGLang {sglang.VERSION}"}


class EngineLacks(str):
    """What an engine lacks to draft. The checkpoint has no problem."""


def head_finding(checkpoint: Checkpoint, engine: str) -> Finding:
    """Return why an engine of ENGINES would not draft with the head of a checkpoint, or why that is not judged.

    None: as far as its quantization config fits too, it drafts.
    """
    head = checkpoint.head
    if head is None:  # vLLM starts with an uninitialized head, and accepts no draft
        promised = promised_layers(checkpoint.config)
        return f"{NO_HEAD}, though config.json promises one" if promised else NO_HEAD
    if head.known is None:
        return NotJudged("the MTP head has a layout that Requant does not know: it is kept as it is")
    served = _drafter_finding(checkpoint, head.known, engine)
    if served is not None:
        return served
    missing = missing_parts(checkpoint, head)
    if missing:
        return f"{missing[0]} is missing from the head"
    return _count_finding(checkpoint, head, engine) or _naming_finding(checkpoint, head, engine)


def _drafter_finding(checkpoint: Checkpoint, layout: HeadLayout, engine: str) -> Finding:
    """Return why an engine would not read a head of this layout."""
    name, config = shown(architecture_of(checkpoint.config)), checkpoint.config
    read = [other for other in LAYOUTS if engine in other.engines and other.engines[engine].serves(config)]
    if layout in read:
        by = f"{ENGINES[engine]} drafts with this head by the method {layout.method}, which is not judged"
        return None if layout.method == "mtp" else NotJudged(by)
    if read:
        return (
            f"{ENGINES[engine]} reads a head of the layout {read[0].name} for {name}, and this one has the layout "
            f"{layout.name}: take the head of the base"
        )
    if not name:
        return NotJudged("config.json names no architecture, by which an engine chooses the draft model")
    return EngineLacks(f"{ENGINES[engine]} has no draft model for {name}")


def _count_finding(checkpoint: Checkpoint, head: Head, engine: str) -> Finding:
    """Return how the number of layers contradicts what config.json says, or what the engine takes; or None."""
    layout = head.known
    if layout is None:
        return None
    stated, there = stated_count(checkpoint.config, layout), depths_of(head, checkpoint.config)
    if stated.count is None:
        said = f"{stated.key} is null, or no number" if stated.key else f"{layout.counts[0]} is missing"
        return f"config.json does not count the layers of the MTP head ({said})"
    if stated.count <= 0:
        return f"config.json promises 0 MTP layers ({stated.key}), and there is a head"
    if there < stated.count:
        return f"config.json promises {stated.count} MTP layers, and there are {there}"
    most = layout.engines[engine].most_depths if engine in layout.engines else None
    if most is not None and stated.count > most:
        return EngineLacks(f"{ENGINES[engine]} takes no head of more than {most} MTP layers, and there are {there}")
    stray = _uncounted_tensor(checkpoint, head, stated.count) if layout.exact else None
    return f"{stray} is beyond the {stated.count} MTP layers that config.json promises" if stray else None


def _uncounted_tensor(checkpoint: Checkpoint, head: Head, promised: int) -> str | None:
    """Return a tensor of a layer that the config does not count, for which vLLM has no parameter; or None."""
    layers = checkpoint.text_config.integer("num_hidden_layers") or 0
    for name, part in head.parts.items():
        first = layers if part.is_layer else 0
        if part.layer is not None and part.layer >= first + promised:
            return name
    return None


def _naming_finding(checkpoint: Checkpoint, head: Head, engine: str) -> Finding:
    """Return why it is not known how an engine reads the quantization config for the head's layers, or None."""
    architecture = architecture_of(checkpoint.config)
    if not checkpoint.quantization or architecture in vllm.ARCHITECTURES:
        return None
    layers = f"the layers of {shown(architecture)}'s MTP head"
    return NotJudged(f"how {ENGINES[engine]} names {layers} in quantization_config is not known")
