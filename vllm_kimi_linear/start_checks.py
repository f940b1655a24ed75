"""What is checked and said when a server starts: the config, the cache dtypes, the implementation in use.

vLLM consults `MODELS_CONFIG_MAP` by architecture while it builds its configuration, before any weight is
read: the earliest place where the model's config, the parallelism and the cache flags are all known.
"""

from collections.abc import Container
from dataclasses import replace
from enum import Enum
from typing import Any

import torch
import transformers
from vllm.config import ModelConfig, VllmConfig
from vllm.config.mamba import MambaBackendEnum
from vllm.logger import init_logger
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.transformers_utils.config import _CONFIG_REGISTRY

from kda_kernels import ops
from vllm_kimi_linear import ARCHITECTURE, __version__, install_check, memory, vllm_version
from vllm_kimi_linear.config import Geometry, check_cache_dtypes, check_cpu
from vllm_kimi_linear.config_error import ConfigError
from vllm_kimi_linear.hf_config import CheckedConfig

logger = init_logger("vllm.kimi_linear")  # under "vllm", so that its handlers apply


def geometry(vllm_config: VllmConfig) -> Geometry:
    """The model's sizes for this parallelism; raises ConfigError with one sentence if they do not fit."""
    return Geometry.from_hf(
        vllm_config.model_config.hf_text_config,
        tensor_parallel=vllm_config.parallel_config.tensor_parallel_size,
        pipeline_parallel=vllm_config.parallel_config.pipeline_parallel_size,
    )


def plan(vllm_config: VllmConfig, num_blocks: int) -> memory.Plan:
    """What the allocated blocks of one rank hold, of a whole model (no pipeline)."""
    cache = vllm_config.cache_config
    planned = memory.plan(
        geometry(vllm_config),
        activation_dtype=str(vllm_config.model_config.dtype).removeprefix("torch."),
        kv_bytes=0,
        state_dtype="bfloat16" if cache.mamba_ssm_cache_dtype == "bfloat16" else "float32",
        block_tokens=cache.block_size if cache.user_specified_block_size else None,
        speculative=vllm_config.num_speculative_tokens,
        prefix_caching=bool(cache.enable_prefix_caching),
        device=current_platform.device_type,
    )
    return replace(planned, num_blocks=num_blocks)


def what_is_short(vllm_config: VllmConfig, cache_bytes: int) -> str:
    """Why a cache of so many bytes a rank cannot hold one sequence of --max-model-len, with the numbers."""
    length = vllm_config.model_config.max_model_len
    block = plan(vllm_config, 0).block_bytes
    held = plan(vllm_config, cache_bytes // block)
    needed = held.bytes_per_sequence(length) + block  # vLLM keeps one block for itself
    longest = memory.longest_context(length, lambda context: held.sequences(context) > 0)
    remedy = f"--max-model-len {longest} fits, or give" if longest else "give"
    return (
        f"--max-model-len is {length}; a sequence of that length takes {needed / memory.MIB:,.1f} MiB of cache a rank "
        f"and {max(cache_bytes, 0) / memory.MIB:,.1f} MiB are there, {(needed - cache_bytes) / memory.MIB:,.1f} short: "
        f"{remedy} more with --gpu-memory-utilization or --kv-cache-memory-bytes"
    )


class StartChecks(VerifyAndUpdateConfig):
    """Stops the start, in one sentence, of anything we cannot run or would have to ignore."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        sizes = geometry(vllm_config)
        cache = vllm_config.cache_config
        if not vllm_version.is_known():
            cache.enable_prefix_caching = False
            logger.warning_once("Kimi Linear: %s.", vllm_version.unsupported())
        if current_platform.is_cpu():
            check_cpu(sizes)
        check_cache_dtypes(
            cache.cache_dtype,
            cache.mamba_cache_dtype,
            cache.mamba_ssm_cache_dtype,
            current_platform.device_type,
        )
        check_flags(vllm_config, states=bool(sizes.kda_layers))
        check_tokenizer(vllm_config.model_config)
        if sizes.kda_layers:
            # From here on as if the user had chosen it: vLLM would take a block that holds a state in each MLA layer.
            cache.block_size = plan(vllm_config, 0).block_tokens
            cache.user_specified_block_size = True
            if cache.enable_prefix_caching:
                check_block_size(cache.block_size, current_platform.device_type)


def check_block_size(tokens: int, device: str) -> None:
    """Raises ConfigError for blocks at whose ends a prefill on the device can keep no state for the prefix cache."""
    multiple = memory.BLOCK_MULTIPLE[device]
    if tokens % multiple:
        raise ConfigError(f"--block-size is {tokens}; give a multiple of {multiple}, or leave it out")


def check_flags(vllm_config: VllmConfig, states: bool) -> None:
    """Raises ConfigError for a flag that asks for what is not implemented here, or that nothing would read.

    `states`: whether any layer keeps a state, which vLLM's connectors would have to move beside the latents.
    """
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    extra, speculative = vllm_config.additional_config, vllm_config.speculative_config
    mamba, offload, scheduler = vllm_config.mamba_config, vllm_config.offload_config, vllm_config.scheduler_config
    unset = "it is not implemented for this model, leave it out"
    unread = "nothing reads it for this model, leave it out"
    flags: list[tuple[str, Any, Container[Any], str]] = [  # name, value, what is accepted, what to do
        ("dtype", model.dtype, (torch.bfloat16, torch.float32), "choose bfloat16 or float32"),
        ("runner", model.runner_type, ("generate",), "this model only generates, leave it out"),
        ("quantization", model.quantization, (None,), unset),
        ("enable-lora", vllm_config.lora_config is not None, (False,), unset),
        ("speculative-config method", speculative and speculative.method, (None, "ngram"), unset),
        ("kv-transfer-config", states and vllm_config.kv_transfer_config, (False, None), unset),
        ("kv-offloading-size", cache.kv_offloading_size, (None,), unset),
        ("kv-sharing-fast-prefill", cache.kv_sharing_fast_prefill, (False,), unset),
        ("prefix-match-unit", cache.prefix_match_unit, (None,), "states are kept at whole blocks, leave it out"),
        ("block-size", cache.block_size, range(16, 1 << 20, 16), "give a multiple of 16, or leave it out"),
        ("mamba-block-size", cache.mamba_block_size, (None,), "the state's size sets the block, leave it out"),
        (
            "prefix-cache-retention-interval",
            cache.prefix_cache_retention_interval,
            (0,),
            "states are kept at distances of the model's own, leave it out",
        ),
        ("enable-mamba-shared-prefix-checkpoint", cache.enable_mamba_shared_prefix_checkpoint, (False,), unread),
        ("use-replayssm", cache.use_replayssm, (False,), unread),
        ("mamba-backend", mamba.backend, (MambaBackendEnum.TRITON,), unread),
        ("enable-mamba-cache-stochastic-rounding", mamba.enable_stochastic_rounding, (False,), unread),
        ("mamba-cache-philox-rounds", mamba.stochastic_rounding_philox_rounds, (0,), unread),
        ("gdn-prefill-backend", extra.get("gdn_prefill_backend"), (None,), unread),
        ("kda-prefill-backend", extra.get("kda_prefill_backend"), (None,), unread),
        ("kda-decode-backend", extra.get("kda_decode_backend"), (None,), unread),
        ("disable-chunked-mm-input", scheduler.disable_chunked_mm_input, (False,), unread),
        ("prefill-context-parallel-size", parallel.prefill_context_parallel_size, (1,), unset),
        ("enable-dbo", parallel.enable_dbo, (False,), unset),
        ("ubatch-size", parallel.ubatch_size, (0, 1), unset),
        ("enable-eplb", parallel.enable_eplb, (False,), unset),
        ("enable-elastic-ep", parallel.enable_elastic_ep, (False,), unset),
        ("enable-hc-sp", parallel.enable_hc_sp, (False,), unread),
        ("cpu-offload-gb", offload.uva.cpu_offload_gb, (0,), unset),
        ("offload-group-size", offload.prefetch.offload_group_size, (0,), unset),
        (
            "disable-hybrid-kv-cache-manager",
            bool(scheduler.disable_hybrid_kv_cache_manager),
            (False,),
            "this model keeps two kinds of state, leave it out",
        ),
    ]
    if current_platform.is_cpu():
        flags += [
            ("attention-backend", vllm_config.attention_config.backend, (None,), unread),
            ("decode-context-parallel-size", parallel.decode_context_parallel_size, (1,), unset),
            ("data-parallel-size", parallel.data_parallel_size, (1,), "run several servers instead"),
            ("enable-expert-parallel", parallel.enable_expert_parallel, (False,), unset),
            (
                "speculative-config rejection_sample_method",
                speculative and speculative.rejection_sample_method,
                (None, "standard"),
                "a CPU has only the standard one, leave it out",
            ),
        ]
    if cache.enable_prefix_caching:
        remedy = "prefixes would be found up to inside a block, where no state is, add --no-enable-prefix-caching"
        flags.append(("decode-context-parallel-size", parallel.decode_context_parallel_size, (1,), remedy))
        remedy = "prefix caching needs it, leave it out or add --no-enable-prefix-caching"
        flags.append(("enable-chunked-prefill", scheduler.enable_chunked_prefill, (True,), remedy))
    if current_platform.is_cuda() and not vllm_config.use_v2_model_runner:
        # The older one lets a prompt of one token into a decode graph, where it would go on from another's state.
        raise ConfigError("VLLM_USE_V2_MODEL_RUNNER is 0; this model needs vLLM's second runner, leave it unset")
    for name, value, accepted, remedy in flags:
        if value not in accepted:
            shown = value.name if isinstance(value, Enum) else str(value).removeprefix("torch.")
            raise ConfigError(f"--{name} is {shown}; {remedy}")


def check_tokenizer(model: ModelConfig) -> None:
    """Raises ConfigError if the checkpoint's tokenizer, often code of its own, does not load; vLLM keeps it."""
    if model.skip_tokenizer_init:
        return
    try:
        cached_tokenizer_from_config(model)
    except Exception as error:  # the code is the checkpoint's: it may fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"the tokenizer of {model.tokenizer} does not load with transformers {transformers.__version__}; "
            f"choose one made for that version with --tokenizer or --tokenizer-revision ({reason})"
        ) from error


def report_install() -> None:
    """Log one sentence for each fault of the installed environment, naming the command that mends it."""
    for problem in install_check.problems():
        logger.warning_once("%s", problem)


def register() -> None:
    MODELS_CONFIG_MAP[ARCHITECTURE] = StartChecks
    _CONFIG_REGISTRY["kimi_linear"] = CheckedConfig


def log_implementation(vllm_config: VllmConfig, sizes: Geometry, state: torch.dtype) -> None:
    """One line: whose implementation serves, with which kernels, and why not faster ones."""
    name, reason = ops.describe(current_platform.device_type, vllm_config.model_config.dtype, sizes.kda_head_dim, state)
    logger.info_once("Kimi Linear by vllm-kimi-linear %s: KDA kernels %s (%s)", __version__, name, reason)
