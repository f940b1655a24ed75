"""config.json -> ModelSizes, or one sentence that names the field, its value and the remedy."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kimi_demo.presets import PRESETS, demo_config
from vllm_kimi_linear.config.errors import ConfigError
from vllm_kimi_linear.config.model import ModelSizes, check_cache_dtypes, check_device
from vllm_kimi_linear.config.parallel import ParallelSizes

CONFIG_48B = json.loads((Path(__file__).parents[3] / "benchmarks" / "config_48b.json").read_text())


def changed(**changes: Any) -> dict[str, Any]:
    """The 48B's config with some fields replaced; `linear` merges into linear_attn_config, ... removes a field."""
    linear = copy.deepcopy(CONFIG_48B["linear_attn_config"]) | changes.pop("linear", {})
    config = copy.deepcopy(CONFIG_48B) | {"linear_attn_config": _given(linear)} | changes
    return _given(config)


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not ...}


def layout(kda: list[int], mla: list[int], **changes: Any) -> dict[str, Any]:
    sizes = {"num_hidden_layers": len(kda) + len(mla)} | changes
    return changed(**sizes, linear={"kda_layers": kda, "full_attn_layers": mla})


def test_the_48b():
    model_sizes = ModelSizes.from_config(CONFIG_48B)
    ParallelSizes(8, 2).check(model_sizes)
    assert model_sizes.mla_layers == (3, 7, 11, 15, 19, 23, 26)
    assert len(model_sizes.kda_layers) == 20 and model_sizes.kda_size == 4096
    assert model_sizes.layer_moe == (False,) + (True,) * 26
    assert model_sizes.latent_size == 576
    assert model_sizes.max_context == 1 << 20
    assert (model_sizes.num_experts, model_sizes.experts_per_token, model_sizes.routed_scaling_factor) == (
        256,
        8,
        2.446,
    )
    check_device(model_sizes, "cpu")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_demo_preset(preset: str):
    config = demo_config(preset)
    model_sizes = ModelSizes.from_config(config)
    assert [i + 1 for i in model_sizes.mla_layers] == config["linear_attn_config"]["full_attn_layers"]
    check_device(model_sizes, "cpu")


def test_all_kda_but_one():
    assert ModelSizes.from_config(layout([1, 2, 4, 5], [3])).layer_types == ("kda", "kda", "mla", "kda", "kda")


def test_all_mla_needs_no_kda_sizes():
    lists = {"kda_layers": [], "full_attn_layers": [1, 2]}
    config = changed(num_hidden_layers=2, linear_attn_config=lists)
    model_sizes = ModelSizes.from_config(config)
    ParallelSizes(32).check(model_sizes)
    assert model_sizes.layer_types == ("mla", "mla")
    assert (model_sizes.kda_heads, model_sizes.kda_head_dim, model_sizes.conv_kernel_size) == (0, 0, 0)


@pytest.mark.parametrize("experts", [None, 0, ...])
def test_dense(experts: Any):
    dense = ModelSizes.from_config(changed(num_experts=experts, num_experts_per_token=None, moe_intermediate_size=...))
    assert not any(dense.layer_moe) and dense.num_experts == 0


def test_which_layers_have_experts():
    every_other = ModelSizes.from_config(changed(first_k_dense_replace=3, moe_layer_freq=2))
    assert [i for i, moe in enumerate(every_other.layer_moe) if moe] == list(range(4, 27, 2))


def test_expert_groups():
    model_sizes = ModelSizes.from_config(changed(num_expert_group=8, topk_group=4))
    assert (model_sizes.expert_groups, model_sizes.topk_groups) == (8, 4)


@pytest.mark.parametrize(
    "config",
    [CONFIG_48B, layout([1, 3], [2]), layout([], [1, 2]), changed(moe_renormalize=False, num_expert_group=2)],
)
def test_loaded_config_classes_say_the_same(config: dict[str, Any]):
    from transformers.models.kimi_linear import KimiLinearConfig as TransformersConfig
    from vllm.transformers_utils.configs.kimi_linear import KimiLinearConfig as VllmConfig

    expected = ModelSizes.from_config(config)
    for kind in (TransformersConfig, VllmConfig):
        assert ModelSizes.from_hf(kind(**copy.deepcopy(config))) == expected


def test_a_config_in_transformers_own_names():
    """Without linear_attn_config, transformers' class says the layout in lists of kinds."""
    from transformers.models.kimi_linear import KimiLinearConfig

    kinds = ["full_attention", "linear_attention", "linear_attention"]
    loaded = KimiLinearConfig(
        num_hidden_layers=3,
        layer_types=kinds,
        mlp_layer_types=["dense", "dense", "sparse"],
        linear_num_heads=8,
        linear_head_dim=64,
    )
    model_sizes = ModelSizes.from_hf(loaded)
    assert ModelSizes.from_config(loaded.to_diff_dict()) == model_sizes  # what config.json says
    assert model_sizes.layer_types == ("mla", "kda", "kda")
    assert model_sizes.layer_moe == (False, False, True)
    assert (model_sizes.kda_heads, model_sizes.kda_head_dim, model_sizes.conv_kernel_size) == (8, 64, 4)
    loaded.mlp_layer_types = ["dense", "sparse", "dense"]
    with pytest.raises(ConfigError, match=r"mlp_layer_types is .*dense layers must come first"):
        ModelSizes.from_hf(loaded)


def test_vllm_config_without_layer_lists_is_refused():
    from vllm.transformers_utils.configs.kimi_linear import KimiLinearConfig

    with pytest.raises(ConfigError, match="linear_attn_config is missing"):
        ModelSizes.from_hf(KimiLinearConfig(**changed(linear_attn_config=None)))


# case: (config, what the sentence must say)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no linear_attn_config": (
        changed(linear_attn_config=...),
        "linear_attn_config is missing; give the checkpoint's own lists kda_layers and full_attn_layers",
    ),
    "null linear_attn_config": (changed(linear_attn_config=None), "linear_attn_config is missing"),
    "linear_attn_config no object": (changed(linear_attn_config=[1]), r"linear_attn_config is \[1\]"),
    "no kda list": (changed(linear={"kda_layers": ...}), "kda_layers is missing; give the list"),
    "kda list of strings": (changed(linear={"kda_layers": ["1"]}), r"kda_layers is \['1'\]; give the list"),
    "kda list no list": (changed(linear={"kda_layers": "12"}), "kda_layers is '12'; give the list"),
    "layer in both": (layout([1, 2], [2, 3], num_hidden_layers=3), "layer 2 in both .*; keep it in one"),
    "layer in neither": (layout([1], [3], num_hidden_layers=3), "layer 2 in neither .*; add it to one"),
    "layer 0": (layout([0, 1], [2]), r"kda_layers has layer 0; layers count from 1 to num_hidden_layers = 3"),
    "layer beyond": (layout([1, 2], [4]), r"full_attn_layers has layer 4; layers count from 1 to .* = 3"),
    "layer twice": (layout([1, 1], [2], num_hidden_layers=2), "layer 1 more than once; name each layer once"),
    "no MLA layer": (layout([1, 2], []), r"full_attn_layers is \[\]; give at least one MLA layer"),
    "no layers": (changed(num_hidden_layers=0), "num_hidden_layers is 0; give a whole number from 1"),
    "other model": (changed(model_type="kimi_k2"), "model_type is 'kimi_k2'; .* kimi_linear only"),
    "other architecture": (changed(architectures=["X"]), r"architectures is \['X'\]; it must be"),
    "activation": (changed(hidden_act="gelu"), "hidden_act is 'gelu'; only 'silu'"),
    "no activation": (changed(hidden_act=...), "hidden_act is missing; only 'silu'"),
    "q_lora_rank": (changed(q_lora_rank=1536), "q_lora_rank is 1536; .* must be unset"),
    "rotary": (changed(mla_use_nope=False), "mla_use_nope is False; it must be true"),
    "nope not said": (changed(mla_use_nope=...), "mla_use_nope is missing; it must be true"),
    "rope scaling": (changed(rope_scaling={"type": "yarn", "factor": 4.0}), "rope_scaling is .*must be unset"),
    "rope parameters": (changed(rope_parameters={"rope_type": "yarn"}), "rope_parameters is .*leave it unset"),
    "grouped query": (changed(num_key_value_heads=8), "num_key_value_heads is 8; .* num_attention_heads = 32"),
    "tied": (changed(tie_word_embeddings="yes"), "tie_word_embeddings is 'yes'; give true or false"),
    "attention bias": (changed(attention_bias=True), "attention_bias is True"),
    "nextn": (changed(num_nextn_predict_layers=1), "num_nextn_predict_layers is 1; .* must be unset or 0"),
    "quantised": (
        changed(quantization_config={"quant_method": "fp8"}),
        "quantization_config is of quant_method 'fp8'; give a compressed",
    ),
    "K3 output gate": (changed(mla_use_output_gate=True), "mla_use_output_gate is True; .* must be unset or false"),
    "K3 residual attention": (changed(attn_res_block_size=8), "attn_res_block_size is 8; .* must be unset"),
    "K3 latent experts": (changed(routed_expert_hidden_size=512), "routed_expert_hidden_size is 512"),
    "K3 latent norm": (changed(latent_moe_use_norm=True), "latent_moe_use_norm is True"),
    "K3 activation": (changed(activation_situ_beta=1.0), "activation_situ_beta is 1.0"),
    "K3 bounded gate": (changed(linear={"gate_lower_bound": -5.0}), "linear_attn_config.gate_lower_bound is -5.0"),
    "bounded by zero": (changed(linear={"gate_lower_bound": 0}), "linear_attn_config.gate_lower_bound is 0"),
    "K3 full-rank gate": (changed(linear={"use_full_rank_gate": True}), "use_full_rank_gate is True; .* remove it"),
    "head dim": (changed(linear={"head_dim": 96}), "linear_attn_config.head_dim is 96; .* 16, 32, 64, 128"),
    "big head dim": (changed(linear={"head_dim": 256}), "linear_attn_config.head_dim is 256"),
    "convolution kernel size": (
        changed(linear={"short_conv_kernel_size": 8}),
        "short_conv_kernel_size is 8; .* one of 2, 3, 4",
    ),
    "no convolution kernel size": (
        changed(linear={"short_conv_kernel_size": ...}),
        "linear_attn_config.short_conv_kernel_size is missing",
    ),
    "KDA heads": (changed(linear={"num_heads": "32"}), "linear_attn_config.num_heads is '32'; give a whole number"),
    "latent": (changed(kv_lora_rank=None), "kv_lora_rank is missing"),
    "router": (
        changed(moe_router_activation_func="softmax"),
        "moe_router_activation_func is 'softmax'; only 'sigmoid'",
    ),
    "topk method": (changed(topk_method="greedy"), "topk_method is 'greedy'"),
    "too many chosen": (changed(num_experts_per_token=257), "num_experts_per_token is 257; only 256 of num_experts"),
    "few in the groups": (changed(num_expert_group=64, topk_group=1), "num_experts_per_token is 8; only 4 of"),
    "uneven groups": (changed(num_expert_group=7), "num_expert_group is 7; it must divide num_experts = 256"),
    "groups of one": (changed(num_expert_group=256), "num_expert_group is 256; .* groups of two or more"),
    "too many groups": (changed(topk_group=2), "topk_group is 2; give at most num_expert_group = 1"),
    "groups unused": (changed(num_expert_group=8, use_grouped_topk=False), "use_grouped_topk is False"),
    "flag no flag": (changed(moe_renormalize="yes"), "moe_renormalize is 'yes'; give true or false"),
    "dense layers unsaid": (changed(first_k_dense_replace=...), "first_k_dense_replace is missing"),
    "frequency": (changed(moe_layer_freq=0), "moe_layer_freq is 0; give a whole number from 1"),
    "scaling factor": (changed(routed_scaling_factor=0), "routed_scaling_factor is 0; give a number above 0"),
    "eps": (changed(rms_norm_eps="1e-5"), "rms_norm_eps is '1e-5'; give a number above 0"),
    "eps missing": (changed(rms_norm_eps=...), "rms_norm_eps is missing"),
    "eps infinite": (changed(rms_norm_eps=float("nan")), "rms_norm_eps is nan"),
    "vocab zero": (changed(vocab_size=0), "vocab_size is 0; give a whole number from 1"),
    "vocab true": (changed(vocab_size=True), "vocab_size is True"),
    "hidden negative": (changed(hidden_size=-1), "hidden_size is -1; give a whole number from 1"),
    "hidden text": (changed(hidden_size="2304"), "hidden_size is '2304'"),
    "hidden fraction": (changed(hidden_size=2304.0), "hidden_size is 2304.0"),
    "context": (changed(model_max_length=0), "model_max_length is 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str):
    config, sentence = REFUSED[case]
    with pytest.raises(ConfigError, match=sentence) as caught:
        ModelSizes.from_config(config)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value)  # value; remedy


# (config, tensor parallel, pipeline parallel, what the sentence must say)
DOES_NOT_DIVIDE = {
    "KDA heads": (changed(linear={"num_heads": 20}), 8, 1, "linear_attn_config.num_heads is 20; .* 8 must divide"),
    "MLA heads": (
        changed(num_attention_heads=20, num_key_value_heads=20),
        8,
        1,
        "num_attention_heads is 20; .*-size 8 must divide",
    ),
    "experts": (changed(moe_intermediate_size=1020), 8, 1, "moe_intermediate_size is 1020; .* 8 must divide"),
    "dense MLP": (changed(intermediate_size=9212), 8, 1, "intermediate_size is 9212; .* 8 must divide"),
    "stages": (layout([1, 2], [3]), 1, 4, "num_hidden_layers is 3; --pipeline-parallel-size 4"),
    "no ranks": (CONFIG_48B, 0, 1, "--tensor-parallel-size is 0; give a whole number from 1"),
    "no stages": (CONFIG_48B, 1, 0, "--pipeline-parallel-size is 0; give a whole number from 1"),
}


@pytest.mark.parametrize("case", DOES_NOT_DIVIDE)
def test_parallel_sizes_that_do_not_fit(case: str):
    config, tensor, pipeline, sentence = DOES_NOT_DIVIDE[case]
    if tensor > 1:
        ModelSizes.from_config(config)  # alone it is fine
    with pytest.raises(ConfigError, match=sentence):
        ParallelSizes(tensor, pipeline).check(ModelSizes.from_config(config))


@pytest.mark.parametrize(("field", "value", "needed"), [("kv_lora_rank", 256, 512), ("qk_rope_head_dim", 32, 64)])
def test_latents_that_the_cpu_kernel_cannot_hold(field: str, value: int, needed: int):
    model_sizes = ModelSizes.from_config(changed(**{field: value}))
    with pytest.raises(ConfigError, match=f"{field} is {value}; .* only {needed}, serve this model on a GPU"):
        check_device(model_sizes, "cpu")


@pytest.mark.parametrize(
    "dtypes",
    [
        ("auto", "auto", "auto", "cpu"),
        ("auto", "auto", "float32", "cpu"),
        ("auto", "auto", "float32", "cuda"),
        ("auto", "auto", "bfloat16", "cuda"),
    ],
)
def test_cache_dtypes_accepted(dtypes: tuple[str, ...]):
    check_cache_dtypes(*dtypes)


@pytest.mark.parametrize(
    ("dtypes", "sentence"),
    [
        (("fp8", "auto", "auto", "cpu"), "--kv-cache-dtype is fp8; on cpu this model takes auto"),
        (("fp8", "auto", "auto", "cuda"), "--kv-cache-dtype is fp8; on cuda"),
        (("bfloat16", "auto", "auto", "cpu"), "--kv-cache-dtype is bfloat16; on cpu this model takes auto"),
        (("auto", "float16", "auto", "cpu"), "--mamba-cache-dtype is float16; on cpu this model takes auto"),
        (("auto", "auto", "bfloat16", "cpu"), "--mamba-ssm-cache-dtype is bfloat16; .* auto or float32"),
        (("auto", "auto", "float16", "cuda"), "--mamba-ssm-cache-dtype is float16; .* auto or bfloat16 or float32"),
    ],
)
def test_cache_dtypes_refused(dtypes: tuple[str, ...], sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        check_cache_dtypes(*dtypes)


def test_config_and_memory_import_the_standard_library_only():
    script = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['torch', 'vllm', 'transformers', 'numpy', 'safetensors']))\n"
        "import vllm_kimi_linear.config.model, vllm_kimi_linear.cache.layout\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[3], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
