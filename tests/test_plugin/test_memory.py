"""Bytes of weights, state and cache, against published figures, a real checkpoint and vLLM's own planning."""

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest

from vllm_kimi_linear import demo, memory
from vllm_kimi_linear.config import Geometry

CONFIG_48B = json.loads((Path(__file__).parents[2] / "benchmarks" / "config_48b.json").read_text())
MIB, GIB = 1 << 20, 1 << 30


def plan_48b(
    tensor_parallel: int = 1, activation_dtype: str = "bfloat16", kv_bytes: int = 30 * GIB, **options: Any
) -> memory.Plan:
    geometry = Geometry.from_config(CONFIG_48B, tensor_parallel=tensor_parallel)
    return memory.plan(geometry, activation_dtype=activation_dtype, kv_bytes=kv_bytes, **options)


def test_the_48b_state_and_cache():
    geometry = Geometry.from_config(CONFIG_48B)
    conv, recurrent = memory.kda_state_shapes(geometry)
    assert (conv, recurrent) == ((3, 12288), (32, 128, 128))
    assert 20 * prod(recurrent) * 4 == 40 * MIB
    plan = plan_48b()
    assert plan.kda_state_bytes_per_sequence == 40 * MIB + 20 * 72 * 1024
    assert plan.mla_bytes_per_token == 8064
    assert round(plan.mla_bytes_per_token * MIB / GIB, 1) == 7.9
    assert plan_48b(activation_dtype="float32").mla_bytes_per_token == 2 * 8064
    assert plan_48b(state_dtype="bfloat16").kda_state_bytes_per_sequence == 20 * MIB + 20 * 72 * 1024


@pytest.mark.parametrize(("ranks", "tokens"), [(1, 1920), (2, 1024), (4, 512), (8, 256)])
def test_the_48b_block_size(ranks: int, tokens: int):
    plan = plan_48b(ranks)
    assert plan.block_tokens == tokens
    assert plan.mla_bytes_per_token == 8064  # on every rank
    assert plan.kda_state_bytes_per_sequence * ranks == plan_48b().kda_state_bytes_per_sequence
    assert (plan.group_layers, plan.kda_groups, plan.mla_groups) == (7, 3, 1)


def test_the_block_size_is_a_multiple_of_the_alignment():
    assert plan_48b(alignment=256).block_tokens == 2048
    assert plan_48b(alignment=4096).block_tokens == 4096


def test_every_draft_token_has_a_state():
    assert plan_48b(speculative=2).state_bytes == plan_48b().state_bytes
    assert plan_48b(speculative=2).state_pages == plan_48b().state_pages + 2


def test_sequences_that_fit():
    plan = plan_48b()
    page = 1920 * 1152
    assert plan.num_blocks == 30 * GIB // (7 * page)
    assert plan.blocks_per_sequence(1) == 1 + 3
    assert plan.blocks_per_sequence(1920) == 1 + 3
    assert plan.blocks_per_sequence(1921) == 2 + 3
    assert plan.bytes_per_sequence(1921) == 5 * 7 * page
    assert plan.sequences(1921) == (plan.num_blocks - 1) // 5
    assert plan_48b(kv_bytes=0).sequences(1) == 0
    assert plan_48b(prefix_caching=True).blocks_per_sequence(1921) == 2 + 6


def test_a_pipeline_stage():
    first, second = plan_48b(layers=range(14)), plan_48b(layers=range(14, 27))
    assert (first.kda_layers, first.mla_layers) == (11, 3)
    assert first.mla_bytes_per_token + second.mla_bytes_per_token == 8064
    assert plan_48b(layers=range(3)).mla_layers == 0
    geometry = Geometry.from_config(CONFIG_48B)
    stages = [memory.weight_bytes(geometry, "bfloat16", layers) for layers in (range(14), range(14, 27))]
    assert sum(stages) == memory.weight_bytes(geometry, "bfloat16")
    assert stages[0] > 163840 * 2304 * 2  # the embedding


def test_no_kda_layers_no_state():
    plan = memory.plan(
        Geometry.from_config(demo.demo_config("all-mla")), activation_dtype="float32", kv_bytes=MIB, alignment=16
    )
    assert (plan.kda_state_bytes_per_sequence, plan.kda_groups, plan.mla_groups) == (0, 0, 1)
    assert plan.block_tokens == 16
    assert plan.num_blocks == MIB // (4 * 16 * 576 * 4)


def test_parameters():
    assert round(memory.parameters(Geometry.from_config(CONFIG_48B)) / 1e9, 1) == 49.1
    bench = memory.parameters(Geometry.from_config(demo.demo_config("bench")))
    assert round(bench / 1e6) == 723


@pytest.mark.parametrize("preset", [name for name in demo.PRESETS if name != "bench"])
def test_weights_are_those_of_the_checkpoint(preset: str, tmp_path: Path):
    from safetensors import safe_open

    count = demo.write_checkpoint(tmp_path, preset)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        slices = {name: file.get_slice(name) for name in file.offset_keys()}
        stored = {name: tuple(part.get_shape()) for name, part in slices.items()}
        fp32 = {name for name, part in slices.items() if part.get_dtype() == "F32"}
    geometry = Geometry.from_config(demo.demo_config(preset))
    weights = list(memory.weights(geometry))
    assert {w.name: w.shape for w in weights} == stored
    assert len(weights) == len(stored)
    assert {w.name for w in weights if w.fp32} == fp32
    assert memory.parameters(geometry) == count
    size = (tmp_path / "model.safetensors").stat().st_size
    assert 0 < size - memory.weight_bytes(geometry, "bfloat16") < 64 * 1024  # the file's header


def test_weights_of_a_rank():
    """Two ranks hold each tensor once, but for these, which each holds in full."""
    copies = ("norm.weight", "f_a_proj.weight", "g_a_proj.weight", "kv_a_proj_with_mqa.weight", "gate.weight")
    config = demo.demo_config()
    one, two = (Geometry.from_config(config, tensor_parallel=ranks) for ranks in (1, 2))
    copied = sum(
        prod(w.shape) * (4 if w.name.endswith("bias") else 2)
        for w in memory.weights(one)
        if w.name.endswith((*copies, "e_score_correction_bias"))
    )
    whole, half = (memory.weight_bytes(geometry, "bfloat16") for geometry in (one, two))
    assert 2 * half - whole == copied > 0


@pytest.mark.parametrize("preset", ["48b", *demo.PRESETS])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_vllm_plans_the_same(preset: str, ranks: int, dtype: str):
    """Shapes, pages and groups, from vLLM's own cache specifications."""
    import torch
    from vllm.model_executor.layers.mamba.mamba_utils import MambaStateShapeCalculator
    from vllm.v1.core.kv_cache_utils import _get_kv_cache_groups_uniform_page_size
    from vllm.v1.kv_cache_interface import MambaSpec, MLAAttentionSpec

    config = CONFIG_48B if preset == "48b" else demo.demo_config(preset)
    geometry = Geometry.from_config(config, tensor_parallel=ranks)
    plan = memory.plan(geometry, activation_dtype=dtype, kv_bytes=GIB)
    mla = MLAAttentionSpec(block_size=plan.block_tokens, num_kv_heads=1, head_size=576, dtype=getattr(torch, dtype))
    assert mla.page_size_bytes == plan.page_bytes
    specs: dict = {f"mla.{i}": mla for i in geometry.mla_layers}
    if geometry.kda_layers:
        shapes = MambaStateShapeCalculator.kda_state_shape(
            ranks, geometry.kda_heads, geometry.kda_head_dim, conv_kernel_size=geometry.conv_taps
        )
        assert shapes == memory.kda_state_shapes(geometry)
        state = MambaSpec(
            shapes=shapes,
            dtypes=(getattr(torch, dtype), torch.float32),
            block_size=plan.block_tokens,
            page_size_padded=plan.page_bytes,
        )
        assert state.state_content_size_bytes == plan.state_bytes <= plan.page_bytes
        assert plan.state_bytes > plan.page_bytes - 128 * plan.latent_bytes  # no smaller block would do
        specs |= {f"kda.{i}": state for i in geometry.kda_layers}
    groups = _get_kv_cache_groups_uniform_page_size(specs)
    assert max(len(group.layer_names) for group in groups) == plan.group_layers
    assert sum(isinstance(group.kv_cache_spec, MambaSpec) for group in groups) == plan.kda_groups
    assert len(groups) == plan.kda_groups + plan.mla_groups
