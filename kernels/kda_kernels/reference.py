"""KDA in plain torch, the reference that every kernel is measured against. Section numbers: docs/kda.md.

All functions take any floating-point dtype and compute in fp32, or in fp64 if the state is fp64.
Shapes: T tokens, H heads, K key channels, V value channels; states are V-first, [..., V, K].
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kda_kernels.checks import check_decode_values, check_prefill_values, check_spec_decode_values
from kda_kernels.interface import (
    DecodeArgs,
    KdaInputs,
    KdaParams,
    KdaState,
    PrefillArgs,
    PrefillCheckpoints,
    SpecDecodeArgs,
)

CHUNK_SIZE = 64
SUB_BLOCK = 16


def causal_conv1d(x: Tensor, weight: Tensor, conv_state: Tensor) -> tuple[Tensor, Tensor]:
    """Section 2: depthwise causal convolution, then SiLU.

    x [T, C]; weight [C, W]; conv_state [W-1, C], the inputs before these, oldest first.
    Returns silu(y) [T, C] and the conv_state after the last token.
    """
    size = weight.shape[1]
    window = torch.cat([conv_state, x])
    y = torch.zeros_like(x)
    for tap in range(size):
        y = y + weight[:, tap] * window[tap : tap + x.shape[0]]
    return F.silu(y), window[window.shape[0] - size + 1 :]


def l2norm(x: Tensor) -> Tensor:
    """Section 2: x / sqrt(sum(x^2) + 1e-6) over the last dimension."""
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def kda_gate(g: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """Section 3: the log-decay -exp(A_log) * softplus(g + dt_bias), not bounded below.

    g [..., H, K], the projection; A_log [H]; dt_bias [H*K]. Returns [..., H, K], nowhere above 0.
    """
    return -A_log.exp()[:, None] * F.softplus(g + dt_bias.view(g.shape[-2:]))


def recurrent_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Section 4, one token: decay, error against the decayed state, rank-1 write, read.

    q, k, g [..., K], q normalised and scaled, k normalised; v [..., V]; beta [...]; state [..., V, K].
    Returns o [..., V] and the next state.
    """
    state = state * g.exp()[..., None, :]
    error = beta[..., None] * (v - (state * k[..., None, :]).sum(-1))
    state = state + error[..., :, None] * k[..., None, :]
    return (state * q[..., None, :]).sum(-1), state


def recurrent_kda(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Section 4, token by token: the definition of the operator.

    q, k, g [T, H, K]; v [T, H, V]; beta [T, H]; state [H, V, K]. Returns o [T, H, V] and the last state.
    """
    o = torch.empty_like(v)
    for t in range(q.shape[0]):
        o[t], state = recurrent_step(q[t], k[t], v[t], g[t], beta[t], state)
    return o, state


def chunk_kda(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, chunk_size: int = CHUNK_SIZE
) -> tuple[Tensor, Tensor]:
    """Section 6: the same operator in chunks of `chunk_size` tokens; arguments and results as `recurrent_kda`."""
    # A step whose decay underflows to zero in this dtype may as well be the first that does: kept within
    # this bound, one huge step cannot absorb the steps after it in the prefix sum.
    info = torch.finfo(g.dtype)
    g = g.clamp(min=torch.tensor(info.tiny * info.eps, dtype=torch.float64).log().item() - 1.0)
    q, k, v, g, beta = (x.transpose(0, 1) for x in (q, k, v, g, beta))
    o = [v.new_empty(0, v.shape[0], v.shape[2])]
    for start in range(0, q.shape[1], chunk_size):
        rows = slice(start, start + chunk_size)
        part, state = _one_chunk(q[:, rows], k[:, rows], v[:, rows], g[:, rows], beta[:, rows], state)
        o.append(part.transpose(0, 1))
    return torch.cat(o), state


def _one_chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk of section 6, [H, C, ...] throughout; state [H, V, K]."""
    G = g.cumsum(1)
    Aqk, L = _decayed_products(q, k, G)
    L = (L * beta[..., None]).tril(-1)
    eye = torch.eye(L.shape[1], dtype=L.dtype, device=L.device)
    M = torch.linalg.solve_triangular(L + eye, torch.diag_embed(beta), upper=False, unitriangular=True)
    decay = G.exp()
    N = M @ v - (M @ (decay * k)) @ state.mT
    o = (decay * q) @ state.mT + Aqk @ N
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


def decode(args: DecodeArgs) -> None:
    """One token for each of T sequences."""
    check_decode_values(args)
    inputs, params, state, out = args.inputs, args.params, args.state, args.out
    out[args.state_indices <= 0] = 0
    tokens = (args.state_indices > 0).nonzero().squeeze(1)
    index = args.state_indices[tokens].long()
    dtype, heads = _compute_dtype(state), (params.heads, params.head_dim)
    window = torch.cat([state.conv[index], inputs.qkv[tokens, None]], 1)
    state.conv[index] = window[:, 1:]
    mixed = F.silu((window.to(dtype) * params.conv_weight.to(dtype).T).sum(1))
    q, k, v, g, beta = _operands(mixed, inputs.g[tokens].to(dtype), inputs.beta[tokens].to(dtype), params)
    o, after = recurrent_step(q, k, v, g, beta, state.recurrent[index].to(dtype))
    state.recurrent[index] = after.to(state.recurrent.dtype)
    gate = inputs.output_gate[tokens].to(dtype).unflatten(1, heads)
    out[tokens] = gated_norm(o, gate, params.norm_weight.to(dtype), params.norm_eps).flatten(1).to(out.dtype)


def prefill(args: PrefillArgs) -> None:
    """Runs of tokens of N sequences."""
    check_prefill_values(args)
    state, out, dtype = args.state, args.out, _compute_dtype(args.state)
    checkpoints = [] if args.checkpoints is None else _checkpoints(args.checkpoints)
    bounds, indices = args.cu_seqlens.tolist(), args.state_indices.tolist()
    initial = args.has_initial_state.tolist()
    for (start, end), index, has_initial_state in zip(pairwise(bounds), indices, initial, strict=True):
        if index <= 0:
            out[start:end] = 0
            continue
        conv, recurrent = state.conv[index].to(dtype), state.recurrent[index].to(dtype)
        if not has_initial_state:
            conv, recurrent = torch.zeros_like(conv), torch.zeros_like(recurrent)
        stops = {offset for offset, _ in checkpoints if start < offset < end}
        for begin, stop in pairwise([start, *sorted(stops), end]):
            tokens = slice(begin, stop)
            conv, recurrent = _run(args.inputs[tokens], args.params, conv, recurrent, out[tokens])
            targets = [target for offset, target in checkpoints if offset == stop and start < stop]
            for target in [*targets, *([index] if stop == end else [])]:
                state.conv[target] = conv.to(state.conv.dtype)
                state.recurrent[target] = recurrent.to(state.recurrent.dtype)


def spec_decode(args: SpecDecodeArgs) -> None:
    """Up to Q tokens of N sequences, as so many calls of `decode`."""
    check_spec_decode_values(args)
    state, out = args.state, args.out
    bounds, table = args.cu_seqlens.tolist(), args.state_indices.tolist()
    out[bounds[-1] :] = 0
    for n, (start, end) in enumerate(pairwise(bounds)):
        if table[n][0] <= 0:
            out[start:end] = 0
            continue
        before = table[n][int(args.num_accepted_tokens[n]) - 1] if start < end else 0
        for token, target in zip(range(start, end), table[n], strict=False):
            if target != before:
                state.conv[target], state.recurrent[target] = state.conv[before], state.recurrent[before]
            one, index = slice(token, token + 1), args.state_indices.new_tensor([target])
            decode(DecodeArgs(args.inputs[one], args.params, state, index, out[one]))
            before = target


def _checkpoints(checkpoints: PrefillCheckpoints) -> list[tuple[int, int]]:
    """(offset, state index) of those that are to be stored."""
    pairs = zip(checkpoints.checkpoint_offsets.tolist(), checkpoints.state_indices.tolist(), strict=True)
    return [(offset, index) for offset, index in pairs if index > 0]


def _run(inputs: KdaInputs, params: KdaParams, conv: Tensor, recurrent: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Sections 2 to 5 for tokens of one sequence, from the given states; returns the states after them."""
    dtype, heads = recurrent.dtype, (params.heads, params.head_dim)
    mixed, conv = causal_conv1d(inputs.qkv.to(dtype), params.conv_weight.to(dtype), conv)
    q, k, v, g, beta = _operands(mixed, inputs.g.to(dtype), inputs.beta.to(dtype), params)
    form = recurrent_kda if out.shape[0] < SUB_BLOCK else chunk_kda
    o, recurrent = form(q, k, v, g, beta, recurrent)
    gate = inputs.output_gate.to(dtype).unflatten(1, heads)
    out.copy_(gated_norm(o, gate, params.norm_weight.to(dtype), params.norm_eps).flatten(1))
    return conv, recurrent


def _compute_dtype(state: KdaState) -> torch.dtype:
    return torch.float64 if state.recurrent.dtype == torch.float64 else torch.float32


def _operands(mixed: Tensor, g: Tensor, beta: Tensor, params: KdaParams) -> tuple[Tensor, ...]:
    """Sections 2 and 3: convolved tokens [T, 3P] and gate projections -> q, k, v, g [T, H, D], beta [T, H]."""
    heads = (params.heads, params.head_dim)
    q, k, v = (x.unflatten(1, heads) for x in mixed.chunk(3, dim=1))
    g = kda_gate(g.unflatten(1, heads), params.A_log.to(mixed.dtype), params.dt_bias.to(mixed.dtype))
    return l2norm(q) * params.head_dim**-0.5, l2norm(k), v, g, torch.sigmoid(beta)
