"""A flag that this model cannot honour stops the start with one sentence; what can be honoured is accepted."""

from pathlib import Path

import pytest

from kimi_demo.presets import demo_config
from tests.support.starts import Accepted, Refused, check_refused, linear, outcomes

NGRAM = {"method": "ngram_gpu", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
SYNTHETIC = {"method": "ngram", "rejection_sample_method": "synthetic", "synthetic_acceptance_length": 2}
CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
ELSEWHERE_KEPT = {"spec_name": "HostOffloadingSpec", "spec_module_path": "tests.support.host_offloading"}
OFFLOADING = {"kv_connector": "OffloadingConnector", "kv_connector_extra_config": ELSEWHERE_KEPT}

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
    "KV transfer": ({}, {"kv_transfer_config": CONNECTOR}, "--kv-transfer-config kv_connector", "ExampleConnector"),
    "KV offloading, by the connector": (
        {},
        {"kv_transfer_config": CONNECTOR | {"kv_connector": "OffloadingConnector"}},
        "--kv-transfer-config kv_connector",
        "OffloadingConnector",
    ),
    **{
        f"KV offloading, {setting}": (
            {},
            {
                "kv_transfer_config": CONNECTOR
                | OFFLOADING
                | {"kv_connector_extra_config": ELSEWHERE_KEPT | {setting: 2}}
            },
            f"--kv-transfer-config {setting}",
            "2",
        )
        for setting in ("blocks_per_chunk", "block_size")
    },
    "KV offloading without a prefix cache": (
        {},
        {"kv_transfer_config": CONNECTOR | OFFLOADING, "enable_prefix_caching": False},
        "--enable-prefix-caching",
        "False",
    ),
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
