"""The chunked gated delta rule in batched matrix products, to replace transformers' reference for models like Qwen3.5.

The reference (transformers 5.23, `torch_chunk_gated_delta_rule`) solves two triangular systems per chunk. Then it loops
over the chunks in Python and writes into one large tensor. If that is compiled, the loop is unrolled into a graph that
takes minutes to compile; if not, autograd copies the large tensor for every chunk. Here, the triangular matrix is
inverted blockwise, the loop over the chunks is one operator with its own backward pass (two small products per chunk),
and everything else is computed for all chunks at once. The results are equal except for rounding.

Per head, in chunks of 64 tokens (Yang et al., Gated Delta Networks, 2024):

    T = (I + tril(beta k k^T * decay, -1))^-1     u = T (beta v)      w = T (beta k e^cum)
    v'_t = u_t - w_t S_t       o_t = q_t e^cum S_t + (q k^T * decay) v'_t
    S_t+1 = e^last S_t + (k e^(last-cum))^T v'_t

In the shapes below, C is the length of a chunk, `n` the number of chunks, and `m` the batch size times the number of
value heads.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch
from torch.nn.functional import pad

CHUNK_LENGTH = 64
LEAF_SIDE = 16  # the side of the diagonal blocks that are inverted row by row
REFERENCE = "torch_chunk_gated_delta_rule"


@torch.library.custom_op("requant::unit_lower_inverse", mutates_args=())
def unit_lower_inverse(lower: torch.Tensor) -> torch.Tensor:
    """Compute `(I + lower)^-1` for strictly lower triangular `lower` `[m, side, side]` float32.

    `side` must be a multiple of 16. The diagonal blocks are inverted by forward substitution, then pairs of blocks are
    merged: the lower left corner of `[[A, 0], [C, B]]^-1` is `-B^-1 C A^-1`. Every intermediate is a block of the
    result, so none can become too large. The powers of `lower` would: for equal keys they reach 1e17.
    """
    m, side, _ = lower.shape
    result = torch.zeros_like(lower)
    diagonal = [slice(start, start + LEAF_SIDE) for start in range(0, side, LEAF_SIDE)]
    leaves = torch.stack([lower[:, block, block] for block in diagonal], 1).reshape(-1, LEAF_SIDE, LEAF_SIDE)
    inverses = torch.eye(LEAF_SIDE, dtype=lower.dtype, device=lower.device).repeat(len(leaves), 1, 1)
    for i in range(1, LEAF_SIDE):
        inverses[:, i, :i] = -torch.bmm(leaves[:, i : i + 1, :i], inverses[:, :i, :i])[:, 0]
    inverses = inverses.reshape(m, len(diagonal), LEAF_SIDE, LEAF_SIDE)
    for i, block in enumerate(diagonal):
        result[:, block, block] = inverses[:, i]
    size = LEAF_SIDE
    while size < side:
        for start in range(0, side, 2 * size):
            # The second block of the last pair can be shorter, or empty.
            first, second = slice(start, start + size), slice(start + size, start + 2 * size)
            if start + size < side:
                corner = torch.bmm(lower[:, second, first], result[:, first, first])
                result[:, second, first] = -torch.bmm(result[:, second, second], corner)
        size *= 2
    return result


@unit_lower_inverse.register_fake
def _(lower: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(lower)


def _inverse_setup(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(output)


def _inverse_backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
    (inverse,) = ctx.saved_tensors
    transposed = inverse.transpose(1, 2)
    return -torch.bmm(torch.bmm(transposed, grad), transposed).tril(-1)


unit_lower_inverse.register_autograd(_inverse_backward, setup_context=_inverse_setup)


@torch.library.custom_op("requant::delta_scan", mutates_args=())
def delta_scan(
    u: torch.Tensor, w: torch.Tensor, k: torch.Tensor, last: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute v' and the states S chunk by chunk.

    u is `[n, m, C, dv]` float32, w and k are `[n, m, C, dk]`, and last, the decay over a chunk, is `[n, m]` float32.

    Returns v' `[n, m, C, dv]` and the states before each chunk `[n, m, dk, dv]`, both in the dtype of w. The state is
    accumulated in float32.
    """
    n, m, _, dv = u.shape
    state = torch.zeros(m, w.shape[-1], dv, dtype=torch.float32, device=u.device)
    new, states = torch.empty_like(u, dtype=w.dtype), torch.empty(n, m, w.shape[-1], dv, dtype=w.dtype, device=u.device)
    for t in range(n):
        states[t].copy_(state)
        new[t].copy_(u[t] - torch.bmm(w[t], states[t]))
        state.mul_(last[t, :, None, None]).add_(torch.bmm(k[t].transpose(1, 2), new[t]))
    return new, states


@delta_scan.register_fake
def _(u: torch.Tensor, w: torch.Tensor, k: torch.Tensor, last: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    n, m, _, dv = u.shape
    return torch.empty_like(u, dtype=w.dtype), w.new_empty(n, m, w.shape[-1], dv)


@torch.library.custom_op("requant::delta_scan_backward", mutates_args=())
def delta_scan_backward(
    w: torch.Tensor, k: torch.Tensor, last: torch.Tensor, grad_new: torch.Tensor, grad_states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradients of `delta_scan` from those of its outputs, from the last chunk to the first.

    Returns the total gradient with respect to v' `[n, m, C, dv]` float32, and that with respect to the state after each
    chunk `[n, m, dk, dv]`.
    """
    n = w.shape[0]
    state = torch.zeros(grad_states.shape[1:], dtype=torch.float32, device=w.device)
    after, total = torch.empty_like(grad_states), torch.empty_like(grad_new, dtype=torch.float32)
    for t in range(n - 1, -1, -1):
        after[t].copy_(state)
        total[t].copy_(grad_new[t]).add_(torch.bmm(k[t], after[t]))
        step = torch.bmm(w[t].transpose(1, 2), total[t].to(w.dtype))
        state.mul_(last[t, :, None, None]).add_(grad_states[t]).sub_(step)
    return total, after


@delta_scan_backward.register_fake
def _(
    w: torch.Tensor, k: torch.Tensor, last: torch.Tensor, grad_new: torch.Tensor, grad_states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(grad_new, dtype=torch.float32), torch.empty_like(grad_states)


def _scan_setup(ctx: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    _, w, k, last = inputs
    new, states = output
    ctx.save_for_backward(w, k, last, new, states)


def _scan_backward(ctx: Any, grad_new: torch.Tensor, grad_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    w, k, last, new, states = ctx.saved_tensors
    total, after = delta_scan_backward(w, k, last, grad_new.contiguous(), grad_states.contiguous())
    grad_w = -(total.to(w.dtype) @ states.transpose(2, 3))
    grad_k = new @ after.transpose(2, 3)
    grad_last = (after.float() * states.float()).sum((2, 3))
    return total, grad_w, grad_k, grad_last


delta_scan.register_autograd(_scan_backward, setup_context=_scan_setup)


def _normalized(x: torch.Tensor) -> torch.Tensor:
    """Divide by the length of the last dimension's vectors, as the reference's l2norm does."""
    return x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + 1e-6)


def chunk_gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute the gated delta rule of query and key `[b, s, hk, dk]` and value `[b, s, hv, dv]`.

    `g`, the logarithm of the decay, and `beta` are `[b, s, hv]`.

    Returns the output in the shape and dtype of value, and None for the recurrent state. As in the reference, products
    are in autocast's dtype if autocast is on, otherwise in float32; sums and the state are in float32.
    """
    dtype, kind = query.dtype, query.device.type
    products = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    b, s, hv, dv = value.shape
    repeat = hv // key.shape[2]
    padding = -s % CHUNK_LENGTH

    def chunks(x: torch.Tensor) -> torch.Tensor:
        """Split `[b, s, h, ...]` into chunks `[n, m, C, ...]` float32, padded with zeros at the end."""
        if x.shape[2] != hv:
            x = x.repeat_interleave(repeat, dim=2)
        x = pad(x.float(), (0, 0) * (x.dim() - 2) + (0, padding))
        x = x.reshape(b, -1, CHUNK_LENGTH, hv, *x.shape[3:])
        order = (1, 0, 3, 2, 4) if x.dim() == 5 else (1, 0, 3, 2)
        return x.permute(order).reshape(x.shape[1], b * hv, CHUNK_LENGTH, *x.shape[4:])

    q, k, v, cum, bt = chunks(query), chunks(key), chunks(value), chunks(g).cumsum(-1), chunks(beta)[..., None]
    if use_qk_l2norm_in_kernel:
        q, k = _normalized(q), _normalized(k)
    q = q * key.shape[-1] ** -0.5
    above = torch.ones(CHUNK_LENGTH, CHUNK_LENGTH, dtype=torch.bool, device=q.device).triu(1)
    decay = (cum[..., :, None] - cum[..., None, :]).masked_fill(above, float("-inf")).exp()
    grown, last = cum.exp()[..., None], cum[..., -1]

    with torch.autocast(kind, enabled=False):
        system = ((k * bt).to(products) @ k.to(products).transpose(2, 3)).float() * decay
        inside = ((q.to(products) @ k.to(products).transpose(2, 3)).float() * decay).to(products)
        inverse = unit_lower_inverse(system.tril(-1).flatten(0, 1)).view(system.shape)
        u = inverse @ (v * bt)  # in float32, in which the reference solves for u
        w = (inverse @ (k * bt * grown)).to(products)
        kept = (k * (last[..., None] - cum).exp()[..., None]).to(products)
        new, states = delta_scan(u, w, kept, last.exp())
        out = (q * grown).to(products) @ states + inside @ new
    out = out.view(-1, b, hv, CHUNK_LENGTH, dv).permute(1, 0, 3, 2, 4).reshape(b, -1, hv, dv)[:, :s]
    return out.to(dtype).contiguous(), None


def modules_with_reference(model: torch.nn.Module) -> list[ModuleType]:
    """List the Python modules that define the model's layers and hold the reference, where it can be replaced.

    The replacement does not support the recurrent cache. So a model with it can be calibrated and tuned, but it cannot
    generate text.
    """
    names = sorted({type(layer).__module__ for layer in model.modules()})
    modules = (sys.modules.get(name) for name in names)
    return [module for module in modules if module is not None and hasattr(module, REFERENCE)]
