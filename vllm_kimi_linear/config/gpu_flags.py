"""What `vllm serve` reads on GPUs alone: the values that were compared with this model there."""

from collections.abc import Container
from typing import Any

from vllm.config import VllmConfig

from vllm_kimi_linear.config.errors import ConfigError

MLA_BACKENDS = ("FLASH_ATTN_MLA", "TRITON_MLA")  # of those that vLLM has on a Hopper; FLASHMLA takes no block of ours


def flags(vllm_config: VllmConfig) -> list[tuple[str, Any, Container[Any], str]]:
    """Name, value, what is accepted, what to do."""
    attention, model, kernels = vllm_config.attention_config, vllm_config.model_config, vllm_config.kernel_config
    parallel = vllm_config.parallel_config
    backend = attention.backend and attention.backend.name
    stages = "pipeline stages were only seen to give wrong answers on GPUs, choose --tensor-parallel-size"
    untried = "it has not been run with this model, leave it out"
    return [
        ("attention-backend", backend, (None, *MLA_BACKENDS), f"choose {' or '.join(MLA_BACKENDS)}"),
        ("moe-backend", kernels.moe_backend, ("auto", "triton"), "choose triton, or leave it out"),
        ("linear-backend", kernels.linear_backend, ("auto",), untried),
        ("data-parallel-size", parallel.data_parallel_size, (1,), "run several servers instead"),
        ("pipeline-parallel-size", parallel.pipeline_parallel_size, (1,), stages),
        ("dcp-comm-backend", parallel.dcp_comm_backend, (None, "ag_rs"), untried),
        ("cp-kv-cache-interleave-size", parallel.cp_kv_cache_interleave_size, (1,), untried),
        ("enable-batch-sharded-sampling", parallel.enable_batch_sharded_sampling, (None, False), untried),
        ("enable-cumem-allocator", model.enable_cumem_allocator and not model.enable_sleep_mode, (False,), untried),
        ("enable-nccl-comm-suspend", model.enable_nccl_comm_suspend, (False,), untried),
        ("enable-trace-replay", model.enable_trace_replay, (False,), untried),
        ("return-sampling-mask", model.return_sampling_mask, (False,), untried),
        ("sleep-mode-offload-cudagraph", model.sleep_mode_offload_cudagraph, (False,), untried),
        ("sleep-preserve-parameter-names", model.sleep_preserve_parameter_names, ([],), untried),
    ]


def check_nccl() -> None:
    """Raises ConfigError where vLLM finds no NCCL: ranks that share latents would add up nothing, and say nothing.

    Its communicator turns itself off then; all-reduce has another way, and reduce-scatter returns unwritten memory.
    """
    from vllm import envs
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

    remedy = "ranks that share latents need NCCL, "
    if envs.VLLM_DISABLE_PYNCCL:
        raise ConfigError(f"VLLM_DISABLE_PYNCCL is set; {remedy}leave it unset")
    try:
        NCCLLibrary()
    except Exception as error:  # whatever it is, vLLM takes it for absence
        path = envs.VLLM_NCCL_SO_PATH or "not set"
        raise ConfigError(f"VLLM_NCCL_SO_PATH is {path}; {remedy}set it to the file libnccl.so.2: {error}") from error
