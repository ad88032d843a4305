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

import random
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from requant.tasks.quantizing.events import kind_of
from requant.tasks.quantizing.loop import sign_sgd
from requant.tasks.quantizing.loop.batches import Loss, Samples, cut
from requant.tasks.quantizing.loop.best_iteration import better, losses, spread, without_scale

Report = Callable[..., None]
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


def unfit(quantizer: Any, block: nn.Module, inputs: Any, others: dict[str, Any]) -> str | None:
    """Why a block needs auto-round's own loop; None if it does not."""
    config = quantizer.config
    if type(quantizer).__name__ != "SignRoundQuantizer" or quantizer.momentum or quantizer.enable_norm_bias_tuning:
        return "another algorithm than plain sign descent"
    if quantizer.enable_lfq or quantizer.enable_alg_ext or quantizer.lr_scheduler is not None:
        return "an extension of sign descent"
    if quantizer.not_use_best_mse or quantizer.dynamic_max_gap > 0 or getattr(config, "enable_neuqi", False):
        return "an early end, or a search before it"
    if not isinstance(inputs, list) or quantizer.iters < 1 or others.get("positional_inputs") or "alibi" in others:
        return "inputs that are not a list of samples"
    for name, layer in block.named_modules():
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


def install(settings: Mapping[str, Any], report: Report, after_step: Callable[[], None] = lambda: None) -> None:
    """Make auto-round tune through this module.

    settings, as `choose` settles them: torch_compile (one step of each kind of block; where that fails the kind is
    tuned without), offload (what the backward pass needs waits in the CPU's memory), compare_last (see
    best_iteration.py). `report` gets the events `loop`, `fallback` and `kept`.
    """
    from auto_round.algorithms.quantization.sign_round.quantizer import SignRoundQuantizer

    original = SignRoundQuantizer.quantize_block
    # By default inductor keeps the float16 scale in float32 inside a fused kernel: what is tuned would not be what is
    # stored (torch 2.13 on a CPU: 0.04 % of the weights on another level; with this none, bit for bit).
    exact: dict[str, Any] = {"emulate_precision_casts": True}
    compiled, offload = settings["torch_compile"], settings["offload"]
    fast = torch.compile(masked_loss, dynamic=False, options=exact) if compiled else masked_loss
    failed: set[tuple[str, ...]] = set()

    def quantize_block(
        self: Any, block: Any, fp_inputs: Any, input_others: Any, fp_outputs: Any, q_inputs: Any, block_ctx: Any,
        input_ids: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        inputs = q_inputs if q_inputs is not None and self.enable_quanted_input else fp_inputs
        reason = unfit(self, block, inputs, input_others)
        if reason is not None:
            report("loop", loop="auto-round", reason=f"the block has {reason}")
            return original(
                self, block, fp_inputs, input_others, fp_outputs, q_inputs, block_ctx, input_ids=input_ids, **kwargs
            )

        def run(step: Callable[..., torch.Tensor]) -> dict[str, Any]:
            compare = report if settings["compare_last"] else None
            return tune(self, block, inputs, input_others, fp_outputs, input_ids, step, offload, compare, after_step)

        kind = tuple(sorted({type(module).__name__ for module in block.modules()}))
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
            report("fallback", text=f"torch.compile failed ({type(error).__name__}: {first[:200]}): tuned without it")
        for name, module in list(block.named_modules()):
            if hasattr(module, "orig_layer"):
                _put(block, name, module.orig_layer)
        random.setstate(order)
        return run(masked_loss)

    SignRoundQuantizer.quantize_block = quantize_block


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
    quantizer: Any,
    block: nn.Module,
    inputs: list[torch.Tensor],
    others: dict[str, Any],
    targets: list[torch.Tensor],
    input_ids: Any,
    step: Callable[..., torch.Tensor],
    offload: bool,
    compare: Report | None,
    after_step: Callable[[], None],
) -> dict[str, Any]:
    """`SignRoundQuantizer.quantize_block` (0.16.1): leaves the block quantized, returns its best parameters.

    compare: None, or what gets the event `kept` of comparing the parameters of the lowest batch with the last ones.
    """
    from auto_round.compressors.utils import IndexSampler
    from auto_round.logger import logger
    from auto_round.utils.device_manager import device_manager
    from auto_round.wrapper import unwrapper_block, wrapper_block

    device = torch.device(device_manager.device)
    names, kept = wrapper_block(
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
    masks = _masks(quantizer, input_ids)
    samples = Samples(quantizer.block_forward, inputs, others, targets, masks, device)
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
        if compare is not None:
            pieces = cut(spread(len(inputs), whole, batch), batch)

            def lost() -> list[torch.Tensor]:
                return [fake.lost_groups() for fake in fakes.values()]

            sizes = [len(piece) for piece in pieces]
            best = better(parameters, best, offload, lambda: losses(forward, pieces), sizes, lost, compare)
    finally:
        if replaced is not None:
            block.forward = replaced
        for name, wrapper in wrappers.items():
            _put(block, name, wrapper)
    where = {id(p): value for p, value in zip(parameters, best, strict=True)}
    chosen = {n: {key: where[id(p)] for key, p in w.params.items()} for n, w in wrappers.items()}
    with torch.no_grad():
        unwrapper_block(block, chosen)
    logger.infoclean(
        f"quantized {len(names)}/{len(names) + len(kept)} layers in the block, "
        f"loss iter 0: {first:.3e} -> iter {best_at}: {lowest:.3e}"
    )
    return chosen


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
