"""What `vllm serve` reads on GPUs alone: the values that were compared with this model there."""

from collections.abc import Container
from typing import Any

from vllm.config import ParallelConfig, VllmConfig

from vllm_kimi_linear.config.errors import ConfigError

MLA_BACKENDS = ("FLASH_ATTN_MLA", "TRITON_MLA")  # of those that vLLM has on a Hopper; FLASHMLA takes no block of ours


def flags(vllm_config: VllmConfig) -> list[tuple[str, Any, Container[Any], str]]:
    """Name, value, what is accepted, what to do."""
    attention, model, kernels = vllm_config.attention_config, vllm_config.model_config, vllm_config.kernel_config
    parallel, speculative = vllm_config.parallel_config, vllm_config.speculative_config
    backend = attention.backend and attention.backend.name
    shares = parallel.decode_context_parallel_size > 1
    engines = parallel.data_parallel_size > 1
    drafts = "with --decode-context-parallel-size drafts have not been compared, leave one of them out"
    apart = "with --data-parallel-size it has not been run with this model, leave one of them out"
    untried = "it has not been run with this model, leave it out"
    return [
        ("attention-backend", backend, (None, *MLA_BACKENDS), f"choose {' or '.join(MLA_BACKENDS)}"),
        ("moe-backend", kernels.moe_backend, ("auto", "triton"), "choose triton, or leave it out"),
        ("linear-backend", kernels.linear_backend, ("auto",), untried),
        ("speculative-config method", shares and speculative and speculative.method, (False, None), drafts),
        ("enable-expert-parallel", engines and parallel.enable_expert_parallel, (False,), apart),
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


def check_nccl(parallel: ParallelConfig) -> None:
    """Raises ConfigError where GPUs have to send what only NCCL sends, and vLLM finds none that it can use.

    Its communicator turns itself off then, without a word: all-reduce has another way, but reduce-scatter returns
    unwritten memory, and stages of a pipeline wait on a stream that no step runs on.
    """
    names = ("decode_context_parallel_size", "pipeline_parallel_size", "data_parallel_size")
    flag = next((f"--{name.replace('_', '-')}" for name in names if getattr(parallel, name) > 1), None)
    if flag is None:
        return
    from vllm import envs
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

    if envs.VLLM_DISABLE_PYNCCL:
        raise ConfigError(f"VLLM_DISABLE_PYNCCL is set; {flag} needs NCCL, leave it unset")
    try:
        NCCLLibrary()
    except Exception as error:  # whatever it is, vLLM takes it for absence
        path = envs.VLLM_NCCL_SO_PATH or "not set"
        remedy = "set it to the libnccl.so.2 of NCCL 2.29.7 or newer"
        raise ConfigError(f"VLLM_NCCL_SO_PATH is {path}; {flag} needs NCCL, {remedy}: {error}") from error
