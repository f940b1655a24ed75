"""Quantised weights: what layers hold, and which methods they run by, on a CPU and on a GPU."""

from typing import Any

from vllm.platforms import current_platform

from vllm_kimi_linear.config.model import ModelSizes


def quantization(model_sizes: ModelSizes, theirs: Any) -> Any:
    """What gives layers their methods, in the place of `theirs`, as vLLM read the flags and the checkpoint's config."""
    if theirs is None:
        return None
    if current_platform.is_cpu():
        from vllm_kimi_linear.quantized.cpu import CpuQuantization

        return CpuQuantization(model_sizes)
    from vllm_kimi_linear.quantized.gpu import GpuQuantization, OnlineQuantization

    return OnlineQuantization(theirs.args) if theirs.get_name() == "online" else GpuQuantization(theirs, model_sizes)
