"""After the attention: residual and norm, the router with its choice of experts, the shared expert's first product.

The first programs have rows of the router, the others pairs of rows (gate and up) of the shared expert. The last of the
router's programs to end finds all logits and chooses the experts of every token, while the others still multiply.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from decode_kernels.cuda.dependent_launch import LAUNCH, launch_next, wait_for_last
from decode_kernels.cuda.linear import add_norm
from decode_kernels.cuda.vectors import add, dot_rows, load_rows, load_vector, rms_scale, split, store_vector
from decode_kernels.cuda.weights import PACKED, load_weight, multiply, stored
from decode_kernels.weights import Weight
from kda_kernels.cuda.elementwise import sigmoid, silu


@triton.jit
def _choose(
    logits, bias, ids, weights, tokens, scale, E: tl.constexpr, EP: tl.constexpr, TOP_K: tl.constexpr,
    TOP_KP: tl.constexpr, TOKENS: tl.constexpr, RENORMALIZE: tl.constexpr,
):  # fmt: skip
    """The TOP_K experts of the largest score + bias for each token, the first of equals; weighted by the scores."""
    token, expert, place = tl.arange(0, TOKENS), tl.arange(0, EP), tl.arange(0, TOP_KP)
    inside = (token[:, None] < tokens) & (expert[None, :] < E)
    # Past the first cache, which may hold what these addresses held a step ago.
    logit = tl.load(logits + token[:, None] * E + expert[None, :], mask=inside, other=0.0, cache_modifier=".cg")
    score = sigmoid(logit)
    score = tl.where(score == score, score, 0.0)  # not a number: an expert like any other, never one outside
    left = score + tl.load(bias + expert, mask=expert < E, other=0.0)[None, :]
    left = tl.where(expert[None, :] < E, left, float("-inf"))
    weight = tl.zeros([TOKENS, TOP_KP], tl.float32)
    for i in tl.static_range(TOP_K):
        best = tl.argmax(left, 1, tie_break_left=True)
        chosen = expert[None, :] == best[:, None]
        weight = tl.where(place[None, :] == i, tl.sum(tl.where(chosen, score, 0.0), 1)[:, None], weight)
        left = tl.where(chosen, float("-inf"), left)
        tl.store(ids + token * TOP_K + i, best, mask=token < tokens)
    if RENORMALIZE:
        weight /= tl.sum(weight, 1)[:, None] + 1e-20
    at = token[:, None] * TOP_K + place[None, :]
    tl.store(weights + at, weight * scale, mask=(token[:, None] < tokens) & (place[None, :] < TOP_K))


@triton.jit
def router_kernel(
    x, residual, norm_weight, router, bias, shared, shared_scales, normed, new_residual, logits, ids, weights,
    shared_out, done,
    x_stride, residual_stride, eps, scale, FORM: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr,
    K: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, TOP_K: tl.constexpr,
    TOP_KP: tl.constexpr, RENORMALIZE: tl.constexpr, INTER: tl.constexpr, TOKENS: tl.constexpr, PADDED: tl.constexpr,
    NORM: tl.constexpr, BN: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    ROUTING: tl.constexpr = (E + BN - 1) // BN  # programs
    launch_next()
    if NORM:
        n_head, n_tail = load_vector(norm_weight, K, HEAD, TAIL)
    if pid < ROUTING:
        row = pid * BN + tl.arange(0, BN)
        r_head, r_tail = load_rows(router, row, E, K, HEAD, TAIL)
        wait_for_last()
        for token in tl.static_range(TOKENS):
            if NORM:
                head, tail = add(x + token * x_stride, residual + token * residual_stride, K, HEAD, TAIL, True)
                scale_of_norm = rms_scale(head, tail, eps, K)
                if pid == 0:
                    store_vector(new_residual + token * K, head, tail, K, HEAD, TAIL)
                    n = head * scale_of_norm * n_head, tail * scale_of_norm * n_tail
                    store_vector(normed + token * K, n[0], n[1], K, HEAD, TAIL)
                logit = dot_rows(r_head, r_tail, head * n_head, tail * n_tail) * scale_of_norm
            else:
                head, tail = load_vector(normed + token * K, K, HEAD, TAIL)
                logit = dot_rows(r_head, r_tail, head, tail)
            tl.store(logits + token * E + row, logit, mask=row < E)
        tl.debug_barrier()  # all of this program's logits, then its ticket
        if tl.atomic_add(done, 1, sem="acq_rel", scope="gpu") == ROUTING - 1:
            _choose(logits, bias, ids, weights, TOKENS, scale, E, EP, TOP_K, TOP_KP, PADDED, RENORMALIZE)
            tl.store(done, 0)  # for the next step
    else:
        start = (pid - ROUTING) * PAIRS
        pair = start + tl.arange(0, PAIRS)
        STORED: tl.constexpr = K // 8 if FORM == PACKED else K  # elements of a row
        g_head, g_tail = load_weight(shared, pair, INTER, K, HEAD, TAIL, FORM)
        u_head, u_tail = load_weight(shared + INTER * STORED, pair, INTER, K, HEAD, TAIL, FORM)
        up_scales = shared_scales + SCALES
        wait_for_last()
        for token in tl.static_range(TOKENS):
            if NORM:
                head, tail = add(x + token * x_stride, residual + token * residual_stride, K, HEAD, TAIL, True)
                n = rms_scale(head, tail, eps, K)
                head, tail = head * n_head, tail * n_tail
            else:
                head, tail = load_vector(normed + token * K, K, HEAD, TAIL)
            gate = multiply(g_head, g_tail, head, tail, shared_scales, start, pair, INTER, K, HEAD, TAIL, FORM, GROUP)
            up = multiply(u_head, u_tail, head, tail, up_scales, start, pair, INTER, K, HEAD, TAIL, FORM, GROUP)
            if NORM:
                gate, up = gate * n, up * n
            out = silu(gate) * up
            tl.store(shared_out + token * INTER + pair, out.to(shared_out.dtype.element_ty), mask=pair < INTER)


def router(
    x: Tensor, residual: Tensor, norm_weight: Tensor | None, eps: float, gate: Tensor, bias: Tensor,
    shared: Weight | None, done: Tensor, *, top_k: int, renormalize: bool, scale: float, **tile: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Without norm_weight x is the norm already, behind `all_reduce_add_norm`."""
    tokens, (E, K) = x.shape[0], gate.shape
    width = 0 if shared is None else shared.shape[0] // 2
    values, scales, *form = stored(shared, gate)
    alone = tokens == 1 and norm_weight is not None  # then the norm is in the kernel
    tile = {"BN": 1 if tokens == 1 else 4, "PAIRS": 4, "num_warps": 4} | tile
    if norm_weight is None:
        normed, new_residual = x, residual
    elif alone:
        normed, new_residual = (x.new_empty(tokens, K) for _ in range(2))
    else:
        normed, new_residual = add_norm(x, residual, norm_weight, eps)
    logits = x.new_empty(tokens, E, dtype=torch.float32)
    ids = x.new_empty(tokens, top_k, dtype=torch.int32)
    weights = x.new_empty(tokens, top_k, dtype=torch.float32)
    shared_out = x.new_empty(tokens, width)
    router_kernel[(triton.cdiv(E, tile["BN"]) + triton.cdiv(width, tile["PAIRS"]),)](
        *(x, residual, norm_weight, gate, bias, values, scales),
        *(normed, new_residual, logits, ids, weights, shared_out, done),
        *(x.stride(0), residual.stride(0), eps, scale, *form, scales.numel() // 2),
        *(K, *split(K), E, triton.next_power_of_2(E), top_k, triton.next_power_of_2(top_k), renormalize),
        *(width, tokens, triton.next_power_of_2(tokens), alone),
        **tile,
        **LAUNCH,
    )
    return normed, new_residual, ids, weights, shared_out
