"""The operations of a decode step in C, for any number of tokens (the sources are with those of KDA, kda_kernels/cpu).

A token's result is the same, to the bit, whatever other tokens are in the step and on any number of threads. fp32 or
bfloat16, weights as they come from a checkpoint, sums in fp32. Importing raises ImportError where the C library was not
built; `supports` says what it takes.
"""

import torch

from decode_kernels.cpu.experts import experts
from decode_kernels.cpu.kda import kda_decode
from decode_kernels.cpu.latents import CHANNELS, latent_query, latent_value
from decode_kernels.cpu.products import linear, norm_linear, router

__all__ = ["experts", "kda_decode", "latent_query", "latent_value", "linear", "norm_linear", "router"]


def supports(dtype: torch.dtype, latent_dim: int = 0) -> bool:
    """Whether these kernels take activations and weights of this dtype, and latents of so many channels."""
    return dtype in (torch.float32, torch.bfloat16) and latent_dim % CHANNELS == 0
