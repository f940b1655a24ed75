"""The operations in plain torch: fp32 within, and rounded to the dtype of the activations where the kernels round."""

import torch
from torch import Tensor
from torch.nn import functional as F

from kda_kernels import reference
from kda_kernels.interface import DecodeArgs, KdaInputs, KdaParams, KdaState


def _add_and_norm(x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm in fp32, and x + residual."""
    total = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    wide = total.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * norm_weight.float(), total


def _multiplied(normed: Tensor, dtype: torch.dtype) -> Tensor:
    """What is multiplied with the weights: of several tokens the norm is stored before, of one it is not."""
    return normed if len(normed) == 1 else normed.to(dtype).float()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return (x.float() @ weight.float().T).to(x.dtype)


def norm_linear(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    normed, total = _add_and_norm(x, residual, norm_weight, eps)
    return linear(_multiplied(normed, x.dtype), weight).to(x.dtype), total


def all_reduce_add_norm(
    parts: list[Tensor], residual: Tensor, norm_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """parts: x of each rank."""
    total = sum((part.float() for part in parts), torch.zeros(())) + residual.float()
    normed, total = _add_and_norm(total.to(residual.dtype), None, norm_weight, eps)
    return normed.to(residual.dtype), total


def router(
    x: Tensor, residual: Tensor, norm_weight: Tensor | None, eps: float, gate: Tensor, bias: Tensor,
    shared: Tensor | None, *, top_k: int, renormalize: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    normed, total = (x.float(), residual) if norm_weight is None else _add_and_norm(x, residual, norm_weight, eps)
    rows = _multiplied(normed, x.dtype)
    score = torch.sigmoid(rows @ gate.float().T)
    ids = torch.sort(score + bias, dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = score.gather(1, ids)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    out = x.new_empty(len(x), 0) if shared is None else _silu_and_mul(rows @ shared.float().T).to(x.dtype)
    return normed.to(x.dtype), total, ids.int(), weights * scale, out


def experts(
    x: Tensor, up_weight: Tensor, down_weight: Tensor, ids: Tensor, weights: Tensor, shared_acts: Tensor,
    shared_weight: Tensor | None,
) -> Tensor:  # fmt: skip
    return experts_down(experts_up(x, up_weight, ids), down_weight, ids, weights, shared_acts, shared_weight)


def experts_up(x: Tensor, up_weight: Tensor, ids: Tensor) -> Tensor:
    slots = ids.flatten().long()
    rows = x.repeat_interleave(ids.shape[1], 0).float()
    return _silu_and_mul(torch.einsum("sk,snk->sn", rows, up_weight[slots].float())).to(x.dtype)


def experts_down(
    acts: Tensor, down_weight: Tensor, ids: Tensor, weights: Tensor, shared_acts: Tensor, shared_weight: Tensor | None
) -> Tensor:
    each = torch.einsum("sk,snk->sn", acts.float(), down_weight[ids.flatten().long()].float())
    y = (each.unflatten(0, ids.shape) * weights[..., None]).sum(1)
    if shared_weight is not None:
        y = y + shared_acts.float() @ shared_weight.float().T
    return y.to(acts.dtype)


def latent_query(
    projected: Tensor, kv_b: Tensor, norm_weight: Tensor, eps: float, cache: Tensor, slot_mapping: Tensor, nope: int
) -> Tensor:
    heads, _, latent = kv_b.shape
    rope = cache.shape[-1] - latent
    query, own, key, _ = projected.split(
        [heads * (nope + rope), latent, rope, projected.shape[1] - heads * (nope + rope) - latent - rope], dim=1
    )
    normed, _ = _add_and_norm(own, None, norm_weight, eps)
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            cache[slot // cache.shape[1], slot % cache.shape[1]] = torch.cat([normed[token].to(key.dtype), key[token]])
    query = query.unflatten(1, (heads, nope + rope))[..., :nope]
    return torch.einsum("thn,hnl->thl", query.float(), kv_b[:, :nope].float()).to(projected.dtype)


def latent_value(latents: Tensor, kv_b: Tensor, nope: int) -> Tensor:
    return torch.einsum("thl,hvl->thv", latents.float(), kv_b[:, nope:].float()).flatten(1).to(latents.dtype)


def kda_decode(projected: Tensor, gates_b: Tensor, params: KdaParams, state: KdaState, state_indices: Tensor) -> Tensor:
    heads, dim = params.heads, params.head_dim
    qkv, beta, f, g, *_ = projected.split([3 * heads * dim, heads, dim, dim, _rest(projected, params)], dim=1)
    out = projected.new_empty(len(projected), heads * dim)
    inputs = KdaInputs(qkv, linear(f, gates_b[0]), beta, linear(g, gates_b[1]))
    reference.decode(DecodeArgs(inputs, params, state, state_indices, out))
    return out


def _rest(projected: Tensor, params: KdaParams) -> int:
    return projected.shape[1] - 3 * params.heads * params.head_dim - params.heads - 2 * params.head_dim


def _silu_and_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up
