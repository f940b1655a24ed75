"""KDA in plain torch, the oracle that every kernel is measured against. Section numbers: docs/kda.md.

All functions take any floating-point dtype and compute in fp32, or in fp64 if the state is fp64.
Shapes: T rows, H heads, K key channels, V value channels; states are V-first, [..., V, K].
"""

from dataclasses import fields
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kda_kernels.types import (
    Exports,
    KdaInputs,
    KdaParams,
    KdaState,
    check_call,
    check_sequences,
    check_step_values,
    check_steps,
    check_values,
)

CHUNK = 64
SUB_BLOCK = 16


def causal_conv(rows: Tensor, weight: Tensor, history: Tensor) -> tuple[Tensor, Tensor]:
    """Section 2: depthwise causal convolution, then SiLU.

    rows [T, C]; weight [C, taps]; history [taps-1, C], the rows before these, oldest first.
    Returns silu(y) [T, C] and the history that follows the last row.
    """
    taps = weight.shape[1]
    window = torch.cat([history, rows])
    y = torch.zeros_like(rows)
    for tap in range(taps):
        y = y + weight[:, tap] * window[tap : tap + rows.shape[0]]
    return F.silu(y), window[window.shape[0] - taps + 1 :]


def normalise(x: Tensor) -> Tensor:
    """Section 2: x / sqrt(sum(x^2) + 1e-6) over the last dimension."""
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def log_decay(forget: Tensor, a_log: Tensor, dt_bias: Tensor) -> Tensor:
    """Section 3: g = -exp(a_log) * softplus(forget + dt_bias), not bounded below.

    forget [..., H, K]; a_log [H]; dt_bias [H*K]. Returns g [..., H, K], g <= 0.
    """
    z = forget + dt_bias.view(forget.shape[-2:])
    return -a_log.exp()[:, None] * F.softplus(z)


def step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Section 4, one token: decay, error against the decayed state, rank-1 write, read.

    q, k, g [..., K], q normalised and scaled, k normalised; v [..., V]; beta [...]; state [..., V, K].
    Returns o [..., V] and the next state.
    """
    state = state * g.exp()[..., None, :]
    error = beta[..., None] * (v - (state * k[..., None, :]).sum(-1))
    state = state + error[..., :, None] * k[..., None, :]
    return (state * q[..., None, :]).sum(-1), state


def recurrence(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Section 4, token by token: the definition of the operator.

    q, k, g [T, H, K]; v [T, H, V]; beta [T, H]; state [H, V, K]. Returns o [T, H, V] and the last state.
    """
    o = torch.empty_like(v)
    for t in range(q.shape[0]):
        o[t], state = step(q[t], k[t], v[t], g[t], beta[t], state)
    return o, state


def chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Section 6: the same operator in chunks of `chunk` rows; arguments and results as `recurrence`."""
    # A step whose decay underflows to zero in this dtype may as well be the first that does: kept within
    # this bound, one huge step cannot absorb the steps after it in the prefix sum.
    info = torch.finfo(g.dtype)
    g = g.clamp(min=torch.tensor(info.tiny * info.eps, dtype=torch.float64).log().item() - 1.0)
    q, k, v, g, beta = (x.transpose(0, 1) for x in (q, k, v, g, beta))
    o = [v.new_empty(0, v.shape[0], v.shape[2])]
    for start in range(0, q.shape[1], chunk):
        rows = slice(start, start + chunk)
        part, state = _one_chunk(q[:, rows], k[:, rows], v[:, rows], g[:, rows], beta[:, rows], state)
        o.append(part.transpose(0, 1))
    return torch.cat(o), state


def _one_chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk of section 6, [H, C, ...] throughout; state [H, V, K]."""
    G = g.cumsum(1)
    P, L = _decayed_products(q, k, G)
    L = (L * beta[..., None]).tril(-1)
    eye = torch.eye(L.shape[1], dtype=L.dtype, device=L.device)
    M = torch.linalg.solve_triangular(L + eye, torch.diag_embed(beta), upper=False, unitriangular=True)
    decay = G.exp()
    N = M @ v - (M @ (decay * k)) @ state.mT
    o = (decay * q) @ state.mT + P @ N
    last = G[:, -1:]
    return o, state * last.exp() + N.mT @ ((last - G).exp() * k)


def _decayed_products(q: Tensor, k: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """Section 7: sum_i x_r[i] k_c[i] exp(G_r[i] - G_c[i]) for c <= r, zero above, for x = q and x = k.

    exp(G_r) * exp(-G_c) would overflow, so no exponent here is positive: blocks below the diagonal are
    anchored at the first row of their row block, diagonal blocks take the difference first.
    """
    heads, rows, _ = q.shape
    results = [q.new_zeros(heads, rows, rows) for _ in range(2)]
    for start in range(0, rows, SUB_BLOCK):
        here, before = slice(start, start + SUB_BLOCK), slice(0, start)
        anchor = G[:, start : start + 1]
        left = (G[:, here] - anchor).exp()
        right = k[:, before] * (anchor - G[:, before]).exp()
        difference = G[:, here, None] - G[:, None, here]
        above = torch.ones(difference.shape[1:3], dtype=torch.bool, device=q.device).triu(1)
        diagonal = difference.masked_fill(above[:, :, None], -torch.inf).exp()
        for x, result in zip((q, k), results, strict=True):
            result[:, here, before] = (x[:, here] * left) @ right.mT
            result[:, here, here] = torch.einsum("hri,hci,hrci->hrc", x[:, here], k[:, here], diagonal)
    return results[0], results[1]


def gated_norm(o: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Section 5: RMSNorm over the last dimension of o [..., V], times weight [V], times sigmoid(gate)."""
    return o * torch.rsqrt((o * o).mean(-1, keepdim=True) + eps) * weight * torch.sigmoid(gate)


def decode(inputs: KdaInputs, params: KdaParams, state: KdaState, slots: Tensor, out: Tensor) -> None:
    """One token for each of T sequences; arguments as `kda_kernels.ops.decode`."""
    count = inputs.qkv.shape[0]
    check_call(inputs, params, state, slots, out, count)
    check_values(list(range(count + 1)), slots.tolist(), count, state.conv.shape[0])
    out[slots <= 0] = 0
    rows = (slots > 0).nonzero().squeeze(1)
    index = slots[rows].long()
    dtype, heads = _compute_dtype(state), (params.heads, params.head_dim)
    window = torch.cat([state.conv[index], inputs.qkv[rows, None]], 1)
    state.conv[index] = window[:, 1:]
    mixed = F.silu((window.to(dtype) * params.conv_weight.to(dtype).T).sum(1))
    q, k, v, g, beta = _operands(mixed, inputs.forget[rows].to(dtype), inputs.beta[rows].to(dtype), params)
    o, after = step(q, k, v, g, beta, state.recurrent[index].to(dtype))
    state.recurrent[index] = after.to(state.recurrent.dtype)
    gate = inputs.gate[rows].to(dtype).unflatten(1, heads)
    out[rows] = gated_norm(o, gate, params.norm_weight.to(dtype), params.norm_eps).flatten(1).to(out.dtype)


def prefill(
    inputs: KdaInputs,
    params: KdaParams,
    state: KdaState,
    cu_seqlens: Tensor,
    slots: Tensor,
    resume: Tensor,
    out: Tensor,
    exports: Exports | None = None,
) -> None:
    """Runs of tokens of N sequences; arguments as `kda_kernels.ops.prefill`."""
    check_call(inputs, params, state, slots, out, check_sequences(cu_seqlens, slots, resume, exports))
    bounds = cu_seqlens.tolist()
    check_values(bounds, slots.tolist(), inputs.qkv.shape[0], state.conv.shape[0], exports)
    wanted = [] if exports is None else list(zip(exports.after.tolist(), exports.slots.tolist(), strict=True))
    dtype = _compute_dtype(state)
    for (start, end), slot, go_on in zip(pairwise(bounds), slots.tolist(), resume.tolist(), strict=True):
        if slot <= 0:
            out[start:end] = 0
            continue
        conv, recurrent = state.conv[slot].to(dtype), state.recurrent[slot].to(dtype)
        if not go_on:
            conv, recurrent = torch.zeros_like(conv), torch.zeros_like(recurrent)
        stops = {after for after, target in wanted if target > 0 and start < after < end}
        for begin, stop in pairwise([start, *sorted(stops), end]):
            rows = slice(begin, stop)
            conv, recurrent = _run(_rows(inputs, rows), params, conv, recurrent, out[rows])
            targets = [target for after, target in wanted if after == stop and target > 0 and start < stop]
            for target in [*targets, *([slot] if stop == end else [])]:
                state.conv[target] = conv.to(state.conv.dtype)
                state.recurrent[target] = recurrent.to(state.recurrent.dtype)


def verify(
    inputs: KdaInputs,
    params: KdaParams,
    state: KdaState,
    cu_seqlens: Tensor,
    slots: Tensor,
    accepted: Tensor,
    out: Tensor,
) -> None:
    """Up to K tokens of N sequences, as so many calls of `decode`; arguments as `kda_kernels.ops.verify`."""
    sequences, steps = check_steps(cu_seqlens, slots, accepted)
    check_call(inputs, params, state, slots.view(-1), out, sequences * steps)
    bounds, table = cu_seqlens.tolist(), slots.tolist()
    check_step_values(bounds, table, accepted.tolist(), inputs.qkv.shape[0], state.conv.shape[0])
    out[bounds[-1] :] = 0
    for n, (start, end) in enumerate(pairwise(bounds)):
        if table[n][0] <= 0:
            out[start:end] = 0
            continue
        before = table[n][int(accepted[n]) - 1] if start < end else 0
        for row, target in zip(range(start, end), table[n], strict=False):
            if target != before:
                state.conv[target], state.recurrent[target] = state.conv[before], state.recurrent[before]
            rows, slot = slice(row, row + 1), slots.new_tensor([target])
            decode(_rows(inputs, rows), params, state, slot, out[rows])
            before = target


def _rows(inputs: KdaInputs, rows: slice) -> KdaInputs:
    return KdaInputs(*(getattr(inputs, field.name)[rows] for field in fields(inputs)))


def _run(inputs: KdaInputs, params: KdaParams, conv: Tensor, recurrent: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Sections 2 to 5 for rows of one sequence, from the given states; returns the states after them."""
    dtype, heads = recurrent.dtype, (params.heads, params.head_dim)
    mixed, conv = causal_conv(inputs.qkv.to(dtype), params.conv_weight.to(dtype), conv)
    q, k, v, g, beta = _operands(mixed, inputs.forget.to(dtype), inputs.beta.to(dtype), params)
    form = recurrence if out.shape[0] < SUB_BLOCK else chunked
    o, recurrent = form(q, k, v, g, beta, recurrent)
    gate = inputs.gate.to(dtype).unflatten(1, heads)
    out.copy_(gated_norm(o, gate, params.norm_weight.to(dtype), params.norm_eps).flatten(1))
    return conv, recurrent


def _compute_dtype(state: KdaState) -> torch.dtype:
    return torch.float64 if state.recurrent.dtype == torch.float64 else torch.float32


def _operands(mixed: Tensor, forget: Tensor, beta: Tensor, params: KdaParams) -> tuple[Tensor, ...]:
    """Sections 2 and 3: convolved rows [T, 3P] and gate projections -> q, k, v, g [T, H, D], beta [T, H]."""
    heads = (params.heads, params.head_dim)
    q, k, v = (x.unflatten(1, heads) for x in mixed.chunk(3, dim=1))
    g = log_decay(forget.unflatten(1, heads), params.a_log.to(mixed.dtype), params.dt_bias.to(mixed.dtype))
    return normalise(q) * params.head_dim**-0.5, normalise(k), v, g, torch.sigmoid(beta)
