"""What the machine can do at most: it reads the weights, and multiplies them."""

import math
from functools import partial

from benchmarks.cpu.rows import DECODES, PREFILLS, median_seconds
from vllm_kimi_linear.config import tensors
from vllm_kimi_linear.config.model import ModelSizes

BYTES = {"bfloat16": 2, "float32": 4}


def measure_floor() -> dict[str, float]:
    """Read bandwidth in GB/s, and GEMM rate in GFLOP/s by dtype."""
    import torch
    from vllm import _custom_ops

    large = torch.ones(1 << 28, dtype=torch.float32)
    result = {"read": large.numel() * 4 / median_seconds(large.sum, 5) / 1e9}
    del large
    size = 2304
    for dtype in BYTES:
        weight = torch.randn(4 * size, size, dtype=getattr(torch, dtype))
        rows = torch.randn(2048, size, dtype=weight.dtype)
        packed = _custom_ops.create_onednn_mm(weight.t(), 1)
        seconds = median_seconds(partial(_custom_ops.onednn_mm, packed, rows, None), 5)
        result[dtype] = 2 * rows.shape[0] * weight.numel() / seconds / 1e9
    return result


def floor_rates(model_sizes: ModelSizes, machine: dict[str, float], dtype: str) -> dict[str, float]:
    """Tokens a second if only weights were read (at the read bandwidth) and multiplied (at the GEMM rate)."""
    sizes = {"head": 0, "routed": 0, "dense": 0}
    for weight in tensors.weights(model_sizes):
        kind = "head" if weight.name == "lm_head.weight" else "routed" if ".experts." in weight.name else "dense"
        if "embed_tokens" not in weight.name:
            sizes[kind] += math.prod(weight.shape)
    share = model_sizes.experts_per_token / model_sizes.num_experts
    active = sizes["dense"] + share * sizes["routed"]
    rates = {}
    for length in PREFILLS:
        rates[f"prefill {length}"] = length / (2 * (length * active + sizes["head"]) / (machine[dtype] * 1e9))
    for rows in DECODES:
        touched = sizes["dense"] + sizes["head"] + sizes["routed"] * (1 - (1 - share) ** rows)
        reading = touched * BYTES[dtype] / (machine["read"] * 1e9)
        multiplying = 2 * rows * (active + sizes["head"]) / (machine[dtype] * 1e9)
        rates[f"decode {rows}"] = rows / max(reading, multiplying)
    return rates
