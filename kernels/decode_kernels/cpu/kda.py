"""A decode step's token through a KDA layer, from the input projection to the gated output."""

from torch import Tensor

from decode_kernels.cpu.products import linear
from kda_kernels.cpu import decode
from kda_kernels.interface import DecodeArgs, KdaInputs, KdaParams, KdaState


def kda_decode(projected: Tensor, gates_b: Tensor, params: KdaParams, state: KdaState, state_indices: Tensor) -> Tensor:
    """As `decode_kernels.reference.kda_decode`."""
    heads, dim = params.heads, params.head_dim
    width = heads * dim
    qkv, beta = projected[:, : 3 * width], projected[:, 3 * width : 3 * width + heads]
    f_a, g_a = projected[:, 3 * width + heads :].split([dim, projected.shape[1] - 3 * width - heads - dim], dim=1)
    out = projected.new_empty(len(projected), width)
    inputs = KdaInputs(qkv, linear(f_a, gates_b[0]), beta, linear(g_a[:, :dim], gates_b[1]))
    decode(DecodeArgs(inputs, params, state, state_indices, out))
    return out
