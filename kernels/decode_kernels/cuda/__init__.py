"""The operations on NVIDIA GPUs, in Triton; bfloat16, one to a few tokens."""

from decode_kernels.cuda.all_reduce import Workspace, all_reduce_add_norm
from decode_kernels.cuda.experts import experts
from decode_kernels.cuda.kda import kda_decode
from decode_kernels.cuda.latents import latent_query, latent_value
from decode_kernels.cuda.linear import linear, norm_linear
from decode_kernels.cuda.router import router

__all__ = [
    "Workspace",
    "all_reduce_add_norm",
    "experts",
    "kda_decode",
    "latent_query",
    "latent_value",
    "linear",
    "norm_linear",
    "router",
]
