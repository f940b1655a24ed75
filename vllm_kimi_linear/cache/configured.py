"""The cache of one vLLM configuration: the one place that turns vLLM's flags into our sizes."""

import functools
from dataclasses import replace

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from vllm_kimi_linear.cache.layout import CacheLayout
from vllm_kimi_linear.cache.layout import cache_layout as layout_of
from vllm_kimi_linear.config.model import Geometry

_layout_of = functools.cache(layout_of)  # every layer asks


def geometry(vllm_config: VllmConfig) -> Geometry:
    """The model's sizes for this parallelism; raises ConfigError with one sentence if they do not fit."""
    config = vllm_config.model_config.hf_text_config
    parallel = vllm_config.parallel_config
    return Geometry.from_hf(
        config, tensor_parallel=parallel.tensor_parallel_size, pipeline_parallel=parallel.pipeline_parallel_size
    )


def cache_layout(vllm_config: VllmConfig, num_blocks: int, sizes: Geometry | None = None) -> CacheLayout:
    """What the allocated blocks of one rank hold, of a whole model (no pipeline). `sizes` saves reading the config."""
    cache = vllm_config.cache_config
    layout = _layout_of(
        sizes or geometry(vllm_config),
        activation_dtype=str(vllm_config.model_config.dtype).removeprefix("torch."),
        kv_bytes=0,
        state_dtype="bfloat16" if cache.mamba_ssm_cache_dtype == "bfloat16" else "float32",
        block_tokens=cache.block_size if cache.user_specified_block_size else None,
        speculative=vllm_config.num_speculative_tokens,
        prefix_caching=bool(cache.enable_prefix_caching),
        device=current_platform.device_type,
    )
    return replace(layout, num_blocks=num_blocks)
