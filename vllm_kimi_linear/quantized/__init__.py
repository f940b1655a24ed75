"""Quantised checkpoints: what layers hold, and which methods they run by, on a CPU and on a GPU."""

from typing import Any

from vllm.platforms import current_platform

from vllm_kimi_linear.config.model import ModelSizes


def quantization(model_sizes: ModelSizes, theirs: Any) -> Any:
    """What gives layers their methods, in the place of vLLM's own reading of the checkpoint's config."""
    if current_platform.is_cpu():
        from vllm_kimi_linear.quantized.cpu import CpuQuantization

        return CpuQuantization(model_sizes)
    from vllm_kimi_linear.quantized.gpu import GpuQuantization

    return GpuQuantization(theirs, model_sizes)
