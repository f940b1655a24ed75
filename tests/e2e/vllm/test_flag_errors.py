"""A flag that this model cannot honour stops the start with one sentence; what can be honoured is accepted."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from kimi_demo.presets import demo_config
from tests.support.own_process import in_own_process
from tests.support.starts import Accepted, Refused, check_refused, linear, outcomes

NGRAM = {"method": "ngram_gpu", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
SYNTHETIC = {"method": "ngram", "rejection_sample_method": "synthetic", "synthetic_acceptance_length": 2}
CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}

REFUSED: Refused = {
    "quantization": ({}, {"quantization": "fp8"}, "--quantization", "fp8"),
    "quantised at the start": (
        {},
        {"quantization_config": {"linear": "fp8_per_tensor"}},
        "--quantization-config",
        "float8",
    ),
    "queries on every rank": ({}, {"dcp_q_replicate": True}, "--dcp-q-replicate", "True"),
    "float16": ({}, {"dtype": "float16"}, "--dtype", "float16"),
    "pooling": ({}, {"runner": "pooling"}, "--runner", "pooling"),
    "KV in fp8": ({}, {"kv_cache_dtype": "fp8"}, "--kv-cache-dtype", "fp8"),
    "KV in bfloat16, activations in fp32": (
        {},
        {"kv_cache_dtype": "bfloat16", "dtype": "float32"},
        "--kv-cache-dtype",
        "bfloat16",
    ),
    "state in bfloat16": ({}, {"mamba_ssm_cache_dtype": "bfloat16"}, "--mamba-ssm-cache-dtype", "bfloat16"),
    "state in float16": ({}, {"mamba_ssm_cache_dtype": "float16"}, "--mamba-ssm-cache-dtype", "float16"),
    "convolution state in fp32": ({}, {"mamba_cache_dtype": "float32"}, "--mamba-cache-dtype", "float32"),
    "state blocks": (
        {},
        {"mamba_block_size": 64, "enable_prefix_caching": True},
        "--mamba-block-size",
        "64",
    ),
    "prefix match unit": ({}, {"prefix_match_unit": 64}, "--prefix-match-unit", "64"),
    "odd block size": ({}, {"block_size": 24}, "--block-size", "24"),
    "expert parallel": (
        {},
        {"enable_expert_parallel": True, "tensor_parallel_size": 2},
        "--enable-expert-parallel",
        "True",
    ),
    "context parallel": (
        {},
        {"decode_context_parallel_size": 2, "tensor_parallel_size": 2},
        "--decode-context-parallel-size",
        "2",
    ),
    "data parallel": ({}, {"data_parallel_size": 2}, "--data-parallel-size", "2"),
    "more stages than layers": ({}, {"pipeline_parallel_size": 9}, "--pipeline-parallel-size", "9"),
    "speculation": ({}, {"speculative_config": NGRAM}, "--speculative-config", "ngram_gpu"),
    "drafts accepted by a rate": (
        {},
        {"speculative_config": NGRAM | SYNTHETIC},
        "--speculative-config rejection_sample_method",
        "synthetic",
    ),
    "KV sharing": ({}, {"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill", "True"),
    "KV transfer": ({}, {"kv_transfer_config": CONNECTOR}, "--kv-transfer-config", "ExampleConnector"),
    "KV offloading": ({}, {"kv_offloading_size": 1.0}, "--kv-offloading-size", "1.0"),
    "weights offloaded": ({}, {"cpu_offload_gb": 1}, "--cpu-offload-gb", "1"),
    "one kind of cache": (
        {},
        {"disable_hybrid_kv_cache_manager": True},
        "--disable-hybrid-kv-cache-manager",
        "True",
    ),
    **{
        f"LoRA, {flag}": ({}, {"enable_lora": True, flag: value}, f"--{flag.replace('_', '-')}", shown)
        for flag, value, shown in (
            ("lora_dtype", "float16", "float16"),
            ("lora_target_modules", ["q_proj"], "q_proj"),
            ("fully_sharded_loras", True, "True"),
            ("enable_mixed_moe_lora_format", True, "True"),
            ("enable_moe_shared_loras", True, "True"),
            ("enable_tower_connector_lora", True, "True"),
            ("max_lora_cls_labels", 2, "2"),
            ("specialize_active_lora", True, "True"),
        )
    },
    "another attention backend": (
        {},
        {"attention_config": {"backend": "CPU_MLA"}},
        "--attention-backend",
        "CPU_MLA",
    ),
    "another attention backend, by name": (
        {},
        {"attention_backend": "CPU_MLA"},
        "--attention-backend",
        "CPU_MLA",
    ),
    "another attention backend, by kind": (
        {},
        {"attention_config": {"backend_per_kind": {"mla_attention": "CPU_MLA"}}},
        "--attention-config backend_per_kind",
        "CPU_MLA",
    ),
    "another Mamba kernel": ({}, {"mamba_backend": "flashinfer"}, "--mamba-backend", "FLASHINFER"),
    "states at an interval": (
        {},
        {"prefix_cache_retention_interval": 112},
        "--prefix-cache-retention-interval",
        "112",
    ),
    "states where prefixes part": (
        {},
        {"enable_mamba_shared_prefix_checkpoint": True},
        "--enable-mamba-shared-prefix-checkpoint",
        "True",
    ),
    "replayed states": ({}, {"use_replayssm": True}, "--use-replayssm", "True"),
    "rounded states": (
        {},
        {"enable_mamba_cache_stochastic_rounding": True},
        "--enable-mamba-cache-stochastic-rounding",
        "True",
    ),
    "rounds of rounding": ({}, {"mamba_cache_philox_rounds": 4}, "--mamba-cache-philox-rounds", "4"),
    "another GDN prefill": ({}, {"gdn_prefill_backend": "triton"}, "--gdn-prefill-backend", "triton"),
    "hyperconnections": ({}, {"enable_hc_sp": True}, "--enable-hc-sp", "True"),
    "layers offloaded": ({}, {"offload_group_size": 2}, "--offload-group-size", "2"),
    "whole prompts with prefix caching": (
        {},
        {"enable_chunked_prefill": False, "enable_prefix_caching": True, "max_num_batched_tokens": 8192},
        "--enable-chunked-prefill",
        "False",
    ),
    "whole images": (
        {},
        {"disable_chunked_mm_input": True, "enable_prefix_caching": True},
        "--disable-chunked-mm-input",
        "True",
    ),
    "another KDA prefill": ({}, {"kda_prefill_backend": "triton"}, "--kda-prefill-backend", "triton"),
    "another implementation": ({}, {"model_impl": "transformers"}, "--model-impl", "transformers"),
    "another implementation, without experts": (
        {"num_experts": 0},
        {"model_impl": "transformers"},
        "--model-impl",
        "transformers",
    ),
    "another KDA decode": ({}, {"kda_decode_backend": "triton"}, "--kda-decode-backend", "triton"),
}
ACCEPTED: Accepted = {
    "as it is": ({}, {}),
    "remote code": ({}, {"trust_remote_code": True}),
    "fp32": ({}, {"dtype": "float32"}),
    "state in fp32, said": ({}, {"mamba_ssm_cache_dtype": "float32"}),
    "two ranks": ({}, {"tensor_parallel_size": 2}),
    "LoRA": ({}, {"enable_lora": True, "max_loras": 2, "lora_dtype": "bfloat16"}),
    "blocks of 32": ({}, {"block_size": 32}),
    "drafts by n-grams": ({}, {"speculative_config": NGRAM | {"method": "ngram"}, "enable_prefix_caching": True}),
    "a million tokens": ({}, {"max_model_len": 1048576}),
    "KV transfer of latents alone": (
        linear(kda_layers=[], full_attn_layers=list(range(1, demo_config()["num_hidden_layers"] + 1))),
        {"kv_transfer_config": CONNECTOR},
    ),
}


# Refused too, but on a CPU vLLM refuses them before, or sets them back: flag -> where its value stands, the value.
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
    from vllm.config import SpeculativeConfig
    from vllm.config.lora import LoRAConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    from vllm_kimi_linear.cache import configured
    from vllm_kimi_linear.config.errors import ConfigError
    from vllm_kimi_linear.config.flags import check_flags

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
        config.speculative_config = object.__new__(SpeculativeConfig)
        config.speculative_config.method = "ngram"
        together.append(sentence())
    return said, together, configured.cache_layout(config, 1000).describe(4096)


def test_refused_elsewhere(demo_model: Path) -> None:
    said, together, cache = in_own_process(check_elsewhere, str(demo_model))
    assert said.keys() == ELSEWHERE.keys()
    for flag, (_, value) in ELSEWHERE.items():
        assert said[flag].startswith(f"--{flag.replace('_', '-')} is {getattr(value, 'name', value)}; ")
    assert "--no-enable-prefix-caching" in said["decode_context_parallel_size"]
    experts, drafts = together
    assert experts.startswith("--enable-expert-parallel is True; with --data-parallel-size ")
    assert drafts.startswith("--speculative-config method is ngram; with --decode-context-parallel-size ")
    assert "bytes a token of latent cache on one rank of 4" in cache


@pytest.fixture(scope="module")
def found(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    table = {name: row[:2] for name, row in (REFUSED | ACCEPTED).items()}
    return outcomes(demo_model, table, tmp_path_factory.mktemp("configs"))


def test_no_case_stands_in_both_tables() -> None:
    assert not REFUSED.keys() & ACCEPTED.keys()


@pytest.mark.parametrize("case", REFUSED)
def test_refused(found: dict[str, list[str]], case: str) -> None:
    check_refused(found[case], *REFUSED[case][2:])


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted(found: dict[str, list[str]], case: str) -> None:
    assert found[case] == []
