"""What cannot work stops the start with one sentence; what can is accepted."""

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from safetensors.torch import load_file, save_file

from kimi_demo.checkpoint import write_checkpoint
from kimi_demo.presets import demo_config
from kimi_demo.server import Server
from tests.support.own_process import in_own_process
from vllm_kimi_linear.cache import layout
from vllm_kimi_linear.config.model import ModelSizes

REMOVED = object()  # a key that the config.json of the case lacks


def linear(**changes: Any) -> dict[str, Any]:
    """Changes inside linear_attn_config of the demo: 8 layers, MLA at 4 and 8."""
    fields = {
        "full_attn_layers": [4, 8],
        "head_dim": 64,
        "kda_layers": [1, 2, 3, 5, 6, 7],
        "num_heads": 4,
        "short_conv_kernel_size": 4,
    }
    return {"linear_attn_config": {k: v for k, v in (fields | changes).items() if v is not REMOVED}}


def compressed(name: str) -> dict[str, Any]:
    """The quantization_config that compressed-tensors writes for a scheme."""
    scheme = preset_name_to_scheme(name, ["Linear"])
    return QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]).model_dump(mode="json")


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
NGRAM = {"method": "ngram_gpu", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
SYNTHETIC = {"method": "ngram", "rejection_sample_method": "synthetic", "synthetic_acceptance_length": 2}
CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}

# what is wrong -> (changes to config.json, engine arguments, the field and the value that the sentence names)
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "a layer in both lists": (linear(full_attn_layers=[3, 4, 8]), {}, "linear_attn_config", "layer 3"),
    "a layer in neither list": (linear(full_attn_layers=[8]), {}, "linear_attn_config", "layer 4"),
    "a layer beyond the last": (linear(full_attn_layers=[4, 8, 9]), {}, "full_attn_layers", "layer 9"),
    "a layer 0": (linear(kda_layers=[0, 1, 2, 3, 5, 6, 7]), {}, "kda_layers", "layer 0"),
    "no MLA layer": (
        linear(full_attn_layers=[], kda_layers=list(range(1, 9))),
        {},
        "full_attn_layers",
        "[]",
    ),
    "no linear_attn_config": ({"linear_attn_config": REMOVED}, {}, "linear_attn_config", "missing"),
    "null linear_attn_config": ({"linear_attn_config": None}, {}, "linear_attn_config", "missing"),
    "no kda_layers": (linear(kda_layers=REMOVED), {}, "linear_attn_config.kda_layers", "missing"),
    "null full_attn_layers": (linear(full_attn_layers=None), {}, "full_attn_layers", "missing"),
    "no KDA head_dim": (linear(head_dim=REMOVED), {}, "linear_attn_config.head_dim", "missing"),
    "KDA head_dim": (linear(head_dim=48), {}, "linear_attn_config.head_dim", "48"),
    "convolution kernel size": (linear(short_conv_kernel_size=9), {}, "short_conv_kernel_size", "9"),
    "bounded gate": (linear(gate_lower_bound=-5.0), {}, "linear_attn_config.gate_lower_bound", "-5.0"),
    "heads over TP 3": ({}, {"tensor_parallel_size": 3}, "num_heads", "--tensor-parallel-size 3"),
    "heads over TP 8": ({}, {"tensor_parallel_size": 8}, "num_heads", "--tensor-parallel-size 8"),
    "activation": ({"hidden_act": "gelu"}, {}, "hidden_act", "'gelu'"),
    "router": ({"moe_router_activation_func": "softmax"}, {}, "moe_router_activation_func", "'softmax'"),
    "unknown router": ({"moe_router_activation_func": "tanh"}, {}, "moe_router_activation_func", "'tanh'"),
    "query latent": ({"q_lora_rank": 64}, {}, "q_lora_rank", "64"),
    "latent size on the CPU": ({"kv_lora_rank": 256}, {}, "kv_lora_rank", "256"),
    "shared key size on the CPU": ({"qk_rope_head_dim": 32}, {}, "qk_rope_head_dim", "32"),
    "no latent": ({"kv_lora_rank": None}, {}, "kv_lora_rank", "missing"),
    "no hidden_size": ({"hidden_size": REMOVED}, {}, "hidden_size", "missing"),
    "hidden_size is a word": ({"hidden_size": "abc"}, {}, "hidden_size", "'abc'"),
    "no heads": ({"num_attention_heads": 0}, {}, "num_attention_heads", "0"),
    "no layers": ({"num_hidden_layers": 0}, {}, "num_hidden_layers", "0"),
    "grouped heads": ({"num_key_value_heads": 2}, {}, "num_key_value_heads", "2"),
    "more experts chosen than there are": ({"num_experts_per_token": 9}, {}, "num_experts_per_token", "9"),
    "draft layers": ({"num_nextn_predict_layers": 1}, {}, "num_nextn_predict_layers", "1"),
    "rotary positions": ({"mla_use_nope": False}, {}, "mla_use_nope", "False"),
    "MLA output gate": ({"mla_use_output_gate": True}, {}, "mla_use_output_gate", "True"),
    "quantised checkpoint": ({"quantization_config": GPTQ}, {}, "quantization_config", "gptq"),
    **{
        f"quantised checkpoint, {name}": (
            {"quantization_config": compressed(name)},
            {},
            "quantization_config",
            "compressed-tensors",
        )
        for name in ("W4A16", "FP8_BLOCK", "FP8_DYNAMIC")
    },
    "overridden field": ({}, {"hf_overrides": {"q_lora_rank": 5}}, "q_lora_rank", "5"),
    "quantization": ({}, {"quantization": "fp8"}, "--quantization", "fp8"),
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
    "LoRA": ({}, {"enable_lora": True}, "--enable-lora", "True"),
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
ACCEPTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as it is": ({}, {}),
    "remote code": ({}, {"trust_remote_code": True}),
    "fp32": ({}, {"dtype": "float32"}),
    "state in fp32, said": ({}, {"mamba_ssm_cache_dtype": "float32"}),
    "two ranks": ({}, {"tensor_parallel_size": 2}),
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
}


def check_elsewhere(model: str) -> dict[str, str]:
    """Flag -> the sentence of `check_flags` where the platform is no CPU."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    from vllm_kimi_linear.config.errors import ConfigError
    from vllm_kimi_linear.config.flags import check_flags

    config = EngineArgs(model=model, max_model_len=8192, enable_prefix_caching=True).create_engine_config()
    config.cache_config.mamba_block_size = None  # vLLM has filled it in since
    said = {}
    with mock.patch.object(type(current_platform), "is_cpu", lambda self: False):
        check_flags(config, states=True)
        for flag, (path, value) in ELSEWHERE.items():
            part, name = path.split(".")
            before = getattr(owner := getattr(config, part), name)
            setattr(owner, name, value)
            try:
                check_flags(config, states=True)
            except ConfigError as error:
                said[flag] = str(error)
            setattr(owner, name, before)
        config.cache_config.enable_prefix_caching = False
        config.parallel_config.decode_context_parallel_size = 4
        check_flags(config, states=True)
    return said


def test_refused_elsewhere(demo_model: Path) -> None:
    said = in_own_process(check_elsewhere, str(demo_model))
    assert said.keys() == ELSEWHERE.keys()
    for flag, (_, value) in ELSEWHERE.items():
        assert said[flag].startswith(f"--{flag.replace('_', '-')} is {value}; ")
    assert "--no-enable-prefix-caching" in said["decode_context_parallel_size"]


def build(cases: dict[str, tuple[dict[str, Any], str]]) -> dict[str, list[str]]:
    """Case -> [class, message] of what building its configuration raises, or [] where it is accepted."""
    from vllm.engine.arg_utils import EngineArgs

    results: dict[str, list[str]] = {}
    # vLLM tries twice to read a config.json that it cannot, with a pause between.
    with mock.patch("time.sleep"):
        for name, (arguments, model) in cases.items():
            try:
                EngineArgs(model=model, **{"max_model_len": 8192} | arguments).create_engine_config()
                results[name] = []
            except Exception as error:
                results[name] = [type(error).__name__, str(error)]
    return results


def write_model(model: Path, changes: dict[str, Any], folder: Path) -> Path:
    """The demo checkpoint at `model` with changes to its config.json."""
    folder.mkdir()
    for file in model.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    config = json.loads((model / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not REMOVED}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


@pytest.fixture(scope="module")
def outcomes(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("configs")
    table = {name: row[:2] for name, row in (REFUSED | ACCEPTED).items()}
    cases = {
        name: (arguments, str(write_model(demo_model, changes, folder / str(index))))
        for index, (name, (changes, arguments)) in enumerate(table.items())
    }
    return in_own_process(build, cases)


def test_no_case_stands_in_both_tables() -> None:
    assert not REFUSED.keys() & ACCEPTED.keys()


@pytest.mark.parametrize("case", REFUSED)
def test_refused(outcomes: dict[str, list[str]], case: str) -> None:
    field, value = REFUSED[case][2:]
    assert outcomes[case], "accepted"
    kind, message = outcomes[case]
    assert kind == "ConfigError", message
    assert field in message
    assert value in message
    what, _, remedy = message.partition(";")
    assert what and remedy.strip(), "no remedy"
    assert "\n" not in message


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted(outcomes: dict[str, list[str]], case: str) -> None:
    assert outcomes[case] == []


# Ends of `vllm serve`, each for one place where a start can stop: reading config.json, building the configuration,
# loading the tokenizer, loading the weights, planning the cache.
ENDINGS = {
    "config.json": "layer 3 in both kda_layers and full_attn_layers; keep it in one",
    "flag": "--kv-cache-dtype is fp8; on cpu this model takes",
    "tokenizer": "does not load with transformers",
    "weights": "checkpoint tensor model.norm.weight is missing",
    "cache": "--max-model-len is 1048576; a sequence of that length takes ",
}


@pytest.fixture(scope="module")
def endings(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, list[str]]]:
    """Exit status and lines of each of ENDINGS, started together to share the cores."""
    folder = tmp_path_factory.mktemp("endings")
    starts = {
        "config.json": (write_model(demo_model, linear(full_attn_layers=[3, 4, 8]), folder / "layers"), []),
        "flag": (demo_model, ["--kv-cache-dtype=fp8"]),
        "tokenizer": (write_old_tokenizer(folder / "tokenizer"), ["--trust-remote-code"]),
        "weights": (write_without(demo_model, "model.norm.weight", folder / "weights"), []),
        "cache": (demo_model, ["--max-model-len=1048576", "--dtype=float32"]),
    }
    flags = ["--max-model-len=512", "--kv-cache-memory-bytes=64M"]
    servers = [
        Server(model, [*flags, *more], log_path=folder / f"{name}.log") for name, (model, more) in starts.items()
    ]
    with contextlib.ExitStack() as stack:
        processes = []
        for server in servers:
            log = stack.enter_context(server.log_path.open("wb"))
            environment = {**os.environ, **server.env, "PYTHONWARNINGS": "ignore"}
            process = subprocess.Popen(
                server.command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
            stack.callback(stop, process)
            processes.append(process)
        statuses = [process.wait(300) for process in processes]
    logs = [server.log.strip().splitlines() for server in servers]
    return dict(zip(starts, zip(statuses, logs, strict=True), strict=True))


def stop(process: subprocess.Popen) -> None:
    """End the process and whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def write_old_tokenizer(folder: Path) -> Path:
    """A checkpoint whose tokenizer imports a function that transformers 5 no longer has."""
    write_checkpoint(folder, layers=4, remote_code=True)
    code = folder / "tokenization_kimi.py"
    gone = "from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode"
    code.write_text(f"{gone}\n{code.read_text()}")
    return folder


def write_without(model: Path, name: str, folder: Path) -> Path:
    """The checkpoint at `model` without the tensor `name`."""
    write_model(model, {}, folder)
    tensors = load_file(model / "model.safetensors")
    del tensors[name]
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("ending", ["config.json", "flag", "tokenizer"])
def test_serve_ends_with_the_sentence(endings: dict[str, tuple[int, list[str]]], ending: str) -> None:
    status, log = endings[ending]
    assert status != 0
    assert "ConfigError: " in log[-1]
    assert ENDINGS[ending] in log[-1]


def test_old_tokenizer_is_named(endings: dict[str, tuple[int, list[str]]]) -> None:
    last = endings["tokenizer"][1][-1]
    assert "bytes_to_unicode" in last
    assert "--tokenizer-revision" in last


def test_serve_names_the_missing_tensor(endings: dict[str, tuple[int, list[str]]]) -> None:
    status, log = endings["weights"]
    assert status != 0
    assert any("WeightError: " + ENDINGS["weights"] in line for line in log)


def test_serve_says_how_much_cache_is_short(endings: dict[str, tuple[int, list[str]]]) -> None:
    status, log = endings["cache"]
    assert status != 0
    [line, *_] = (line for line in log if "ConfigError: " + ENDINGS["cache"] in line)
    model_sizes = ModelSizes.from_config(demo_config())
    plan = layout.cache_layout(model_sizes, activation_dtype="float32", kv_bytes=64 << 20, prefix_caching=True)
    longest = plan.longest_context(1 << 20)
    assert 0 < longest < 1 << 20
    assert " a rank and 64.0 MiB are there, " in line
    assert f" short: --max-model-len {longest} fits, or give more with " in line
