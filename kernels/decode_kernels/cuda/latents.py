"""What stands before and behind the latent attention of a few tokens (NoPE MLA, absorbed).

Before: a query of each head in the space of the latents, and the token's own latent, normed, into the cache. Behind:
each head's value from its mix of latents. Both read their part of kv_b before the kernel in front has ended; from MANY
tokens on cuBLAS is faster.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from decode_kernels.cuda.dependent_launch import LAUNCH, launch_next, wait_for_last
from decode_kernels.cuda.vectors import dot_rows, load_rows, load_vector, product, split

MANY = 3  # tokens


@triton.jit
def _query(
    projected, kv_b, query, projected_stride, head, part,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, NOPE: tl.constexpr, NOPE_P: tl.constexpr, ROPE: tl.constexpr,
    VALUE: tl.constexpr, LATENT: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """BL channels of one head's query in the space of the latents."""
    n, at = tl.arange(0, NOPE_P), part * BL + tl.arange(0, BL)
    row = head * (NOPE + VALUE) + n
    inside = (n[:, None] < NOPE) & (at[None, :] < LATENT)
    weight = tl.load(kv_b + row[:, None] * LATENT + at[None, :], mask=inside, other=0.0).to(tl.float32)
    wait_for_last()
    for token in tl.static_range(TOKENS):
        own = projected + token * projected_stride + head * (NOPE + ROPE)
        q = tl.load(own + n, mask=n < NOPE, other=0.0).to(tl.float32)
        y = tl.sum(weight * q[:, None], 0)
        tl.store(query + (token * HEADS + head) * LATENT + at, y.to(query.dtype.element_ty), mask=at < LATENT)


@triton.jit
def _to_cache(
    latents, norm_weight, cache, slot_mapping, latents_stride, block_stride, slot_stride, block_size, eps, first, step,
    TOKENS: tl.constexpr, LATENT: tl.constexpr, LATENT_P: tl.constexpr, ROPE: tl.constexpr, ROPE_P: tl.constexpr,
):  # fmt: skip
    """Every step-th token's latent, normed, and its shared key."""
    at, shared = tl.arange(0, LATENT_P), tl.arange(0, ROPE_P)
    norm = tl.load(norm_weight + at, mask=at < LATENT, other=0.0).to(tl.float32)
    wait_for_last()
    for token in range(first, TOKENS, step):
        own = latents + token * latents_stride
        latent = tl.load(own + at, mask=at < LATENT, other=0.0).to(tl.float32)
        key = tl.load(own + LATENT + shared, mask=shared < ROPE, other=0.0)
        latent = latent * tl.rsqrt(tl.sum(product(latent, latent)) / LATENT + eps) * norm
        slot = tl.load(slot_mapping + token).to(tl.int64)
        if slot >= 0:  # below: a token that pads the step
            cell = cache + (slot // block_size) * block_stride + (slot % block_size) * slot_stride
            tl.store(cell + at, latent.to(cache.dtype.element_ty), mask=at < LATENT)
            tl.store(cell + LATENT + shared, key.to(cache.dtype.element_ty), mask=shared < ROPE)


@triton.jit
def latent_query_kernel(
    projected, kv_b, norm_weight, cache, slot_mapping, query,
    projected_stride, block_stride, slot_stride, block_size, eps,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, NOPE: tl.constexpr, NOPE_P: tl.constexpr, ROPE: tl.constexpr,
    ROPE_P: tl.constexpr, VALUE: tl.constexpr, LATENT: tl.constexpr, LATENT_P: tl.constexpr, BL: tl.constexpr,
    QUERY: tl.constexpr,
):  # fmt: skip
    """The queries where QUERY, by programs of the first HEADS rows of the grid; the cache by those of the last."""
    head, part = tl.program_id(0), tl.program_id(1)
    launch_next()
    if QUERY and head < HEADS:
        _query(
            projected, kv_b, query, projected_stride, head, part,
            TOKENS, HEADS, NOPE, NOPE_P, ROPE, VALUE, LATENT, BL,
        )  # fmt: skip
    else:
        _to_cache(
            projected + HEADS * (NOPE + ROPE), norm_weight, cache, slot_mapping, projected_stride, block_stride,
            slot_stride, block_size, eps, part, tl.num_programs(1), TOKENS, LATENT, LATENT_P, ROPE, ROPE_P,
        )  # fmt: skip


@triton.jit
def latent_value_kernel(
    latents, kv_b, out,
    token_stride, head_stride,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, NOPE: tl.constexpr, VALUE: tl.constexpr, LATENT: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    row = tl.program_id(1) * BN + tl.arange(0, BN)
    launch_next()
    w_head, w_tail = load_rows(kv_b + (head * (NOPE + VALUE) + NOPE) * LATENT, row, VALUE, LATENT, HEAD, TAIL)
    wait_for_last()
    for token in tl.static_range(TOKENS):
        o_head, o_tail = load_vector(latents + token * token_stride + head * head_stride, LATENT, HEAD, TAIL)
        y = dot_rows(w_head, w_tail, o_head, o_tail)
        tl.store(out + (token * HEADS + head) * VALUE + row, y.to(out.dtype.element_ty), mask=row < VALUE)


def latent_query(
    projected: Tensor, kv_b: Tensor, norm_weight: Tensor, eps: float, cache: Tensor, slot_mapping: Tensor, nope: int,
    **tile: int,
) -> Tensor:  # fmt: skip
    tokens, (heads, rows, latent) = projected.shape[0], kv_b.shape
    rope = cache.shape[-1] - latent
    query = projected.new_empty(tokens, heads, latent)
    few = tokens < MANY
    tile = {"BL": 64, "num_warps": 4} | tile
    latent_query_kernel[(heads + 1, triton.cdiv(latent, tile["BL"])) if few else (1, tokens)](
        *(projected, kv_b, norm_weight, cache, slot_mapping, query),
        *(projected.stride(0), cache.stride(0), cache.stride(1), cache.shape[1], eps),
        *(tokens, heads, nope, triton.next_power_of_2(nope), rope, triton.next_power_of_2(rope)),
        *(rows - nope, latent, triton.next_power_of_2(latent)),
        QUERY=few,
        **tile,
        **LAUNCH,
    )
    if not few:
        own = projected[:, : heads * (nope + rope)].unflatten(1, (heads, -1))[..., :nope]
        torch.bmm(own.transpose(0, 1), kv_b[:, :nope], out=query.transpose(0, 1))
    return query


def latent_value(latents: Tensor, kv_b: Tensor, nope: int, **tile: int) -> Tensor:
    tokens, (heads, rows, latent) = latents.shape[0], kv_b.shape
    value = rows - nope
    out = latents.new_empty(tokens, heads * value)
    if tokens >= MANY:
        torch.bmm(
            latents.transpose(0, 1),
            kv_b[:, nope:].transpose(1, 2),
            out=out.unflatten(1, (heads, value)).transpose(0, 1),
        )
        return out
    tile = {"BN": 16, "num_warps": 4} | tile
    latent_value_kernel[(heads, triton.cdiv(value, tile["BN"]))](
        *(latents, kv_b, out, latents.stride(0), latents.stride(1)),
        *(tokens, heads, nope, value, latent, *split(latent)),
        **tile,
        **LAUNCH,
    )
    return out
