"""Matrix products on processors for which oneDNN has none in the weights' dtype.

oneDNN multiplies bfloat16 on x86 from AVX-512 on, and on some processors with AVX2 alone. On the others vLLM leaves
linear layers to torch, whose bfloat16 product of many tokens takes nine times as long as an fp32 one. Here inputs and
pieces of the weights are widened on the way, so that no second copy of the weights is held.
"""

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear as torch_linear
from vllm import _custom_ops
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

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


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, K], weight [N, K], bias [N], all of one dtype -> x weight^T + bias, [T, N]; sums are in fp32."""
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
    """Let layers of `model` that oneDNN cannot multiply run on `linear`. Call it before the weights are processed."""
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if type(method) not in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod):
            continue
        if not has_onednn(module.weight.dtype):
            method.process_weights_after_loading = _keep_weight
            name = str(module.weight.dtype).removeprefix("torch.")
            logger.info_once("oneDNN has no %s product on this processor: weights are widened to fp32 in pieces", name)


def _keep_weight(layer: nn.Module) -> None:
    """As vLLM's methods of this name, which pack the weight: keep it as it is, and multiply by `linear`."""
    layer.cpu_linear = linear
