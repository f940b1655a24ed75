"""The operations of a decode step. On NVIDIA GPUs alone; importing needs Triton."""

from decode_kernels.cuda.experts import experts_down, experts_up
from decode_kernels.cuda.kda import kda_decode
from decode_kernels.cuda.linear import linear, norm_linear
from decode_kernels.cuda.router import router

__all__ = ["experts_down", "experts_up", "kda_decode", "linear", "norm_linear", "router"]
