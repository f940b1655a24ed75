"""Refuse a length that the cache can never hold, in one sentence that says what is missing and what fits."""

from typing import Any

from vllm.config import VllmConfig

from vllm_kimi_linear import ARCHITECTURE
from vllm_kimi_linear.cache import configured
from vllm_kimi_linear.cache.layout import MIB
from vllm_kimi_linear.config.errors import ConfigError
from vllm_kimi_linear.patches.patch import Function, Hook, Patch


def name_what_is_short(original: Function) -> Function:
    def get_kv_cache_configs(
        vllm_config: VllmConfig, kv_cache_specs: Any, available_memory: list[int], *args: Any
    ) -> Any:
        try:
            return original(vllm_config, kv_cache_specs, available_memory, *args)
        except ValueError:
            if vllm_config.model_config.architecture != ARCHITECTURE:
                raise
            if vllm_config.parallel_config.pipeline_parallel_size > 1:
                raise
            raise ConfigError(out_of_memory_message(vllm_config, min(available_memory))) from None

    return get_kv_cache_configs


def out_of_memory_message(vllm_config: VllmConfig, cache_bytes: int) -> str:
    """Why a cache of so many bytes a rank cannot hold one sequence of --max-model-len, with the numbers."""
    length = vllm_config.model_config.max_model_len
    block = configured.cache_layout(vllm_config, 0).block_bytes
    held = configured.cache_layout(vllm_config, cache_bytes // block)
    needed = held.bytes_per_sequence(length) + block  # vLLM keeps one block for itself
    override = vllm_config.cache_config.num_gpu_blocks_override
    if override is not None and override * block < cache_bytes:
        return (
            f"--num-gpu-blocks-override is {override}; a sequence of --max-model-len {length} needs "
            f"{needed // block} blocks: give as many, or leave the flag out"
        )
    longest = held.longest_context(length)
    remedy = f"--max-model-len {longest} fits, or give" if longest else "give"
    return (
        f"--max-model-len is {length}; a sequence of that length needs {needed / MIB:,.1f} MiB of cache on each rank, "
        f"which has {max(cache_bytes, 0) / MIB:,.1f} MiB, {(needed - cache_bytes) / MIB:,.1f} short: "
        f"{remedy} more with --gpu-memory-utilization or --kv-cache-memory-bytes"
    )


PATCH = Patch(
    symptom="vLLM answers \"To serve at least one request with the model's max seq len (1048576), (4.5 GiB KV cache "
    'is needed, which is larger than the available KV cache memory (0.06 GiB)." and four more sentences.',
    cause="`get_kv_cache_configs` does not know which flag set the size, and its message names no flag to change.",
    upstream="Not reported.",
    remove_when="vLLM's message names the flags and what is missing.",
    hooks=(
        Hook(
            "vllm.v1.engine.core:get_kv_cache_configs",
            "vllm_config kv_cache_specs available_memory ...",
            name_what_is_short,
        ),
    ),
)
