"""The chunked gated delta rule in batched matrix products, in place of transformers' reference for Qwen3.5 and kin.

The reference (transformers 5.23, `torch_chunk_gated_delta_rule`) solves two triangular systems per chunk and then walks
the chunks in Python, writing into one large tensor. Compiled, that loop is unrolled into a graph that takes minutes to
compile; not compiled, autograd copies the large tensor for every chunk. Here the triangular matrix is inverted
blockwise, the walk over the chunks is one operator with a backward pass of its own (two small products a chunk), and
everything else is done for all chunks at once. Same function, same result but for rounding.

Per head, in chunks of 64 tokens (Yang et al., Gated Delta Networks, 2024):

    T = (I + tril(beta k k^T * decay, -1))^-1     u = T (beta v)      w = T (beta k e^cum)
    v'_t = u_t - w_t S_t       o_t = q_t e^cum S_t + (q k^T * decay) v'_t
    S_t+1 = e^last S_t + (k e^(last-cum))^T v'_t
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch
from torch.nn.functional import pad

CHUNK_LENGTH = 64
LEAF_SIDE = 16  # side of the diagonal blocks that are inverted row by row
REFERENCE = "torch_chunk_gated_delta_rule"


@torch.library.custom_op("requant::unit_lower_inverse", mutates_args=())
def unit_lower_inverse(lower: torch.Tensor) -> torch.Tensor:
    """`(I + lower)^-1` for strictly lower triangular `lower` `[m, n, n]` float32, n a multiple of 16.

    Diagonal blocks by forward substitution, then pairs of blocks are merged: `[[A, 0], [C, B]]^-1` has
    `-B^-1 C A^-1` in its corner. Every intermediate is a block of the result, so nothing can grow on the way (as the
    powers of `lower` would, which for equal keys reach 1e17).
    """
    m, n, _ = lower.shape
    result = torch.zeros_like(lower)
    blocks = n // LEAF_SIDE
    leaf = torch.stack([lower[:, s : s + LEAF_SIDE, s : s + LEAF_SIDE] for s in range(0, n, LEAF_SIDE)], 1).reshape(
        -1, LEAF_SIDE, LEAF_SIDE
    )
    inverse = torch.eye(LEAF_SIDE, dtype=lower.dtype, device=lower.device).repeat(m * blocks, 1, 1)
    for i in range(1, LEAF_SIDE):
        inverse[:, i, :i] = -torch.bmm(leaf[:, i : i + 1, :i], inverse[:, :i, :i])[:, 0]
    inverse = inverse.reshape(m, blocks, LEAF_SIDE, LEAF_SIDE)
    for b in range(blocks):
        result[:, b * LEAF_SIDE : (b + 1) * LEAF_SIDE, b * LEAF_SIDE : (b + 1) * LEAF_SIDE] = inverse[:, b]
    size = LEAF_SIDE
    while size < n:
        for s in range(0, n, 2 * size):
            first, second = slice(s, s + size), slice(s + size, s + 2 * size)  # the last may be shorter, or empty
            if s + size < n:
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
    """Walk the chunks: u `[n, m, C, dv]` float32, w and k `[n, m, C, dk]`, last `[n, m]` float32 (decay over a chunk).

    Returns v' with u's shape, and the states before each chunk `[n, m, dk, dv]`, both in w's dtype. The state itself is
    float32.
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
    """The walk back. Returns the gradients by each v' (whole), float32, and by the state after each chunk."""
    n = w.shape[0]
    state = torch.zeros(grad_states.shape[1:], dtype=torch.float32, device=w.device)
    after, whole = torch.empty_like(grad_states), torch.empty_like(grad_new, dtype=torch.float32)
    for t in range(n - 1, -1, -1):
        after[t].copy_(state)
        whole[t].copy_(grad_new[t]).add_(torch.bmm(k[t], after[t]))
        step = torch.bmm(w[t].transpose(1, 2), whole[t].to(w.dtype))
        state.mul_(last[t, :, None, None]).add_(grad_states[t]).sub_(step)
    return whole, after


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
    whole, after = delta_scan_backward(w, k, last, grad_new.contiguous(), grad_states.contiguous())
    grad_w = -(whole.to(w.dtype) @ states.transpose(2, 3))
    grad_k = new @ after.transpose(2, 3)
    grad_last = (after.float() * states.float()).sum((2, 3))
    return whole, grad_w, grad_k, grad_last


delta_scan.register_autograd(_scan_backward, setup_context=_scan_setup)


def _normalized(x: torch.Tensor) -> torch.Tensor:
    """The reference's l2norm."""
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
    """query, key `[b, s, hk, dk]`, value `[b, s, hv, dv]`, g (log decay) and beta `[b, s, hv]` -> like value, None.

    The products are in autocast's dtype where that is on, else float32, as in the reference; sums and the state in
    float32.
    """
    dtype, kind = query.dtype, query.device.type
    products = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    b, s, hv, dv = value.shape
    repeat = hv // key.shape[2]
    padding = -s % CHUNK_LENGTH

    def chunks(x: torch.Tensor) -> torch.Tensor:
        """`[b, s, h, ...]` -> float32 `[n, b * hv, C, ...]`"""
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
        u = inverse @ (v * bt)  # in float32, as the reference solves for them
        w = (inverse @ (k * bt * grown)).to(products)
        kept = (k * (last[..., None] - cum).exp()[..., None]).to(products)
        new, states = delta_scan(u, w, kept, last.exp())
        out = (q * grown).to(products) @ states + inside @ new
    out = out.view(-1, b, hv, CHUNK_LENGTH, dv).permute(1, 0, 3, 2, 4).reshape(b, -1, hv, dv)[:, :s]
    return out.to(dtype).contiguous(), None


def modules_with_reference(model: torch.nn.Module) -> list[ModuleType]:
    """Find the modules that define the model's layers and hold the reference, for the rule above to take its place.

    The recurrent cache is not supported: a model prepared so can be calibrated and tuned, not generate.
    """
    names = sorted({type(module).__module__ for module in model.modules()})
    modules = (sys.modules.get(name) for name in names)
    return [module for module in modules if module is not None and hasattr(module, REFERENCE)]
