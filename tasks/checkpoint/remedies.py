"""Says whether an advice helps: what `requant mtp-fix` would do is planned from headers and configs, and judged."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property

from requant.tasks.checkpoint.advice import FIX, FIX_INDEX, FROM_BASE
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.compat import Judgement
from requant.tasks.checkpoint.head import Tensors
from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.heads.layouts import LAYOUTS
from requant.tasks.checkpoint.inventory import missing_parts
from requant.tasks.checkpoint.modules import modules_of
from requant.tasks.checkpoint.repair_plan import RepairPlan, as_found, objection, plan_repair, with_head
from requant.tasks.errors import CheckpointError

FUSED_EXPERTS = re.compile(r"\.experts\.(gate_up_proj|down_proj)$")


@dataclass(frozen=True)
class Remedies:
    """What would help a checkpoint. Nothing is planned before it is asked for."""

    checkpoint: Checkpoint
    judgement: Judgement

    @cached_property
    def _plan(self) -> tuple[RepairPlan, Judgement] | None:
        """The plan of `requant mtp-fix` without a base, and its judgement; None if it would change nothing."""
        if self.checkpoint.planned:  # it is itself what a plan would make
            return None
        try:
            plan = plan_repair(self.checkpoint, None, "keep")
            after = Judgement.of(plan.target)
            refused = objection(plan, self.judgement, after)
        except CheckpointError:
            return None
        return None if refused or not plan.to_write else (plan, after)

    def of_head(self) -> str | None:
        """Return the command after which engines draft that do not now; None if there is none."""
        if self._plan is not None and self._helps(self._plan[1]):
            return FIX
        if self.checkpoint.planned:
            return None
        try:
            found = as_found(self.checkpoint, without_head=True)
            plain = with_plain_head(found)
            after = Judgement.of(plain)
            refused = objection(RepairPlan(found, plain, changes_head=True), self.judgement, after)
        except CheckpointError:
            return None
        return None if refused or not self._helps(after) else FROM_BASE

    def _helps(self, after: Judgement) -> bool:
        """Check whether the problem of the head that would be told is gone."""
        before = self.judgement.head_problem or self.judgement.draft_problem
        return before is not None and before not in (after.head_problem, after.draft_problem)

    def checked(self, problem: str) -> str:
        """Return a problem without the advice to run mtp-fix if that would not do what it says."""
        advice = next((end for end in (f": {FIX_INDEX}", f"; {FIX_INDEX}", f": {FIX}") if problem.endswith(end)), "")
        return type(problem)(problem.removesuffix(advice)) if advice and self._plan is None else problem

    def loads_unquantized(self) -> bool:
        """Check whether vLLM loads the checkpoint without its quantization config."""
        bare = replace(self.checkpoint, config=self.checkpoint.config.without_quantization())
        return Judgement.of(bare).loading["vllm"] is None


def with_plain_head(found: Checkpoint) -> Checkpoint:
    """Return a checkpoint as a repair with its true base leaves it: with a whole head that is not quantized.

    The head's tensors have names and dtypes only. Raises CheckpointError if the words of the quantization method are
    not known, or if no head is known for this model.
    """
    present = set(found.head.names if found.head else ())
    wanted: Tensors = {}
    for module in modules_of(found.tensors[name] for name in sorted(present)).values():
        if module.quantized:
            wanted |= _plain(f"{module.name}.weight", found)
        else:
            wanted |= {tensor.name: tensor for tensor in module.parts.values()}
    if not wanted:
        wanted = _first_module(found)
    target = with_head(found, found.config, wanted, present)
    for part in missing_parts(target, target.head) if target.head else ():
        wanted |= _plain(part if FUSED_EXPERTS.search(part) else f"{part}.weight", found)
    return with_head(found, found.config, wanted, present)


def _first_module(found: Checkpoint) -> Tensors:
    """Return one module of the head that engines read for this model."""
    layout = next((layout for layout in LAYOUTS if layout.belongs_to(found.config)), None)
    if layout is None or not layout.modules:
        raise CheckpointError("no layout of an MTP head is known for this model")
    layers = found.text_config.integer("num_hidden_layers") or 0
    key = layout.modules[0].partition("|")[0]
    in_layers = key.startswith("layers.*.")
    root = next((name.partition("layers.")[0] for name in found.tensors if "layers." in name), "") if in_layers else ""
    return _plain(f"{root}{key.replace('*', str(layers if in_layers else 0))}.weight", found)


def _plain(name: str, found: Checkpoint) -> Tensors:
    hidden = found.text_config.integer("hidden_size") or 1
    return {name: Tensor(name, "BF16", (hidden, hidden), found.folder, 0, 0)}
