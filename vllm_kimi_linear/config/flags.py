"""The flags of `vllm serve` that this model cannot honour, or that nothing would read."""

from collections.abc import Container
from enum import Enum
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.config.mamba import MambaBackendEnum
from vllm.platforms import current_platform

from vllm_kimi_linear.adapters.names import TARGETS
from vllm_kimi_linear.cache.layout import BLOCK_MULTIPLE
from vllm_kimi_linear.config import connectors, gpu_flags
from vllm_kimi_linear.config.errors import ConfigError

# What vLLM's methods make of a plain checkpoint as it is loaded, on GPUs; a quantised one names its own.
ONLINE = ("fp8", "fp8_per_tensor", "fp8_per_channel")
QUANTIZATIONS = {"cpu": (None, "compressed-tensors"), "cuda": (None, "compressed-tensors", *ONLINE)}


def check_block_size(tokens: int, device: str) -> None:
    """Raises ConfigError for blocks at whose ends a prefill on the device can keep no state for the prefix cache."""
    multiple = BLOCK_MULTIPLE[device]
    if tokens % multiple:
        raise ConfigError(f"--block-size is {tokens}; give a multiple of {multiple}, or leave it out")


def check_flags(vllm_config: VllmConfig, states: bool) -> None:
    """Raises ConfigError for a flag that asks for what is not implemented here, or that nothing would read.

    `states`: whether any layer keeps a state, which vLLM's connectors would have to move beside the latents.
    """
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    extra, speculative = vllm_config.additional_config, vllm_config.speculative_config
    mamba, offload, scheduler = vllm_config.mamba_config, vllm_config.offload_config, vllm_config.scheduler_config
    attention, lora = vllm_config.attention_config, vllm_config.lora_config
    online = model.quantization in ONLINE  # of which vLLM makes such a config itself
    unset = "it is not implemented for this model, leave it out"
    unread = "nothing reads it for this model, leave it out"
    spaced = "this model has its own rule for which states are kept, leave it out"
    experts = "experts take no adapter, leave it out"
    mixed = "this model has two kinds of layers and needs that manager, leave it out"
    flags: list[tuple[str, Any, Container[Any], str]] = [  # name, value, what is accepted, what to do
        ("dtype", model.dtype, (torch.bfloat16, torch.float32), "choose bfloat16 or float32"),
        ("runner", model.runner_type, ("generate",), "this model only generates, leave it out"),
        ("quantization", model.quantization, QUANTIZATIONS[current_platform.device_type], unset),
        ("quantization-config", not online and model.quantization_config, (False, None), unset),
        ("speculative-config method", speculative and speculative.method, (None, "ngram"), unset),
        ("kv-sharing-fast-prefill", cache.kv_sharing_fast_prefill, (False,), unset),
        ("prefix-match-unit", cache.prefix_match_unit, (None,), "states are kept at ends of blocks, leave it out"),
        ("block-size", cache.block_size, range(16, 1 << 20, 16), "give a multiple of 16, or leave it out"),
        ("mamba-block-size", cache.mamba_block_size, (None,), "--block-size is for all layers, leave it out"),
        ("prefix-cache-retention-interval", cache.prefix_cache_retention_interval, (0,), spaced),
        ("enable-mamba-shared-prefix-checkpoint", cache.enable_mamba_shared_prefix_checkpoint, (False,), unread),
        ("use-replayssm", cache.use_replayssm, (False,), unread),
        ("mamba-backend", mamba.backend, (MambaBackendEnum.TRITON,), unread),
        ("enable-mamba-cache-stochastic-rounding", mamba.enable_stochastic_rounding, (False,), unread),
        ("mamba-cache-philox-rounds", mamba.stochastic_rounding_philox_rounds, (0,), unread),
        ("gdn-prefill-backend", extra.get("gdn_prefill_backend"), (None,), unread),
        ("kda-prefill-backend", extra.get("kda_prefill_backend"), (None,), unread),
        ("kda-decode-backend", extra.get("kda_decode_backend"), (None,), unread),
        # Steps by kernels of our own choose experts where vLLM does not look.
        ("enable-return-routed-experts", vllm_config.aux_output_config.enable_return_routed_experts, (False,), unset),
        ("disable-chunked-mm-input", scheduler.disable_chunked_mm_input, (False,), unread),
        ("prefill-context-parallel-size", parallel.prefill_context_parallel_size, (1,), unset),
        ("enable-dbo", parallel.enable_dbo, (False,), unset),
        ("ubatch-size", parallel.ubatch_size, (0, 1), unset),
        ("dcp-q-replicate", parallel.dcp_q_replicate, (None, False), unread),
        ("enable-eplb", parallel.enable_eplb, (False,), unset),
        ("enable-elastic-ep", parallel.enable_elastic_ep, (False,), unset),
        ("enable-hc-sp", parallel.enable_hc_sp, (False,), unread),
        ("cpu-offload-gb", offload.uva.cpu_offload_gb, (0,), unset),
        ("offload-group-size", offload.prefetch.offload_group_size, (0,), unset),
        ("disable-hybrid-kv-cache-manager", bool(scheduler.disable_hybrid_kv_cache_manager), (False,), mixed),
    ]
    if states:
        flags += connectors.flags(vllm_config)
    if lora is not None:
        dtypes = ("auto", model.dtype, str(model.dtype).removeprefix("torch."))
        always = "every supported module takes adapters, leave it out"
        # Captured with max_loras adapters and no token without one: vllm-project/vllm#32005.
        left_out = "beside requests without an adapter vLLM's graphs would leave one out, leave the flag out"
        flags += [
            ("lora-dtype", lora.lora_dtype, dtypes, "adapters have the model's dtype, leave it out"),
            ("lora-target-modules", lora.target_modules, (None, list(TARGETS)), always),
            ("fully-sharded-loras", lora.fully_sharded_loras, (False,), unset),
            ("enable-mixed-moe-lora-format", lora.enable_mixed_moe_lora_format, (False,), experts),
            ("enable-moe-shared-loras", lora.enable_moe_shared_loras, (False,), experts),
            ("enable-tower-connector-lora", lora.enable_tower_connector_lora, (False,), unread),
            ("max-lora-cls-labels", lora.max_lora_cls_labels, (None,), unread),
            ("specialize-active-lora", lora.specialize_active_lora, (False,), left_out),
        ]
    if current_platform.is_cpu():
        method = speculative and speculative.rejection_sample_method
        combined = "vLLM combines what its ranks attend to on GPUs alone, leave it out"
        flags += [
            ("attention-backend", attention.backend, (None,), unread),
            ("attention-config backend_per_kind", attention.backend_per_kind, ({},), unread),
            ("decode-context-parallel-size", parallel.decode_context_parallel_size, (1,), combined),
            ("data-parallel-size", parallel.data_parallel_size, (1,), "run several servers instead"),
            ("enable-expert-parallel", parallel.enable_expert_parallel, (False,), unset),
            ("speculative-config rejection_sample_method", method, (None, "standard"), "on a CPU choose standard"),
        ]
    else:
        flags += gpu_flags.flags(vllm_config)
    if cache.enable_prefix_caching:
        remedy = "with prefix caching it has not been run with this model, add --no-enable-prefix-caching"
        # Not compared in a cache that runs out of blocks.
        shared = range(1, 1 << 10) if extra.get("shared_prefixes") else (1,)
        flags.append(("decode-context-parallel-size", parallel.decode_context_parallel_size, shared, remedy))
        remedy = "prefix caching needs chunks, leave the flag out or add --no-enable-prefix-caching"
        flags.append(("enable-chunked-prefill", scheduler.enable_chunked_prefill, (True,), remedy))
    if current_platform.is_cuda() and not vllm_config.use_v2_model_runner:
        # The older one lets a prompt of one token into a decode graph, where it would go on from another's state.
        raise ConfigError("VLLM_USE_V2_MODEL_RUNNER is 0; this model needs vLLM's V2 model runner, leave it unset")
    for name, value, accepted, remedy in flags:
        if value not in accepted:
            shown = value.name if isinstance(value, Enum) else str(value).removeprefix("torch.")
            raise ConfigError(f"--{name} is {shown}; {remedy}")
    if not current_platform.is_cpu():
        gpu_flags.check_nccl(parallel)
