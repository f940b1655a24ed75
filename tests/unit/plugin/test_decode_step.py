"""Which models and which steps take the kernels for few tokens."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import override_forward_context

from vllm_kimi_linear import decode_step
from vllm_kimi_linear.attention.kda_metadata import KdaMetadata
from vllm_kimi_linear.config.model import ModelSizes
from vllm_kimi_linear.cpu import products
from vllm_kimi_linear.decode_step import MAX_TOKENS, DecodeStep, why_not

LAYER = "model.layers.0.self_attn"


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(is_cuda=lambda: True, is_cpu=lambda: False)
    monkeypatch.setattr(decode_step, "current_platform", gpu)


def config(**changes: Any) -> Any:
    values: dict[str, Any] = {
        "additional_config": {},
        "dtype": torch.bfloat16,
        "quant_config": None,
        "lora_config": None,
        "num_speculative_tokens": 0,
        "enable_expert_parallel": False,
        "data_parallel_size": 1,
    } | changes
    parallel = SimpleNamespace(
        enable_expert_parallel=values.pop("enable_expert_parallel"), data_parallel_size=values.pop("data_parallel_size")
    )
    model = SimpleNamespace(dtype=values.pop("dtype"))
    cache = SimpleNamespace(mamba_ssm_cache_dtype=values.pop("mamba_ssm_cache_dtype", "auto"))
    return SimpleNamespace(parallel_config=parallel, model_config=model, cache_config=cache, **values)


def sizes(**changes: Any) -> ModelSizes:
    fits = {"expert_groups": 1, "kda_layers": [0], "kda_head_dim": 128, "kv_lora_rank": 512}
    return SimpleNamespace(**fits | changes)  # type: ignore[return-value]


def test_a_model_that_fits(on_a_gpu: None) -> None:
    assert why_not(config(), sizes(), {"TRITON"}) is None
    assert why_not(config(), sizes(), {"HUMMING"}) is None  # by vLLM's kernel, in a step of ours


def test_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not(config(dtype=torch.float32), sizes(), {"CPU"}) is None
    assert "experts that run on CPU_AMX" in str(why_not(config(dtype=torch.float32), sizes(), {"CPU_AMX"}))
    assert "500 latent channels" in str(why_not(config(dtype=torch.float32), sizes(kv_lora_rank=500), {"CPU"}))
    monkeypatch.setattr(products, "has_onednn", lambda dtype: True)
    products.takes_c_kernels.cache_clear()
    assert "torch.bfloat16" in str(why_not(config(), sizes(), {"CPU"}))  # packed for oneDNN
    products.takes_c_kernels.cache_clear()


def test_other_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    neither = SimpleNamespace(is_cuda=lambda: False, is_cpu=lambda: False)
    monkeypatch.setattr(decode_step, "current_platform", neither)
    assert why_not(config(), sizes(), {"TRITON"}) == "the plugin's kernels are for NVIDIA GPUs and for CPUs"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"additional_config": {"decode_kernels": False}}, "turned off by --additional-config"),
        ({"dtype": torch.float32}, "bfloat16, not torch.float32"),
        ({"lora_config": object()}, "LoRA"),
        ({"num_speculative_tokens": 2}, "drafted tokens"),
        ({"enable_expert_parallel": True}, "expert or data parallelism"),
        ({"data_parallel_size": 2}, "expert or data parallelism"),
    ],
)
def test_what_does_not_fit(changes: dict[str, Any], reason: str, on_a_gpu: None) -> None:
    assert reason in str(why_not(config(**changes), sizes(), {"TRITON"}))


def test_models_that_do_not_fit(on_a_gpu: None) -> None:
    assert "one group of experts, not 2" in str(why_not(config(), sizes(expert_groups=2), ()))
    assert "no KDA layer" in str(why_not(config(), sizes(kda_layers=[]), ()))
    assert "run on FlashInfer CUTLASS" in str(why_not(config(), sizes(), {"TRITON", "FlashInfer CUTLASS"}))
    assert "not 96" in str(why_not(config(), sizes(kda_head_dim=96), ()))


def test_a_pipeline_stage_without_a_kda_layer() -> None:
    assert DecodeStep(None, None).kda_layer is None
    assert DecodeStep(LAYER, "no GPU").kda_layer is None


def metadata(**changes: Any) -> KdaMetadata:
    none = torch.zeros(0, 1, dtype=torch.int32)
    values: dict[str, Any] = {
        "num_requests": 2,
        "num_tokens": 2,
        "num_decodes": 2,
        "num_decode_tokens": 2,
        "decode_state_indices": none,
        "prefill_state_indices": none[:, 0],
        "prefill_checkpoints": None,
        "spec_decode": None,
        "prefill": None,
        "reordering": None,
    }
    return KdaMetadata(**values | changes)


@pytest.mark.parametrize(
    ("tokens", "found", "mode", "taken"),
    [
        (2, {LAYER: metadata()}, CUDAGraphMode.NONE, True),
        (2, {LAYER: metadata()}, CUDAGraphMode.FULL, True),
        (2, {LAYER: metadata()}, CUDAGraphMode.PIECEWISE, False),
        (4, {LAYER: metadata()}, CUDAGraphMode.NONE, False),  # two tokens are padding that the metadata does not know
        (2, {LAYER: metadata(prefill=object())}, CUDAGraphMode.NONE, False),
        (2, {LAYER: metadata(reordering=object())}, CUDAGraphMode.NONE, False),
        (MAX_TOKENS, {LAYER: metadata(num_decode_tokens=MAX_TOKENS)}, CUDAGraphMode.NONE, True),
        (MAX_TOKENS + 1, {LAYER: metadata(num_decode_tokens=MAX_TOKENS + 1)}, CUDAGraphMode.NONE, False),
        (2, {}, CUDAGraphMode.NONE, False),
        (2, None, CUDAGraphMode.NONE, False),  # vLLM measures memory
    ],
)
def test_steps(tokens: int, found: Any, mode: CUDAGraphMode, taken: bool, on_a_gpu: None) -> None:
    step = DecodeStep(LAYER, None)
    context: Any = SimpleNamespace(attn_metadata=found, cudagraph_runtime_mode=mode)
    with override_forward_context(context):
        assert step.takes(tokens) is taken


def test_a_cpu_takes_any_number_of_tokens() -> None:
    tokens = 10 * MAX_TOKENS
    context: Any = SimpleNamespace(
        attn_metadata={LAYER: metadata(num_decode_tokens=tokens)}, cudagraph_runtime_mode=CUDAGraphMode.NONE
    )
    with override_forward_context(context):
        assert DecodeStep(LAYER, None).takes(tokens)
