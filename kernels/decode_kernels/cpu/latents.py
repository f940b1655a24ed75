"""What stands before and behind the latent attention of decode tokens (NoPE MLA, absorbed)."""

import struct

import torch
from torch import Tensor

from kda_kernels.cpu.library import load

_CALL = struct.Struct("=24qd")  # struct latents_call of latents.h
_library = load({"latents": _CALL.size})
_isa = _library.kda_best_isa()
CHANNELS = 32  # the latent dimension is a multiple of so many


def latent_query(
    projected: Tensor, kv_b: Tensor, norm_weight: Tensor, eps: float, cache: Tensor, slot_mapping: Tensor, nope: int
) -> Tensor:
    """As `decode_kernels.reference.latent_query`; all of one dtype, fp32 or bf16, latents of a multiple of CHANNELS."""
    tokens, (heads, rows, latent) = len(projected), kv_b.shape
    query = projected.new_empty(tokens, heads, latent)
    _call(
        *(projected.data_ptr(), projected.stride(0), kv_b.data_ptr(), norm_weight.data_ptr()),
        *(cache.data_ptr(), slot_mapping.data_ptr(), cache.stride(0), cache.stride(1), cache.shape[1]),
        *(query.data_ptr(), 0, 0, 0, 0, 0),
        *(tokens, heads, nope, cache.shape[-1] - latent, rows - nope, latent, projected.dtype == torch.bfloat16),
        eps=eps,
    )
    return query


def latent_value(latents: Tensor, kv_b: Tensor, nope: int) -> Tensor:
    """As `decode_kernels.reference.latent_value`."""
    tokens, (heads, rows, latent) = len(latents), kv_b.shape
    out, wide = latents.new_empty(tokens, heads * (rows - nope)), torch.empty(tokens, heads, latent)
    _call(
        *(0, 0, kv_b.data_ptr(), 0, 0, 0, 0, 0, 0, 0),
        *(latents.data_ptr(), latents.stride(0), latents.stride(1), wide.data_ptr(), out.data_ptr()),
        *(tokens, heads, nope, 0, rows - nope, latent, latents.dtype == torch.bfloat16),
    )
    return out


def _call(*fields: int, eps: float = 0.0) -> None:
    _library.kda_latents(_CALL.pack(*fields, torch.get_num_threads(), _isa, eps))
