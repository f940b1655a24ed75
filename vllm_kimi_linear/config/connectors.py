"""Which of vLLM's KV connectors carry the states of KDA layers beside the latents."""

from collections.abc import Container
from typing import Any

from vllm import envs
from vllm.config import VllmConfig
from vllm.platforms import current_platform

OFFLOADING = "OffloadingConnector"  # also that of --kv-offloading-size
CHUNKS = ("blocks_per_chunk", "block_size")  # of its settings, those that put several blocks into one


def flags(vllm_config: VllmConfig) -> list[tuple[str, Any, Container[Any], str]]:
    """Name, value, what is accepted, what to do; nothing where nothing is to be offloaded or sent."""
    transfer, cache = vllm_config.kv_transfer_config, vllm_config.cache_config
    size, settings = cache.kv_offloading_size, transfer.kv_connector_extra_config if transfer else {}
    if transfer is None and size is None:
        return []
    other = f"of vLLM's connectors only {OFFLOADING} moves states as well, choose it or leave the flag out"
    needed = "what is offloaded is found by prefix caching, add --enable-prefix-caching"
    found: list[tuple[str, Any, Container[Any], str]] = []
    if transfer is not None and size is None:  # else vLLM chooses the connector, later
        found.append(("kv-transfer-config kv_connector", transfer.kv_connector, (OFFLOADING,), other))
    if current_platform.is_cpu() and "spec_module_path" not in settings:
        own = "on a CPU the cache is in the host's memory already, leave it out"
        found += [("kv-offloading-size", size, (None,), own), ("kv-transfer-config kv_connector", OFFLOADING, (), own)]
    if size is not None:
        backend = "VLLM_USE_SIMPLE_KV_OFFLOAD" if envs.VLLM_USE_SIMPLE_KV_OFFLOAD else cache.kv_offloading_backend
        found.append(("kv-offloading-backend", backend, ("native",), other))
    apart, chunk = "it has not been compared with offloading, leave one out", "a state ends a block, leave it out"
    return [
        *found,
        *((f"kv-transfer-config {name}", settings.get(name), (None,), chunk) for name in CHUNKS),
        ("enable-lora", vllm_config.lora_config is not None, (False,), apart),
        ("pipeline-parallel-size", vllm_config.parallel_config.pipeline_parallel_size, (1,), apart),
        ("enable-prefix-caching", bool(cache.enable_prefix_caching), (True,), needed),
    ]
