"""auto-round's tuning loop of a block, rearranged for a GPU: the same steps on the same samples, without the waste.

What auto-round 0.16.1 does around the arithmetic, and what is done here instead (`make bench-gpu` shows both):

- it gathers each batch on the CPU and copies it over from pageable memory: here the samples are on the GPU, or in
  pinned memory and fetched one batch ahead;
- it copies the best parameters to the CPU each time the loss falls (1.5 GB at 27 B dimensions): here they stay;
- it waits for each step's loss before it starts the backward pass: here the loss is read while that runs;
- it compiles a block with wrappers that hold functions of their own, so that every block of a model is compiled anew:
  here a block's kind is compiled once;
- it updates parameters one after another;
- with accumulation it sums squares instead of taking their mean, and the gradients of the scales, which pass through
  float16, overflow: here a batch in pieces has the gradients of the whole batch.

Everything else is auto-round's: its wrappers, its quantization function, its sampler, its schedule, its loss. Blocks
that need more than this loop knows go to auto-round's own (`unfit` says why).

The one exception, `compare_last`, is described in best_iteration.py.
"""

from __future__ import annotations

import functools
import inspect
import random
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from requant.tasks.quantizing.auto_settings import LoopSettings
from requant.tasks.quantizing.events import BlockLoss, CompileFailed, EventSink, LoopChosen, kind_of
from requant.tasks.quantizing.loop import sign_sgd
from requant.tasks.quantizing.loop.batches import BlockInputs, Loss, cut
from requant.tasks.quantizing.loop.best_iteration import better, losses, spread, without_scale

SUPPORTED = (nn.Linear, Conv1D)
OTHER_FORMATS = ("super_bits", "imatrix", "init_scale", "awq_clip_max")


class FakeQuantized(nn.Module):
    """A linear layer whose weight is quantized and dequantized on the way, by auto-round's own function.

    Unlike auto-round's wrapper it holds tensors and constants only: two of one shape share one compiled graph.
    """

    def __init__(self, wrapper: Any) -> None:
        super().__init__()
        layer = wrapper.orig_layer
        self.quantizer = wrapper.weight_quant_func
        self.data_type, self.threshold = wrapper.data_type, wrapper.q_scale_thresh
        self.bits, self.group_size, self.scale_dtype = layer.bits, layer.group_size, layer.scale_dtype
        self.weight: torch.Tensor
        self.bias: torch.Tensor | None
        self.register_buffer("weight", layer.weight.detach())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        self.register_buffer("low", wrapper.weight_min)
        self.register_buffer("high", wrapper.weight_max)
        self.value, self.min_scale, self.max_scale = wrapper.value, wrapper.min_scale, wrapper.max_scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, _ = self._quantized()
        return functional.linear(x, weight.to(self.weight.dtype), self.bias)

    @torch.no_grad()
    def lost_groups(self) -> torch.Tensor:
        """Which groups have no scale with the parameters as they are."""
        return without_scale(self._quantized()[1], self.threshold)

    def _quantized(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight that the parameters stand for, and its scales."""
        weight, scale, _ = self.quantizer(
            self.weight,
            bits=self.bits,
            group_size=self.group_size,
            v=self.value,
            min_scale=self.min_scale,
            max_scale=self.max_scale,
            scale_dtype=self.scale_dtype,
            tensor_min=self.low,
            tensor_max=self.high,
            data_type=self.data_type,
            q_scale_thresh=self.threshold,
        )
        return weight, scale


@dataclass(frozen=True)
class BlockTask:
    """A block to tune: what `SignRoundQuantizer.quantize_block` is called with (auto-round 0.16.1).

    quantizer    the SignRoundQuantizer, with iters, learning rates and the context of the run
    block        its layers that are to be quantized have the attributes bits, group_size, scale_dtype and so on
    inputs       the block's inputs, behind quantized blocks where auto-round has it so: per sample `[1, s, hidden]`
    others       the other arguments of the block's forward pass
    targets      what the block in full precision makes of its own inputs: per sample `[1, s, hidden]`
    input_ids    the tokens, per sample `[1, s]`, of which padding does not count; None if all count
    """

    quantizer: Any
    block: nn.Module
    inputs: list[torch.Tensor]
    others: dict[str, Any]
    targets: list[torch.Tensor]
    input_ids: Any

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> BlockTask:
        """Take a task from the arguments of `quantize_block` by name, its quantizer as `self`."""
        quantizer, q_inputs = arguments["self"], arguments["q_inputs"]
        quantized = q_inputs is not None and quantizer.enable_quanted_input
        return cls(
            quantizer,
            arguments["block"],
            q_inputs if quantized else arguments["fp_inputs"],
            arguments["input_others"],
            arguments["fp_outputs"],
            arguments.get("input_ids"),
        )


def unfit(task: BlockTask) -> str | None:
    """Say why a block needs auto-round's own loop; None if it does not."""
    quantizer = task.quantizer
    if type(quantizer).__name__ != "SignRoundQuantizer" or quantizer.momentum or quantizer.enable_norm_bias_tuning:
        return "another algorithm than plain sign descent"
    if quantizer.enable_lfq or quantizer.enable_alg_ext or quantizer.lr_scheduler is not None:
        return "an extension of sign descent"
    if quantizer.not_use_best_mse or quantizer.dynamic_max_gap > 0 or getattr(quantizer.config, "enable_neuqi", False):
        return "an early end, or a search before it"
    others = task.others
    if not isinstance(task.inputs, list) or quantizer.iters < 1 or others.get("positional_inputs") or "alibi" in others:
        return "inputs that are not a list of samples"
    for name, layer in task.block.named_modules():
        if getattr(layer, "bits", 16) < 16 and type(layer) in SUPPORTED:
            more = {
                "hooks": layer._forward_hooks or layer._forward_pre_hooks,
                "parameters of another format": [a for a in OTHER_FORMATS if getattr(layer, a, None) is not None],
                f"the type {type(layer).__name__}": type(layer) is not nn.Linear,
                f"data type {layer.data_type}": layer.data_type not in {"int", "int_sym", "int_asym"},
                "quantized activations": layer.act_bits <= 8,
                "no weight yet": layer.weight.device.type == "meta",
            }
            found = [what for what, there in more.items() if there]
            if found:
                return f"{name} with {found[0]}"
    return None


def fast_quantize_block(
    quantize_block: Callable[..., Any],
    settings: LoopSettings,
    report: EventSink,
    after_step: Callable[[], None],
) -> Callable[..., Any]:
    """Make a `SignRoundQuantizer.quantize_block` that tunes with `tune`, and a block that is unfit for it as before.

    `report` gets `BlockLoss`, `LoopChosen`, `CompileFailed` and `RoundingKept`; `after_step` is called after each step.
    """
    # By default inductor keeps the float16 scale in float32 inside a fused kernel: what is tuned would not be what is
    # stored (torch 2.13 on a CPU: 0.04 % of the weights on another level; with this none, bit for bit).
    exact: dict[str, Any] = {"emulate_precision_casts": True}
    compiled = settings.torch_compile
    fast = torch.compile(masked_loss, dynamic=False, options=exact) if compiled else masked_loss
    failed: set[tuple[str, ...]] = set()
    signature = inspect.signature(quantize_block)

    @functools.wraps(quantize_block)
    def tune_block(*args: Any, **kwargs: Any) -> Any:
        task = BlockTask.of(signature.bind(*args, **kwargs).arguments)
        reason = unfit(task)
        if reason is not None:
            report(LoopChosen(loop="auto-round", reason=f"the block has {reason}"))
            return quantize_block(*args, **kwargs)

        def run(step: Callable[..., torch.Tensor]) -> dict[str, Any]:
            return tune(task, step, settings, report, after_step)

        kind = tuple(sorted({type(module).__name__ for module in task.block.modules()}))
        if not compiled or kind in failed:
            return run(masked_loss)
        order = random.getstate()
        try:
            return run(fast)
        except Exception as error:
            if kind_of(error) != "compile":
                raise
            failed.add(kind)
            first = next(iter(str(error).splitlines()), "")
            text = f"torch.compile failed ({type(error).__name__}: {first[:200]}): tuned without it"
            report(CompileFailed(text=text))
        for name, module in list(task.block.named_modules()):
            if hasattr(module, "orig_layer"):
                _put(task.block, name, module.orig_layer)
        random.setstate(order)
        return run(masked_loss)

    return tune_block


def masked_loss(
    block: nn.Module, others: dict[str, Any], target: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Mean squared error of a block's output, float32, over the tokens that count. others: the block's arguments."""
    output = block(**others)
    output = output[0] if isinstance(output, (tuple, list)) else output
    if mask is not None:
        output, target = output * mask, target * mask
    return functional.mse_loss(output.float(), target.float())


def tune(
    task: BlockTask,
    step: Callable[..., torch.Tensor],
    settings: LoopSettings,
    report: EventSink,
    after_step: Callable[[], None],
) -> dict[str, Any]:
    """Do what `SignRoundQuantizer.quantize_block` (0.16.1) does: leave the block quantized, return its best parameters.

    step: `masked_loss`, compiled or not. `report` gets `BlockLoss`, and `RoundingKept` with `compare_last`.
    """
    from auto_round.compressors.utils import IndexSampler
    from auto_round.utils.device_manager import device_manager
    from auto_round.wrapper import unwrapper_block, wrapper_block

    quantizer, block, inputs, offload = task.quantizer, task.block, task.inputs, settings.offload
    device = torch.device(device_manager.device)
    wrapper_block(
        block, quantizer.enable_minmax_tuning, False, enable_torch_compile=False, device=device, enable_neuqi=False
    )
    wrappers = {name: module for name, module in block.named_modules() if hasattr(module, "orig_layer")}
    groups = sign_sgd.groups_by_rate(quantizer, wrappers.values())
    if not groups:
        unwrapper_block(block, {})
        return {}
    rates = [sign_sgd.rates(lr, quantizer.iters) for lr, _ in groups]
    parameters = [p for _, group in groups for p in group]
    bounded = [p for w in wrappers.values() for key, p in w.params.items() if key in {"min_scale", "max_scale"}]

    batch = quantizer.calibration_context.batch_size
    whole = min(len(inputs), batch * quantizer.gradient_accumulate_steps)
    masks = _masks(quantizer, task.input_ids)
    samples = BlockInputs(quantizer.block_forward, inputs, task.others, task.targets, masks, device)
    sampler = IndexSampler(len(inputs), whole)
    count = 1
    autocast = torch.autocast(
        device.type, dtype=quantizer.model_context.amp_dtype, enabled=bool(quantizer.model_context.amp)
    )

    def forward(piece: list[int], after: list[int]) -> torch.Tensor:
        arguments, target, mask = samples.get(piece)
        samples.fetch(after)
        with autocast, saved(offload, device):
            return step(block, arguments, target, mask)

    best: list[torch.Tensor] = []
    first = lowest = float("inf")
    best_at, at = 0, 0
    fakes = {name: FakeQuantized(wrapper) for name, wrapper in wrappers.items()}
    for name, fake in fakes.items():
        _put(block, name, fake)
    replaced = block.__dict__.get("forward")
    if getattr(replaced, "__func__", None) is type(block).forward:  # left there by calibration: no other block has it
        del block.forward
    try:
        order = sampler.next_batch()
        for at in range(quantizer.iters):
            found = []
            if masks:
                count = int(sum(masks[i].count_nonzero() for i in order))
            following = sampler.next_batch() if at + 1 < quantizer.iters else []
            pieces = cut(order, batch)
            for piece, after in zip(pieces, [*pieces[1:], following[:batch]], strict=True):
                loss = forward(piece, after) * (len(piece) / len(order))
                found.append(Loss(loss))
                torch.autograd.backward(loss * 1000)
                del loss
            total = sum(loss.read() for loss in found) / max(count, 1)
            first = total if at == 0 else first
            if total < lowest or (at == 0 and total != total):
                lowest, best_at = total, at
                best = sign_sgd.copied(parameters, best, offload)
            sign_sgd.update(groups, [rate[at] for rate in rates], bounded)
            after_step()
            order = following
        if settings.compare_last:
            pieces = cut(spread(len(inputs), whole, batch), batch)

            def lost() -> list[torch.Tensor]:
                return [fake.lost_groups() for fake in fakes.values()]

            sizes = [len(piece) for piece in pieces]
            best = better(parameters, best, offload, lambda: losses(forward, pieces), sizes, lost, report)
    finally:
        if replaced is not None:
            block.forward = replaced
        for name, wrapper in wrappers.items():
            _put(block, name, wrapper)
    where = {id(p): value for p, value in zip(parameters, best, strict=True)}
    chosen = {n: {key: where[id(p)] for key, p in w.params.items()} for n, w in wrappers.items()}
    with torch.no_grad():
        unwrapper_block(block, chosen)
    report(BlockLoss(before=_logged(first), after=_logged(lowest), iteration=best_at))
    return chosen


def _logged(loss: float) -> float:
    """Round a loss as auto-round does where it logs one, so that those of both loops can be compared."""
    return float(f"{loss:.3e}")


def saved(offload: bool, device: torch.device) -> AbstractContextManager[Any]:
    """Where a forward pass keeps what its backward pass needs."""
    return torch.autograd.graph.save_on_cpu(pin_memory=device.type == "cuda") if offload else nullcontext()


def _put(block: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(block.get_submodule(parent), last, module)


def _masks(quantizer: Any, input_ids: Any) -> list[torch.Tensor] | None:
    """Per sample `[1, s]` int64, 1 where a token counts; None if all do. Kept on the quantizer, as auto-round does."""
    if input_ids is None:
        return None
    if not hasattr(quantizer, "_cached_valid_token_mask"):
        quantizer._cached_valid_token_mask = quantizer._compute_valid_token_mask(input_ids)
    masks: list[torch.Tensor] | None = quantizer._cached_valid_token_mask
    return masks
