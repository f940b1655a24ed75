"""Which matrix products a CPU runs: our C kernels' or, in bfloat16 where there is one, oneDNN's.

The C kernels (`decode_kernels.cpu`) take weights as they are. In fp32 they are faster than oneDNN's packed products
with AVX2, and slower with AVX-512 (docs/benchmarks/reasons/cpu.md); in bfloat16 oneDNN has the better ones on
processors with AVX-512 or AMX, and none on most that have AVX2 alone. Where the C library was not built, weights
without a oneDNN product are widened to fp32 in pieces.
"""

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear as torch_linear
from vllm import _custom_ops
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from decode_kernels import interface
from vllm_kimi_linear.log import logger

# Up to so many tokens torch's own product costs less than widening the weights.
FEW_TOKENS = 2
PIECE = 1 << 20  # elements of a weight widened at a time: 4 MiB


@cache
def has_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN makes products of this dtype here. Tried once: builds, chips and ONEDNN_MAX_CPU_ISA differ."""
    size = 32
    try:
        handler = _custom_ops.create_onednn_mm(torch.zeros(size, size, dtype=dtype, device="cpu"), 1)
        _custom_ops.onednn_mm(handler, torch.zeros(1, size, dtype=dtype, device="cpu"), None)
    except (RuntimeError, AttributeError):  # no such product, or a build of vLLM without oneDNN
        return False
    return True


@cache
def takes_c_kernels(dtype: torch.dtype, latent_dim: int = 0) -> bool:
    """Whether weights of this dtype are multiplied by the C kernels, and latents of so many channels can be."""
    if dtype == torch.bfloat16 and has_onednn(dtype):
        return False
    try:
        return bool(interface.kernels("cpu").supports(dtype, latent_dim))
    except ImportError:
        return False


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, K], weight [N, K], bias [N], all of one dtype -> x weight^T + bias, [T, N]; sums are in fp32."""
    if bias is None and takes_c_kernels(weight.dtype):
        return interface.kernels("cpu").linear(x, weight)
    if has_onednn(weight.dtype) or len(x) <= FEW_TOKENS:
        return torch_linear(x, weight, bias)
    wide = x.float()
    out = x.new_empty(len(x), len(weight))
    step = max(1, PIECE // weight.shape[1])
    for first in range(0, len(weight), step):
        piece = slice(first, first + step)
        out[:, piece] = torch_linear(wide, weight[piece].float(), None if bias is None else bias[piece].float())
    return out


def use_plain_products(model: nn.Module) -> None:
    """Let layers of `model` run on `linear` where vLLM has no better. Call it before the weights are processed."""
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if type(method) not in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod):
            continue
        dtype = module.weight.dtype
        if takes_c_kernels(dtype) or not has_onednn(dtype):
            method.process_weights_after_loading = _keep_weight
            way = "by the C kernels" if takes_c_kernels(dtype) else "in fp32 piece by piece: oneDNN has no product"
            logger.info_once("Weights in %s are multiplied %s", str(dtype).removeprefix("torch."), way)


def _keep_weight(layer: nn.Module) -> None:
    """As vLLM's methods of this name, which pack the weight: keep it as it is, and multiply by `linear`."""
    layer.cpu_linear = linear
