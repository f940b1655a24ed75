"""The cache of one vLLM configuration: the one place that turns vLLM's flags into our sizes."""

import functools
from dataclasses import replace

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from vllm_kimi_linear.cache.layout import CacheLayout
from vllm_kimi_linear.cache.layout import cache_layout as layout_of
from vllm_kimi_linear.config.model import ModelSizes
from vllm_kimi_linear.config.parallel import ParallelSizes

_layout_of = functools.cache(layout_of)  # every layer asks


def model_sizes(vllm_config: VllmConfig) -> ModelSizes:
    """The model's sizes; raises ConfigError with one sentence if they cannot be run, or not with this parallelism."""
    sizes = ModelSizes.from_hf(vllm_config.model_config.hf_text_config)
    parallel = vllm_config.parallel_config
    ParallelSizes(parallel.tensor_parallel_size, parallel.pipeline_parallel_size).check(sizes)
    return sizes


def cache_layout(vllm_config: VllmConfig, num_blocks: int, sizes: ModelSizes | None = None) -> CacheLayout:
    """What the allocated blocks of one rank hold, of a whole model (no pipeline). `sizes` saves reading the config."""
    cache = vllm_config.cache_config
    layout = _layout_of(
        sizes or model_sizes(vllm_config),
        tensor_parallel=vllm_config.parallel_config.tensor_parallel_size,
        activation_dtype=str(vllm_config.model_config.dtype).removeprefix("torch."),
        kv_bytes=0,
        state_dtype="bfloat16" if cache.mamba_ssm_cache_dtype == "bfloat16" else "float32",
        block_tokens=cache.block_size if cache.user_specified_block_size else None,
        speculative=vllm_config.num_speculative_tokens,
        prefix_caching=bool(cache.enable_prefix_caching),
        device=current_platform.device_type,
        context_parallel=vllm_config.parallel_config.decode_context_parallel_size,
    )
    return replace(layout, num_blocks=num_blocks)
