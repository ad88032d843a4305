"""Our tuning loop for a block: the same steps on the same samples as auto-round's, arranged for a GPU.

What auto-round 0.16.1 does around the arithmetic, and what this loop does instead (`make bench-gpu` measures both):

- It gathers each batch on the CPU and copies it from pageable memory. Here, the samples are on the GPU, or in pinned
  memory and fetched one batch ahead.
- It copies the best parameters to the CPU each time the loss falls, 1.5 GB at 27 B dimensions. Here, they stay on the
  GPU.
- It waits for the loss of each step before it starts the backward pass. Here, the loss is read while that runs.
- It compiles a block with wrappers that hold their own functions, so that it compiles each block of a model anew. Here,
  each kind of block is compiled once.
- It quantizes the weights of each layer, and updates its parameters, one by one. Here, all are one matrix of groups.
- With accumulation, it adds up the squared errors instead of taking their mean, and the gradients of the scales, which
  pass through float16, overflow. Here, a batch in pieces has the same gradients as the batch at once.

Everything else is auto-round's: its wrappers, its quantization function, its sampler, its schedule and its loss. Blocks
that need more than this loop supports are tuned by auto-round's loop (`reason_for_other_loop`).

The one difference in the result, `compare_last`, is described in best_iteration.py.
"""

from __future__ import annotations

import functools
import inspect
import math
import random
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from requant.tasks.quantizing.auto_settings import LoopSettings
from requant.tasks.quantizing.events import BlockLoss, CompileFailed, EventSink, LoopChosen, StepsTimed
from requant.tasks.quantizing.failures import FailureKind, classify
from requant.tasks.quantizing.loop import sign_sgd
from requant.tasks.quantizing.loop.batches import BlockInputs, Loss, split
from requant.tasks.quantizing.loop.best_iteration import better_parameters, losses_of, spread_indices
from requant.tasks.quantizing.loop.flat_weights import SCALES, FakeQuantize, fake_quantize, flat_weights, parameters_of
from requant.tasks.quantizing.loop.ranks import ALONE, Ranks

SUPPORTED = (nn.Linear, Conv1D)
OTHER_FORMATS = ("super_bits", "imatrix", "init_scale", "awq_clip_max")
BestParameters = dict[str, dict[str, torch.Tensor]]  # by the layer's name in the block, then the parameter's


@dataclass(frozen=True)
class BlockTask:
    """A block to tune: the arguments of `SignRoundQuantizer.quantize_block` (auto-round 0.16.1).

    quantizer    the SignRoundQuantizer, which holds iters, the learning rates and the context of the run
    block        the block; its layers to quantize have the attributes bits, group_size, scale_dtype and so on
    inputs       the block's inputs per sample, `[1, s, hidden]`; auto-round may use the outputs of quantized blocks
    others       the other arguments of the block's forward pass
    targets      the outputs of the block in full precision for the base's inputs, per sample `[1, s, hidden]`
    input_ids    the tokens per sample, `[1, s]`, to find padding, which does not count; None if all tokens count
    """

    quantizer: Any
    block: nn.Module
    inputs: list[torch.Tensor]
    others: dict[str, object]
    targets: list[torch.Tensor]
    input_ids: Any

    @classmethod
    def of(cls, call: inspect.BoundArguments) -> BlockTask:
        """Read the task from the arguments of a call of `quantize_block`."""
        given = call.arguments
        quantizer, q_inputs = given["self"], given["q_inputs"]
        return cls(
            quantizer=quantizer,
            block=given["block"],
            inputs=q_inputs if q_inputs is not None and quantizer.enable_quanted_input else given["fp_inputs"],
            others=given["input_others"],
            targets=given["fp_outputs"],
            input_ids=given.get("input_ids"),
        )


def reason_for_other_loop(task: BlockTask) -> str | None:
    """Say what a block has that only auto-round's loop supports; None if our loop can tune it."""
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
            unsupported = {
                "hooks": layer._forward_hooks or layer._forward_pre_hooks,
                "parameters of another format": [a for a in OTHER_FORMATS if getattr(layer, a, None) is not None],
                f"the type {type(layer).__name__}": type(layer) is not nn.Linear,
                f"data type {layer.data_type}": layer.data_type not in {"int", "int_sym", "int_asym"},
                "quantized activations": layer.act_bits <= 8,
                "no weight yet": layer.weight.device.type == "meta",
            }
            reasons = [reason for reason, applies in unsupported.items() if applies]
            if reasons:
                return f"{name} with {reasons[0]}"
    return None


def fast_quantize_block(
    quantize_block: Callable[..., Any],
    settings: LoopSettings,
    report: EventSink,
    after_step: Callable[[], None],
    ranks: Ranks = ALONE,
) -> Callable[..., Any]:
    """Wrap `SignRoundQuantizer.quantize_block` to tune blocks with `tune`, unless only auto-round's loop supports them.

    `report` gets `BlockLoss`, `StepsTimed`, `LoopChosen`, `CompileFailed` and `RoundingKept`. `after_step` is called
    after each step.
    """
    eager = StepFunctions(masked_loss, fake_quantize)
    compiled = eager.compiled() if settings.torch_compile else None
    kinds_that_failed: set[tuple[str, ...]] = set()
    signature = inspect.signature(quantize_block)

    @functools.wraps(quantize_block)
    def tune_block(*args: Any, **kwargs: Any) -> Any:
        task = BlockTask.of(signature.bind(*args, **kwargs))
        reason = reason_for_other_loop(task)
        if reason is not None:
            report(LoopChosen(loop="auto-round", reason=f"the block has {reason}"))
            return quantize_block(*args, **kwargs)

        def tune_with(functions: StepFunctions) -> BestParameters:
            return tune(task, functions, settings, report, after_step, ranks)

        kind = tuple(sorted({type(module).__name__ for module in task.block.modules()}))
        if compiled is None or kind in kinds_that_failed:
            return tune_with(eager)
        random_state = random.getstate()
        try:
            return tune_with(compiled)
        except Exception as error:
            if classify(error) is not FailureKind.COMPILE:
                raise
            kinds_that_failed.add(kind)
            first_line = next(iter(str(error).splitlines()), "")
            text = f"torch.compile failed ({type(error).__name__}: {first_line[:200]}): tuned without it"
            report(CompileFailed(text=text))
        for name, module in list(task.block.named_modules()):
            if hasattr(module, "orig_layer"):
                _replace_module(task.block, name, module.orig_layer)
        random.setstate(random_state)
        return tune_with(eager)

    return tune_block


@dataclass(frozen=True)
class StepFunctions:
    """What a step computes, compiled or not: `masked_loss`, and `fake_quantize` for the weights."""

    loss: Callable[..., torch.Tensor]
    quantize: FakeQuantize

    def compiled(self) -> StepFunctions:
        """Compile both, for each shape anew.

        By default, inductor keeps the float16 scale in float32 inside a fused kernel, so that the tuned weight would
        differ from the stored one. With torch 2.13 on a CPU, 0.04 % of the weights were on another level; with this
        option none, bit for bit.
        """
        compile_function = functools.partial(torch.compile, dynamic=False, options={"emulate_precision_casts": True})
        return StepFunctions(compile_function(self.loss), compile_function(self.quantize))


def masked_loss(
    block: nn.Module, arguments: dict[str, object], target: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Compute the mean squared error of a block's output, in float32; tokens outside the mask count as correct."""
    output = block(**arguments)
    output = output[0] if isinstance(output, (tuple, list)) else output
    if mask is not None:
        output, target = output * mask, target * mask
    return functional.mse_loss(output.float(), target.float())


def tune(
    task: BlockTask,
    functions: StepFunctions,
    settings: LoopSettings,
    report: EventSink,
    after_step: Callable[[], None],
    ranks: Ranks = ALONE,
) -> BestParameters:
    """Quantize a block in place as `SignRoundQuantizer.quantize_block` (0.16.1) does, and return its best parameters.

    `report` gets `BlockLoss`, `StepsTimed`, and with `compare_last` `RoundingKept`.
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
    flats = flat_weights(wrappers, ranks)
    if not flats:
        unwrapper_block(block, {})
        return {}
    groups = sign_sgd.group_parameters(quantizer, flats)
    step_sizes = [sign_sgd.step_sizes(group.learning_rate, quantizer.iters) for group in groups]
    parameters = parameters_of(flats)
    bounded = parameters_of(flats, SCALES)

    batch_size = quantizer.calibration_context.batch_size
    step_samples = min(len(inputs), batch_size * quantizer.gradient_accumulate_steps)
    masks = _masks(quantizer, task.input_ids)
    samples = BlockInputs(quantizer.block_forward, inputs, task.others, task.targets, masks, device)
    sampler = IndexSampler(len(inputs), step_samples)
    autocast = torch.autocast(
        device.type, dtype=quantizer.model_context.amp_dtype, enabled=bool(quantizer.model_context.amp)
    )

    def forward(piece: list[int], next_piece: list[int]) -> torch.Tensor:
        batch = samples.get(piece)
        samples.fetch(next_piece)
        with autocast, saved_tensors(offload, device):
            return functions.loss(block, batch.arguments, batch.target, batch.mask)

    def dequantize() -> None:
        for flat in flats:
            flat.dequantize(functions.quantize, saved_tensors(offload, device))

    def compute_gradients(indices: list[int], next_indices: list[int]) -> float:
        """Compute the gradients of the parameters over these samples, and return the loss."""
        dequantize()
        # auto-round too divides a masked loss by the number of tokens that count, and an unmasked one by nothing.
        divisor = int(sum(masks[i].count_nonzero() for i in indices)) if masks else 1
        pieces, following = (split(ranks.share(of), batch_size) for of in (indices, next_indices))
        total = torch.zeros((), dtype=torch.float64, device=device)
        rounds = ranks.rounds(indices, batch_size)
        for number in range(rounds):
            is_last, loss = number == rounds - 1, None
            if number < len(pieces):
                next_piece = next(iter([*pieces[number + 1 :], *following]), [])
                loss = forward(pieces[number], next_piece) * (len(pieces[number]) / len(indices))
                total += loss.detach()
            if is_last:
                read_later = Loss(ranks.sum(total))
            if loss is not None:
                torch.autograd.backward(loss * 1000)  # auto-round scales the loss so.
                del loss
            for flat in flats:
                flat.backward(more=not is_last)
        return read_later.read() / max(divisor, 1)

    best: list[torch.Tensor] = []
    ends_s = [time.monotonic()]
    first_loss = lowest_loss = float("inf")
    best_iteration = 0
    for flat in flats:
        for name, module in flat.modules.items():
            _replace_module(block, name, module)
    # Calibration leaves a `forward` on the first block alone. Without it, all blocks of a kind share a compiled graph.
    own_forward = block.__dict__.get("forward")
    if getattr(own_forward, "__func__", None) is type(block).forward:
        del block.forward
    try:
        indices = sampler.next_batch()
        for iteration in range(quantizer.iters):
            next_indices = sampler.next_batch() if iteration + 1 < quantizer.iters else []
            step_loss = compute_gradients(indices, next_indices)
            first_loss = step_loss if iteration == 0 else first_loss
            if step_loss < lowest_loss or (iteration == 0 and math.isnan(step_loss)):
                lowest_loss, best_iteration = step_loss, iteration
                best = sign_sgd.copy_parameters(parameters, best, offload)
            sign_sgd.take_step(groups, [sizes[iteration] for sizes in step_sizes], bounded)
            after_step()
            ends_s.append(time.monotonic())
            indices = next_indices
        if settings.compare_last:
            pieces = split(spread_indices(len(inputs), step_samples, batch_size), batch_size)
            best = better_parameters(
                parameters,
                best,
                offload,
                lambda: losses_of(forward, pieces, dequantize, device, ranks),
                [len(piece) for piece in pieces],
                lambda: [flat.lost_groups() for flat in flats],
                report,
            )
    finally:
        if own_forward is not None:
            block.forward = own_forward
        for name, wrapper in wrappers.items():
            _replace_module(block, name, wrapper)
    best_of = {id(p): value for p, value in zip(parameters, best, strict=True)}
    chosen: BestParameters = {}
    for flat in flats:
        chosen |= flat.by_layer({key: best_of[id(p)] for key, p in flat.params.items()})
    with torch.no_grad():
        unwrapper_block(block, chosen)
    report(BlockLoss(before=_rounded(first_loss), after=_rounded(lowest_loss), iteration=best_iteration))
    steps_s = [end_s - began_s for began_s, end_s in pairwise(ends_s)]
    report(StepsTimed(first=round(steps_s[0], 4), median=round(statistics.median(steps_s[1:] or steps_s), 4)))
    return chosen


def _rounded(loss: float) -> float:
    """Round a loss as auto-round does in its log, so that the losses of both loops can be compared."""
    return float(f"{loss:.3e}")


def saved_tensors(offload: bool, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context for a forward pass: with `offload`, it saves tensors for backward in the CPU's memory."""
    return torch.autograd.graph.save_on_cpu(pin_memory=device.type == "cuda") if offload else nullcontext()


def _replace_module(block: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place that the dotted `name` has below the block."""
    parent, _, last = name.rpartition(".")
    setattr(block.get_submodule(parent), last, module)


def _masks(quantizer: Any, input_ids: Any) -> list[torch.Tensor] | None:
    """Return a mask per sample, `[1, s]` int64, with 1 for each token that counts; None if all tokens count.

    The masks are cached on the quantizer, as auto-round does.
    """
    if input_ids is None:
        return None
    if not hasattr(quantizer, "_cached_valid_token_mask"):
        quantizer._cached_valid_token_mask = quantizer._compute_valid_token_mask(input_ids)
    masks: list[torch.Tensor] | None = quantizer._cached_valid_token_mask
    return masks
