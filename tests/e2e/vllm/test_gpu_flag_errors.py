"""What `vllm serve` refuses of this model where the platform is no CPU, each in one sentence; asking needs no GPU."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from tests.support.own_process import in_own_process

# On a CPU vLLM refuses them before, or sets them back: flag -> where its value stands, the value.
ELSEWHERE: dict[str, tuple[str, Any]] = {
    "decode_context_parallel_size": ("parallel_config.decode_context_parallel_size", 4),
    "prefill_context_parallel_size": ("parallel_config.prefill_context_parallel_size", 2),
    "enable_dbo": ("parallel_config.enable_dbo", True),
    "ubatch_size": ("parallel_config.ubatch_size", 2),
    "enable_eplb": ("parallel_config.enable_eplb", True),
    "enable_elastic_ep": ("parallel_config.enable_elastic_ep", True),
    "enable_return_routed_experts": ("aux_output_config.enable_return_routed_experts", True),
    "moe_backend": ("kernel_config.moe_backend", "flashinfer_cutlass"),
    "linear_backend": ("kernel_config.linear_backend", "cutlass"),
    "dcp_comm_backend": ("parallel_config.dcp_comm_backend", "a2a"),
    "cp_kv_cache_interleave_size": ("parallel_config.cp_kv_cache_interleave_size", 16),
    "enable_batch_sharded_sampling": ("parallel_config.enable_batch_sharded_sampling", True),
    "enable_cumem_allocator": ("model_config.enable_cumem_allocator", True),
    "enable_nccl_comm_suspend": ("model_config.enable_nccl_comm_suspend", True),
    "enable_trace_replay": ("model_config.enable_trace_replay", True),
    "return_sampling_mask": ("model_config.return_sampling_mask", True),
    "sleep_mode_offload_cudagraph": ("model_config.sleep_mode_offload_cudagraph", True),
    "sleep_preserve_parameter_names": ("model_config.sleep_preserve_parameter_names", ["lm_head*"]),
    "attention_backend": ("attention_config.backend", SimpleNamespace(name="FLASHMLA")),
}


def check_elsewhere(model: str) -> tuple[dict[str, str], list[str], str]:
    """Flag -> the sentence of `check_flags` where the platform is no CPU; those of two flags together.

    And of four ranks that share latents, which are let through: what the log says of their cache.
    """
    from vllm.config import KVTransferConfig, SpeculativeConfig
    from vllm.config.lora import LoRAConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    from vllm_kimi_linear.cache import configured
    from vllm_kimi_linear.config.errors import ConfigError
    from vllm_kimi_linear.config.flags import check_flags
    from vllm_kimi_linear.validation import KimiLinearForCausalLMConfig

    config = EngineArgs(model=model, max_model_len=8192, enable_prefix_caching=True).create_engine_config()
    config.cache_config.mamba_block_size = None  # vLLM has filled it in since

    def sentence() -> str:
        try:
            check_flags(config, states=True)
        except ConfigError as error:
            return str(error)
        return ""

    said: dict[str, str] = {}
    on_gpus = mock.patch.object(type(current_platform), "is_cpu", lambda self: False)
    with on_gpus, mock.patch("vllm.distributed.device_communicators.pynccl_wrapper.NCCLLibrary"):
        assert not sentence()
        for flag, (path, value) in ELSEWHERE.items():
            part, name = path.split(".")
            before = getattr(owner := getattr(config, part), name)
            setattr(owner, name, value)
            said[flag] = sentence()
            setattr(owner, name, before)
        parallel = config.parallel_config
        parallel.pipeline_parallel_size = parallel.data_parallel_size = 2
        config.lora_config = LoRAConfig()
        assert not sentence()
        parallel.enable_expert_parallel = True
        together = [sentence()]
        parallel.enable_expert_parallel, parallel.data_parallel_size, parallel.pipeline_parallel_size = False, 1, 1
        config.cache_config.enable_prefix_caching = False
        parallel.decode_context_parallel_size = 4
        assert not sentence()
        config.cache_config.enable_prefix_caching, config.additional_config["shared_prefixes"] = True, True
        assert not sentence()
        KimiLinearForCausalLMConfig.verify_and_update_config(config)
        assert config.cache_config.mamba_block_size == 4 * config.cache_config.block_size
        config.cache_config.enable_prefix_caching, config.cache_config.mamba_block_size = False, None
        config.speculative_config = object.__new__(SpeculativeConfig)
        config.speculative_config.method = "ngram"
        together.append(sentence())
        shared = configured.cache_layout(config, 1000).describe(4096)
        parallel.decode_context_parallel_size, config.cache_config.enable_prefix_caching = 1, True
        config.kv_transfer_config = KVTransferConfig(kv_connector="OffloadingConnector", kv_role="kv_both")
        together.append(sentence())
        config.lora_config = None
        assert not sentence()
        config.kv_transfer_config.kv_connector = "NixlConnector"
        together.append(sentence())
    return said, together, shared


def test_refused_elsewhere(demo_model: Path) -> None:
    said, together, cache = in_own_process(check_elsewhere, str(demo_model))
    assert said.keys() == ELSEWHERE.keys()
    for flag, (_, value) in ELSEWHERE.items():
        assert said[flag].startswith(f"--{flag.replace('_', '-')} is {getattr(value, 'name', value)}; ")
    assert "--no-enable-prefix-caching" in said["decode_context_parallel_size"]
    experts, drafts, adapters, connector = together
    assert adapters.startswith("--enable-lora is True; it has not been compared with offloading")
    assert connector.startswith("--kv-transfer-config kv_connector is NixlConnector; of vLLM's connectors only ")
    assert experts.startswith("--enable-expert-parallel is True; with --data-parallel-size ")
    assert drafts.startswith("--speculative-config method is ngram; with --decode-context-parallel-size ")
    assert "bytes a token of latent cache on one rank of 4" in cache
