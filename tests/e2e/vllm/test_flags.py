"""Every flag of vLLM's engine has a verdict: refused, run by a test, or nothing to this model.

A flag of another vLLM that has none fails `test_every_flag_has_one_verdict`: find out what it does here, and note it.
Those run here are compared, in one process, with the answers of an engine without them.
"""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.vllm.test_flag_errors import REFUSED
from tests.e2e.vllm.test_gpu_flag_errors import ELSEWHERE
from tests.support.own_process import in_own_process

ROOT = Path(__file__).parents[2]

# Refused by a sentence that names the flag: the cases stand in test_flag_errors.py and test_gpu_flag_errors.py.
REFUSED_FLAGS = """
    attention_backend block_size cpu_offload_gb data_parallel_size dcp_q_replicate decode_context_parallel_size
    enable_mixed_moe_lora_format enable_moe_shared_loras enable_tower_connector_lora
    fully_sharded_loras lora_dtype lora_target_modules max_lora_cls_labels specialize_active_lora
    disable_chunked_mm_input disable_hybrid_kv_cache_manager enable_chunked_prefill enable_dbo enable_elastic_ep
    enable_eplb enable_expert_parallel enable_hc_sp enable_mamba_cache_stochastic_rounding
    enable_mamba_shared_prefix_checkpoint enable_return_routed_experts gdn_prefill_backend kda_decode_backend
    kda_prefill_backend kv_cache_dtype kv_offloading_size kv_sharing_fast_prefill mamba_backend
    mamba_block_size mamba_cache_dtype mamba_cache_philox_rounds model_impl offload_group_size
    prefill_context_parallel_size prefix_cache_retention_interval prefix_match_unit quantization quantization_config
    runner ubatch_size use_replayssm
    moe_backend linear_backend dcp_comm_backend cp_kv_cache_interleave_size enable_batch_sharded_sampling
    enable_cumem_allocator enable_nccl_comm_suspend enable_trace_replay return_sampling_mask
    sleep_mode_offload_cudagraph sleep_preserve_parameter_names
"""

# Run by another file of the tests, which names it.
TESTED = {
    "additional_config": "e2e/vllm/test_prefix_cache.py",
    "attention_config": "e2e/vllm/test_flag_errors.py",
    "disable_log_stats": "e2e/plugin/test_other_models.py",
    "distributed_executor_backend": "e2e/plugin/test_other_models.py",
    "dtype": "e2e/vllm/test_bfloat16.py",
    "enable_lora": "e2e/vllm/test_adapters.py",
    "enable_prefix_caching": "e2e/vllm/test_prefix_cache.py",
    "enable_sleep_mode": "e2e/vllm/test_gpu.py",
    "gpu_memory_utilization": "e2e/vllm/test_gpu.py",
    "hf_overrides": "e2e/vllm/test_config_errors.py",
    "kv_cache_memory_bytes": "conftest.py",
    "mamba_ssm_cache_dtype": "e2e/vllm/test_gpu.py",
    "kv_transfer_config": "e2e/vllm/test_offloading.py",
    "max_cpu_loras": "e2e/vllm/test_adapters.py",
    "max_lora_rank": "e2e/vllm/test_adapters.py",
    "max_loras": "e2e/vllm/test_adapters.py",
    "max_model_len": "e2e/vllm/test_long_context.py",
    "max_num_batched_tokens": "conftest.py",
    "max_num_seqs": "e2e/vllm/test_prefix_cache.py",
    "num_gpu_blocks_override": "e2e/vllm/test_prefix_cache.py",
    "pipeline_parallel_size": "e2e/vllm/test_parallel.py",
    "speculative_config": "e2e/vllm/test_speculation.py",
    "tensor_parallel_size": "e2e/vllm/test_parallel.py",
    "trust_remote_code": "e2e/vllm/test_flag_errors.py",
}

# Run here: name of the run -> flags. Those of SHORT always, the others in the soak.
SHORT: dict[str, dict[str, Any]] = {
    "the scheduler's ways": {
        "async_scheduling": False,
        "long_prefill_token_threshold": 64,
        "long_prefill_token_threshold_adaptive": True,
        "max_num_active_seqs": 3,
        "max_num_scheduled_tokens": 200,
        "prefill_schedule_interval": 2,
        "scheduler_reserve_full_isl": False,
        "scheduling_policy": "priority",
        "watermark": 0.1,
    },
    "what is asked beside the tokens": {
        "logprobs_mode": "processed_logprobs",
        "max_logprobs": 5,
        "seed": 7,
        "use_fp64_gumbel": True,
    },
}
LONG: dict[str, dict[str, Any]] = {
    "async_scheduling": {"async_scheduling": True},
    "chunked prefill off": {
        "enable_chunked_prefill": False,
        "enable_prefix_caching": False,
        "max_num_batched_tokens": 1024,
    },
    "priority and a small cache": {"scheduling_policy": "priority", "num_gpu_blocks_override": 24},
    "prefix_caching_hash_algo": {"prefix_caching_hash_algo": "sha256_cbor"},
    "enable_prompt_embeds": {"enable_prompt_embeds": True},
    "logprobs_mode": {"logprobs_mode": "raw_logits"},
    "load_format": {"load_format": "safetensors", "safetensors_load_strategy": "eager"},
    "safetensors_load_strategy": {"safetensors_load_strategy": "prefetch"},
    "mamba_cache_mode": {"mamba_cache_mode": "none"},
    "mamba_cache_mode without a prefix cache": {"mamba_cache_mode": "align", "enable_prefix_caching": False},
    "model_impl": {"model_impl": "vllm", "config_format": "hf", "convert": "none"},
    "skip_tokenizer_init": {"skip_tokenizer_init": True},
    "kv_events_config": {"kv_events_config": {"enable_kv_cache_events": True, "publisher": "null"}},
    "enforce_eager": {"enforce_eager": True},
    "optimization_level": {"optimization_level": 0},
    "optimization_level 3": {"optimization_level": 3},
    "performance_mode": {"performance_mode": "throughput"},
    "performance_mode interactivity": {"performance_mode": "interactivity"},
    "compilation_config": {"compilation_config": {"mode": 3}, "cudagraph_capture_sizes": [1, 2, 4]},
    "compilation_config graphs": {"compilation_config": {"cudagraph_mode": "FULL"}},
    "what nothing reads": {
        "disable_cascade_attn": True,
        "disable_sliding_window": True,
        "enable_ep_weight_filter": True,
        "enable_flashinfer_autotune": True,
        "enable_shm_tensor_arena": True,
        "expert_placement_strategy": "round_robin",
        "kv_cache_dtype_skip_layers": ["0"],
        "linear_backend": "triton",
        "swa_bounded_replay": False,
    },
    "measurements": {
        "cudagraph_metrics": True,
        "enable_layerwise_nvtx_tracing": True,
        "enable_logging_iteration_details": True,
        "enable_mfu_metrics": True,
        "kv_cache_metrics": True,
        "kv_cache_metrics_sample": 1.0,
    },
    # The last: on a CPU vLLM starts no engine in a process that has drafted by n-grams.
    "fewer drafts with more sequences": {
        "spec_method": "ngram",
        "spec_tokens": 3,
        "speculative_config": {
            "prompt_lookup_max": 3,
            "prompt_lookup_min": 1,
            "num_speculative_tokens_per_batch_size": [[1, 2, 3], [3, 256, 1]],
        },
    },
}

# Nothing that is ours reads these, and vLLM does the same with them for every model.
UNTOUCHED = {
    "where the checkpoint and its files come from": """
        model model_weights served_model_name hf_config_path revision code_revision hf_token download_dir
        ignore_patterns tokenizer tokenizer_revision max_parallel_loading_workers use_tqdm_on_load pt_load_map_location
        safetensors_prefetch_num_threads safetensors_prefetch_block_size model_loader_extra_config
    """,
    "texts on their way to tokens and back": """
        tokenizer_mode reasoning_parser reasoning_parser_plugin reasoning_config io_processor_plugin
        renderer_num_workers generation_config override_generation_config tokens_only stream_interval
    """,
    "logits on their way to tokens": "logits_processors structured_outputs_config watermark_config",
    "images, sound and video, which this model does not take": """
        allowed_local_media_path allowed_media_domains language_model_only limit_mm_per_prompt enable_mm_embeds
        interleave_mm_strings media_io_kwargs mm_processor_kwargs mm_processor_cache_gb mm_processor_cache_type
        mm_hasher_algorithm mm_shm_cache_max_object_size_mb mm_encoder_only mm_encoder_tp_mode mm_encoder_attn_backend
        mm_encoder_attn_dtype mm_encoder_fp8_scale_path mm_encoder_fp8_scale_save_path mm_encoder_fp8_scale_save_margin
        default_mm_loras skip_mm_profiling video_pruning_rate video_pruning_method mm_tensor_ipc mm_processor_device
        mm_ipc_gpu_memory_gb mm_device_do_normalize enable_mm_processor_stats
        ec_transfer_config ec_manager_config
    """,
    "what reads them is refused: drafters, offloading, kinds of parallelism, pooling": """
        spec_model offload_backend cpu_offload_params offload_num_in_group offload_prefetch_step
        offload_params kv_offloading_backend dbo_decode_token_threshold dbo_prefill_token_threshold
        elastic_ep_max_dp_size eplb_config allow_deprecated_quantization pooler_config mamba_ssu_algorithm
        replayssm_buffer_len
    """,
    "kinds of model that this one is none of": "diffusion_config engram_config sparse_indexer_topk_backend",
    "processes, their machines and their network": """
        master_addr master_port nnodes node_rank distributed_timeout_seconds cpu_distributed_timeout_seconds numa_bind
        numa_bind_nodes numa_bind_cpus device_ids _api_process_count _api_process_rank ray_workers_use_nsight
        worker_cls worker_extension_cls scheduler_cls shutdown_timeout disable_custom_all_reduce
        fault_tolerance_config enable_fault_tolerance fail_on_environ_validation weight_transfer_config
    """,
    "the queue in front of the engine": "max_num_queued_reqs max_num_queued_tokens",
    "logs, metrics, traces": """
        aggregate_engine_logging show_hidden_metrics_for_version otlp_traces_endpoint collect_detailed_traces
        custom_histogram_buckets jit_monitor_mode jit_monitor_verbose profiler_config logging_config log_level
        log_config_file enable_log_requests per_request_spec_decode_metrics
    """,
    "another class or kernel in place of ours or vLLM's, at one's own risk": "model_class_overrides ir_op_priority",
    "of several flags in one, each of which has its verdict": "aux_output_config kernel_config mamba_config",
    "read where experts are apart on several engines, which is refused": "all2all_backend",
    "engines, their machines and their network": """
        data_parallel_address data_parallel_backend data_parallel_external_lb data_parallel_hybrid_lb
        data_parallel_multi_port_external_lb data_parallel_rank data_parallel_rpc_port data_parallel_size_local
        data_parallel_start_rank disable_nccl_for_dp_synchronization dp_sync_interval
    """,
    "replaced by cp_kv_cache_interleave_size": "dcp_kv_cache_interleave_size",
    "other names of parts of what is run": "max_cudagraph_capture_size",
}


def verdicts() -> list[str]:
    """Each flag as often as it has a verdict."""
    run = {flag for flags in (SHORT | LONG).values() for flag in flags}
    untouched = [flag for flags in UNTOUCHED.values() for flag in flags.split()]
    elsewhere = [*REFUSED_FLAGS.split(), *TESTED]
    return [*elsewhere, *run.difference(elsewhere), *untouched]


def test_every_flag_has_one_verdict() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    assert sorted(verdicts()) == sorted(field.name for field in dataclasses.fields(AsyncEngineArgs))


@pytest.mark.parametrize("flag", REFUSED_FLAGS.split())
def test_a_refused_flag_has_its_sentence(flag: str) -> None:
    cases = [(arguments, field) for _, arguments, field, _ in REFUSED.values()]
    named = [field for arguments, field in cases if flag in arguments and field == f"--{flag.replace('_', '-')}"]
    assert named or flag in ELSEWHERE


@pytest.mark.parametrize("flag", TESTED)
def test_a_tested_flag_stands_in_its_test(flag: str) -> None:
    text = (ROOT / TESTED[flag]).read_text()
    assert f"--{flag.replace('_', '-')}" in text or flag in text


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Name of each run -> greedy tokens of all prompts, asked twice, or [class, message] of what ended it."""
    import torch
    from vllm import LLM, SamplingParams

    def ask(flags: dict[str, Any]) -> list[list[int]]:
        base = {"dtype": "float32", "max_model_len": 1024, "max_num_batched_tokens": 256, "seed": 0}
        limits = {"kv_cache_memory_bytes": 64 << 20, "distributed_executor_backend": "uni", "disable_log_stats": False}
        llm = LLM(task["model"], **base | limits | flags)
        prompts: list[Any] = [{"prompt_token_ids": prompt} for prompt in task["prompts"]]
        if flags.get("enable_prompt_embeds"):
            [embeds] = llm.apply_model(
                lambda model: [model.embed_input_ids(torch.tensor(ids)).detach() for ids in task["prompts"]]
            )
            prompts = [{"prompt_embeds": rows} for rows in embeds]
        wanted = SamplingParams(
            temperature=0,
            max_tokens=12,
            ignore_eos=True,
            detokenize=False,
            logprobs=3 if "logprobs_mode" in flags else None,
        )
        urgency = [number % 3 for number in range(len(prompts))]
        answers = []
        for _ in range(2):  # the second time from the prefix cache
            found = llm.generate(
                prompts, wanted, use_tqdm=False, priority=urgency if flags.get("scheduling_policy") else None
            )
            answers += [list(one.outputs[0].token_ids) for one in found]
        return answers

    results: dict[str, Any] = {}
    for name, flags in task["runs"].items():
        try:
            results[name] = ask(flags)
        except Exception as error:  # the next runs are worth having
            results[name] = [type(error).__name__, str(error)]
    return results


def check_runs(model: Path, runs: dict[str, dict[str, Any]]) -> None:
    source = random.Random(41)

    def prompt(length: int) -> list[int]:
        return [source.randrange(4, 1000) for _ in range(length)]

    document = prompt(500)
    prompts = [prompt(5), prompt(100), prompt(300), document, document[:400] + prompt(60), document + prompt(40)]
    task = {"model": str(model), "prompts": prompts, "runs": {"default": {}} | runs}
    found = in_own_process(run, json.loads(json.dumps(task)), VLLM_ENABLE_V1_MULTIPROCESSING="0")
    default = found.pop("default")
    assert default[:6] == default[6:], default
    assert {name: answer for name, answer in found.items() if answer != default} == {}


def test_flags_change_no_answer(demo_model: Path) -> None:
    check_runs(demo_model, SHORT)


@pytest.mark.soak
def test_more_flags_change_no_answer(demo_model: Path) -> None:
    check_runs(demo_model, LONG)
