"""config.json's quantization_config: which layers are stored how, and one sentence for what is not served."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common import CONFIG
from kimi_server.planner.weight_bytes import weight_bytes
from vllm_kimi_linear.config.errors import ConfigError
from vllm_kimi_linear.config.model import ModelSizes, check_device
from vllm_kimi_linear.config.parameters import held_as
from vllm_kimi_linear.config.quantization import Quantization, Scheme
from vllm_kimi_linear.quantized import cpu
from vllm_kimi_linear.weights import WeightError, load, targets

CHANNEL = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True, "dynamic": False}
FP8: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": CHANNEL, "input_activations": TOKEN}},
    "ignore": ["lm_head"],
}
EXPERTS: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": INT4, "input_activations": None}},
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*\.mlp\..*"],
}

INT8 = FP8 | {
    "format": "int-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": CHANNEL | {"type": "int"}}},
}
BLOCK = CHANNEL | {"strategy": "block", "block_structure": [128, 128]}
BLOCKS = FP8 | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": BLOCK, "input_activations": TOKEN}}}


def config() -> dict[str, Any]:
    return json.loads(Path(CONFIG).read_text())


def sizes(quantization: dict[str, Any] | None) -> ModelSizes:
    return ModelSizes.from_config(config() | ({"quantization_config": quantization} if quantization else {}))


def test_the_48b_in_fp8_is_held_as_it_is_stored():
    model = sizes(FP8)
    table, held = targets(model), held_as(model)
    assert table["model.layers.0.self_attn.q_proj.weight_scale"].shapes == ((4096, 1),)
    assert (
        table["model.layers.0.self_attn.q_proj.weight_scale"].parameter
        == "model.layers.0.self_attn.in_proj.weight_scale"
    )
    expert = table["model.layers.3.block_sparse_moe.experts.255.w3.weight_scale"]
    assert expert.parameter == "model.layers.3.block_sparse_moe.experts.routed_experts.w13_weight_scale"
    assert expert.arguments == (expert.parameter, "w3", 255)
    scales = [name for name in table if name.endswith("weight_scale")]
    assert len(scales) == 20257  # every linear layer of the public checkpoint
    assert held["model.layers.0.self_attn.gates_b"] is None  # attention's kernels read it in the model's dtype
    assert table["model.layers.0.self_attn.f_b_proj.weight"].part is not None
    assert "lm_head.weight_scale" not in table
    assert 49.0e9 < weight_bytes(model, "bfloat16") < 51.5e9


def test_and_with_experts_in_4_bits():
    model = sizes(EXPERTS)
    table = targets(model)
    packed = table["model.layers.3.block_sparse_moe.experts.7.w1.weight_packed"]
    assert packed.shapes == ((1024, 2304 // 8),)
    assert packed.parameter == "model.layers.3.block_sparse_moe.experts.routed_experts.w13_weight_packed"
    shape = table["model.layers.3.block_sparse_moe.experts.7.w1.weight_shape"]
    assert (shape.parameter, shape.shapes) == ("", ((1024, 2304),))
    assert table["model.layers.3.self_attn.q_proj.weight"].part is None
    assert 29.0e9 < weight_bytes(model, "bfloat16", device="cuda") < 31.5e9
    assert 33.0e9 < weight_bytes(model, "bfloat16") < 34.0e9  # a CPU holds scales in float32


def test_a_cpu_holds_scales_in_float32_whatever_the_model_computes_in():
    torch.set_default_dtype(torch.bfloat16)  # as vLLM does while it builds one
    try:
        parts = cpu._empty(Scheme("packed4", group=32), 8, 64)
    finally:
        torch.set_default_dtype(torch.float32)
    assert parts["weight_scale"].dtype == torch.float32


def test_what_is_fused_of_layers_stored_in_several_ways_is_held_plain():
    mixed = copy.deepcopy(FP8)
    mixed["ignore"] += ["re:.*self_attn.b_proj"]
    assert held_as(sizes(mixed))["model.layers.0.self_attn.in_proj.weight"] is None
    assert held_as(sizes(mixed))["model.layers.0.self_attn.o_proj.weight"] == Scheme("fp8")
    mixed["ignore"] += [r"re:.*experts\.3\.w2"]
    with pytest.raises(ConfigError, match=r"block_sparse_moe.experts in several formats"):
        held_as(sizes(mixed))


def test_a_layers_name_comes_before_its_class():
    groups = {"group_0": FP8["config_groups"]["group_0"], "group_1": {"targets": ["re:.*o_proj"], "weights": INT4}}
    found = Quantization.from_config(
        FP8 | {"config_groups": groups | {"group_1": groups["group_1"] | {"format": "pack-quantized"}}}
    )
    assert found.scheme("model.layers.0.self_attn.o_proj") == Scheme("packed4", group=32)
    assert found.scheme("model.layers.0.self_attn.q_proj") == Scheme("fp8")
    assert found.scheme("lm_head") is None


def changed(path: str, value: object) -> dict[str, Any]:
    found = copy.deepcopy(FP8)
    *way, last = path.split(".")
    at = found
    for name in way:
        at = at[name]
    at[last] = value
    return found


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ("int8", "is of quant_method 'int8'; give a compressed-tensors checkpoint"),
        ({"quant_method": "gptq", "bits": 4}, "is of quant_method 'gptq'; give a compressed-tensors checkpoint"),
        ({"quant_method": "awq"}, "is of quant_method 'awq'"),
        (changed("config_groups", {}), "config_groups is {}; give at least one"),
        (changed("config_groups.group_0", 3), "config_groups.group_0 is 3; give its targets and weights"),
        (changed("config_groups.group_0.targets", "Linear"), "targets is 'Linear'; give a list"),
        (changed("config_groups.group_0.weights.num_bits", 3), "is float of 3 bits, float-quantized; implemented are"),
        (
            changed("config_groups.group_0.weights.strategy", "tensor_group"),
            "strategy is 'tensor_group'; give 'channel'",
        ),
        (changed("config_groups.group_0.weights.symmetric", False), "symmetric is False; only true"),
        (changed("config_groups.group_0.input_activations.dynamic", False), "only dynamic ones"),
        (changed("config_groups.group_0.weights.actorder", "group"), "actorder is 'group'"),
        (changed("ignore", "lm_head"), "ignore is 'lm_head'; give a list"),
        (changed("ignore", ["re:*("]), r"has the pattern 're:\*\(', which is no regular expression"),
        (changed("kv_cache_scheme", {"num_bits": 8}), "kv_cache_scheme is .* not implemented"),
        (changed("sparsity_config", {"format": "dense"}), "sparsity_config is .* not implemented"),
        (changed("format", "nvfp4-pack-quantized"), "is float of 8 bits, nvfp4-pack-quantized"),
    ],
)
def test_what_is_not_served_is_one_sentence(quantization: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        ModelSizes.from_config(config() | {"quantization_config": quantization})
    assert "\n" not in str(caught.value)


def test_groups_that_do_not_divide_a_row():
    wide = copy.deepcopy(EXPERTS)
    wide["config_groups"]["group_0"]["weights"]["group_size"] = 2048
    with pytest.raises(ConfigError, match="groups of 2048, which do not divide a row of 2304"):
        targets(sizes(wide))


def test_what_a_gpu_does_not_serve():
    check_device(sizes(EXPERTS), "cuda")
    check_device(sizes(INT8), "cpu")
    with pytest.raises(ConfigError, match="quantization_config stores int8; GPUs serve only fp8 and packed4"):
        check_device(sizes(INT8), "cuda")


def test_layers_that_end_within_a_block_are_plain_on_a_gpu():
    on_cpu, on_gpu = (held_as(sizes(BLOCKS), device) for device in ("cpu", "cuda"))
    first = "model.layers.0.self_attn"
    assert on_cpu[f"{first}.in_proj.weight"] == on_gpu[f"{first}.o_proj.weight"] == Scheme("fp8", block=(128, 128))
    assert on_gpu[f"{first}.in_proj.weight"] is None  # beta has 32 rows
    assert on_gpu["model.layers.1.block_sparse_moe.experts.routed_experts.w13_weight"] is not None


SCALE = "model.layers.3.block_sparse_moe.experts.7.w1.weight_scale"
SHAPE = "model.layers.3.block_sparse_moe.experts.7.w1.weight_shape"


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        (SCALE, torch.ones(1024, 71), r"weight_scale has shape \[1024, 71\] where config.json asks for \[1024, 72\]"),
        (
            SHAPE,
            torch.tensor([1024, 2303]),
            r"weight_shape is \[1024, 2303\] where config.json asks for \[1024, 2304\]",
        ),
        (SCALE.replace("scale", "zero_point"), torch.ones(1), "weight_zero_point is not part of this model"),
        (SCALE.replace("weight_scale", "weight"), torch.ones(1024, 2304), "w1.weight is not part of this model"),
        (SCALE.replace("weight_scale", "weight_packed"), torch.ones(1024, 288), r"is missing"),
    ],
)
def test_a_scale_too_many_too_few_or_misshapen_names_itself(name: str, tensor: torch.Tensor, words: str) -> None:
    with pytest.raises(WeightError, match=words):
        load(torch.nn.Module(), sizes(EXPERTS), [(name, tensor)])


def test_values_and_scales_that_a_running_engine_is_sent_apart():
    """What is held plain is made of both, which one call has to bring."""
    quantised = sizes(FP8)
    name = next(name for name, target in targets(quantised, "cpu").items() if target.part is not None)
    with pytest.raises(WeightError, match="alone: send values and scales in one call"):
        load(torch.nn.Module(), quantised, [(name, torch.ones(targets(quantised, "cpu")[name].shapes[0]))], whole=False)


def test_without_the_c_kernels_the_start_says_so(monkeypatch: pytest.MonkeyPatch):
    def missing(device: str) -> None:
        raise ImportError(f"no kernels for {device}")

    monkeypatch.setattr("decode_kernels.interface.kernels", missing)
    with pytest.raises(ConfigError, match="needs the C kernels: install a C compiler, then this package again"):
        cpu.CpuQuantization(sizes(EXPERTS))
