"""On a GPU: which of vLLM's methods a layer asks for by its name, and which of its weights the decode kernels read."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.config.quantization import resolve_quantization_config
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig

from benchmarks.common import CONFIG
from benchmarks.h200.quantised import quantised
from decode_kernels.weights import QuantizedWeight
from vllm_kimi_linear.config.model import ModelSizes
from vllm_kimi_linear.quantized import gpu

LAYER = "model.layers.1"  # KDA, with experts
FULL = "model.layers.3"  # MLA


def quantization(weights: str) -> gpu.GpuQuantization:
    config = json.loads(CONFIG.read_text()) | quantised(weights)
    theirs = CompressedTensorsConfig.from_config(config["quantization_config"])
    return gpu.GpuQuantization(theirs, ModelSizes.from_config(config))


def experts(backend: str = "auto") -> RoutedExperts:
    layer = RoutedExperts.__new__(RoutedExperts)
    nn.Module.__init__(layer)
    layer.moe_config = SimpleNamespace(moe_backend=backend)
    return layer


@pytest.mark.parametrize(
    ("weights", "name", "strategy"),
    [
        ("fp8", f"{LAYER}.self_attn.in_proj", "channel"),
        ("fp8", f"{FULL}.self_attn.in_proj", "channel"),
        ("fp8", f"{FULL}.self_attn.kv_b_proj", None),  # attention reads it
        ("fp8", f"{LAYER}.block_sparse_moe.shared_experts.gate_up_proj", "channel"),
        ("fp8", f"{LAYER}.block_sparse_moe.gate", None),
        ("fp8", "lm_head", None),
        ("fp8-block", "model.layers.0.mlp.down_proj", "block"),
        ("fp8-block", f"{LAYER}.self_attn.o_proj", None),
        ("int4", f"{LAYER}.block_sparse_moe.shared_experts.down_proj", None),
    ],
)
def test_a_linear_layer_is_held_as_its_parts_are_stored(weights: str, name: str, strategy: str | None) -> None:
    found = quantization(weights).get_scheme_dict(nn.Module(), name)
    assert (found and found["weights"].strategy) == strategy


@pytest.mark.parametrize(("weights", "strategy"), [("fp8", "channel"), ("fp8-block", "block"), ("int4", "group")])
def test_experts_too(weights: str, strategy: str) -> None:
    name = f"{LAYER}.block_sparse_moe.experts"
    for asked in (name, f"{name}.0.w1", f"{name}.0.w2"):  # as vLLM asks, of an expert's parts
        found = quantization(weights).get_scheme_dict(experts(), asked)
        assert found is not None and found["weights"].strategy == strategy


def test_experts_quantised_as_they_are_loaded_stay_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnlineQuantizationConfig, "get_quant_method", lambda *_: "vLLM's")
    theirs = OnlineQuantizationConfig(resolve_quantization_config("fp8_per_channel", None))
    layer = experts()
    assert gpu.OnlineQuantization(theirs.args).get_quant_method(layer, "experts") == "vLLM's"
    assert layer.moe_config.moe_backend == "triton"


def layer_of(**tensors: Any) -> nn.Module:
    layer = nn.Module()
    for name, tensor in tensors.items():
        setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
    return layer


FP8 = torch.zeros(256, 384).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("tensors", "group", "rows"),
    [
        ({"weight": FP8.t(), "weight_scale": torch.ones(256, 1)}, 512, 1),  # as vLLM's product takes it
        ({"weight": FP8, "weight_scale": torch.ones(2, 3)}, 128, 128),
        ({"weight": FP8.t(), "weight_scale": torch.ones(1)}, 512, 256),
        ({"weight": torch.zeros(256, 192, dtype=torch.uint8), "weight_scale": torch.ones(256, 12).bfloat16()}, 32, 1),
    ],
    ids=["by channel", "by block", "one scale", "4 bits"],
)
def test_what_the_decode_kernels_read(tensors: dict[str, torch.Tensor], group: int, rows: int) -> None:
    found = gpu.readable(layer_of(**tensors), "weight")
    assert isinstance(found, QuantizedWeight)
    assert (found.shape, found.group, found.rows) == ((256, 384), group, rows)
    assert found.values.data_ptr() == tensors["weight"].data_ptr()


@pytest.mark.parametrize(
    "tensors",
    [
        {"weight": torch.zeros(24, 512, dtype=torch.int32), "weight_scale": torch.ones(12, 256)},  # packed for Marlin
        {"weight_packed": torch.zeros(256, 48, dtype=torch.int32), "weight_scale": torch.ones(256, 12)},
    ],
    ids=["another order", "no weight"],
)
def test_what_they_do_not(tensors: dict[str, torch.Tensor]) -> None:
    assert gpu.readable(layer_of(**tensors), "weight") is None


def test_plain_weights_are_themselves() -> None:
    layer = layer_of(weight=torch.zeros(4, 8))
    assert gpu.readable(layer, "weight") is layer.weight
