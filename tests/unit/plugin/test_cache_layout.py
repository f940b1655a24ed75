"""Shapes of weights, bytes of state and cache, against published figures, a real checkpoint and vLLM's own planning."""

import contextlib
import json
from itertools import pairwise
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kda_kernels.constants import CHUNK_SIZE
from kimi_demo.checkpoint import write_checkpoint
from kimi_demo.presets import PRESETS, demo_config
from vllm_kimi_linear.cache import layout
from vllm_kimi_linear.config import tensors
from vllm_kimi_linear.config.errors import ConfigError
from vllm_kimi_linear.config.flags import check_block_size
from vllm_kimi_linear.config.model import ModelSizes

CONFIG_48B = json.loads((Path(__file__).parents[3] / "benchmarks" / "config_48b.json").read_text())
MIB, GIB = 1 << 20, 1 << 30


def plan_48b(
    tensor_parallel: int = 1, activation_dtype: str = "bfloat16", kv_bytes: int = 30 * GIB, **options: Any
) -> layout.CacheLayout:
    options |= {"tensor_parallel": tensor_parallel, "activation_dtype": activation_dtype}
    return layout.cache_layout(ModelSizes.from_config(CONFIG_48B), kv_bytes=kv_bytes, **options)


def test_the_48b_state_and_cache():
    model_sizes = ModelSizes.from_config(CONFIG_48B)
    conv, recurrent = layout.kda_state_shapes(model_sizes)
    assert (conv, recurrent) == ((3, 12288), (32, 128, 128))
    assert 20 * prod(recurrent) * 4 == 40 * MIB
    plan = plan_48b()
    assert plan.kda_state_bytes_per_sequence == 40 * MIB + 20 * 72 * 1024
    assert plan.mla_bytes_per_token == 8064
    assert round(plan.mla_bytes_per_token * MIB / GIB, 1) == 7.9
    assert plan_48b(activation_dtype="float32").mla_bytes_per_token == 2 * 8064
    assert plan_48b(state_dtype="bfloat16").kda_state_bytes_per_sequence == 20 * MIB + 20 * 72 * 1024


@pytest.mark.parametrize(
    ("ranks", "state", "tokens", "groups"),
    [
        (1, "float32", 256, 20),
        (2, "float32", 272, 10),
        (4, "float32", 272, 5),
        (8, "float32", 240, 3),
        (1, "bfloat16", 288, 10),
        (8, "bfloat16", 176, 2),
    ],
)
def test_the_48b_block(ranks: int, state: str, tokens: int, groups: int):
    plan = plan_48b(ranks, state_dtype=state)
    assert (plan.block_tokens, plan.kda_groups, plan.mla_groups) == (tokens, groups, 1)
    assert plan.mla_bytes_per_token == 8064  # on every rank
    assert plan.kda_state_bytes_per_sequence * ranks == plan_48b(state_dtype=state).kda_state_bytes_per_sequence


@pytest.mark.parametrize("state", ["float32", "bfloat16"])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_on_a_gpu_a_prefill_can_keep_states_at_the_blocks(ranks: int, state: str):
    """Its kernels hand a state on after every chunk."""
    plan = plan_48b(ranks, state_dtype=state, device="cuda")
    assert plan.block_tokens % CHUNK_SIZE == 0
    assert 192 <= plan.block_tokens <= 320
    assert plan.kda_groups <= 20


@pytest.mark.parametrize("tokens, device", [(48, "cpu"), (64, "cuda"), (320, "cuda")])
def test_blocks_at_whose_ends_states_can_be_kept(tokens: int, device: str):
    check_block_size(tokens, device)


@pytest.mark.parametrize("tokens, device, multiple", [(24, "cpu", 16), (48, "cuda", 64), (272, "cuda", 64)])
def test_blocks_at_whose_ends_no_state_can_be_kept(tokens: int, device: str, multiple: int):
    with pytest.raises(ConfigError, match=f"^--block-size is {tokens}; give a multiple of {multiple},"):
        check_block_size(tokens, device)


def test_little_is_wasted():
    """Of what a sequence of 4,096 tokens holds while it decodes, at most a twentieth on one rank."""
    plan = plan_48b()
    needed = plan.kda_state_bytes_per_sequence + 4096 * plan.mla_bytes_per_token
    assert needed < plan.bytes_per_sequence(4096) < 1.05 * needed


@pytest.mark.parametrize("tokens", [16, 256, 272, 1088, 1920])
def test_a_block_size_of_ones_own(tokens: int):
    plan = plan_48b(block_tokens=tokens)
    assert plan.block_tokens == tokens
    assert plan.kda_groups == {16: 20, 256: 20, 272: 20, 1088: 5, 1920: 3}[tokens]
    # The states in a block are no wider than it, and attention kernels find a block after whole blocks of theirs.
    assert -(-20 // plan.kda_groups) * plan.state_bytes <= plan.block_bytes
    assert plan.block_bytes % (layout.KERNEL_BLOCK * plan.latent_bytes) == 0


def test_every_draft_token_has_a_state():
    assert plan_48b(speculative=2).state_bytes == plan_48b().state_bytes
    assert plan_48b(speculative=2).state_pages == plan_48b().state_pages + 2


def test_sequences_that_fit():
    plan = plan_48b()
    block = 118 * 16 * 1152  # the smallest multiple of 16 tokens in one layer that holds a state
    assert plan.num_blocks == 30 * GIB // block
    assert plan.blocks_per_sequence(1) == 1 + 20
    assert plan.blocks_per_sequence(256) == 1 + 20
    assert plan.blocks_per_sequence(257) == 2 + 20
    assert plan.bytes_per_sequence(257) == 22 * block
    assert plan.sequences(257) == (plan.num_blocks - 1) // 22
    assert plan_48b(kv_bytes=0).sequences(1) == 0
    assert plan_48b(prefix_caching=True).blocks_per_sequence(257) == 2 + 40
    assert plan.checkpoint_bytes == 20 * block


def test_latents_that_ranks_share():
    alone, shared = (
        plan_48b(activation_dtype="bfloat16", tensor_parallel=4, context_parallel=ranks, kv_bytes=10 * GIB)
        for ranks in (1, 4)
    )
    assert shared.blocks_per_sequence(MIB - 3) == alone.blocks_per_sequence(MIB // 4)
    assert shared.longest_context(1 << 40) == 4 * alone.longest_context(1 << 40)
    assert "on one rank of 4" in shared.describe(4096) and "on one rank" not in alone.describe(4096)


def test_a_pipeline_stage():
    first, second = plan_48b(layers=range(14)), plan_48b(layers=range(14, 27))
    assert (first.kda_layers, first.mla_layers) == (11, 3)
    assert first.mla_bytes_per_token + second.mla_bytes_per_token == 8064
    assert plan_48b(layers=range(3)).mla_layers == 0


@pytest.mark.parametrize("limit", [0, 1, 7, 1 << 20])
def test_longest_context(limit: int) -> None:
    for most in (0, 1, 5, 1 << 19):
        assert layout.longest_context(limit, most.__ge__) == min(limit, most)


def test_no_kda_layers_no_state():
    plan = layout.cache_layout(ModelSizes.from_config(demo_config("all-mla")), activation_dtype="float32", kv_bytes=MIB)
    assert (plan.kda_state_bytes_per_sequence, plan.kda_groups, plan.mla_groups) == (0, 0, 1)
    assert plan.block_tokens == 16
    assert plan.num_blocks == MIB // (4 * 16 * 576 * 4)


def parameters(model_sizes: ModelSizes) -> int:
    return sum(prod(w.shape) for w in tensors.weights(model_sizes))


def test_parameters():
    assert round(parameters(ModelSizes.from_config(CONFIG_48B)) / 1e9, 1) == 49.1
    assert round(parameters(ModelSizes.from_config(demo_config("bench"))) / 1e6) == 723


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "bench"])
def test_weights_are_those_of_the_checkpoint(preset: str, tmp_path: Path):
    from safetensors import safe_open

    count = write_checkpoint(tmp_path, preset)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        slices = {name: file.get_slice(name) for name in file.offset_keys()}
        stored = {name: tuple(part.get_shape()) for name, part in slices.items()}
        fp32 = {name for name, part in slices.items() if part.get_dtype() == "F32"}
    model_sizes = ModelSizes.from_config(demo_config(preset))
    weights = list(tensors.weights(model_sizes))
    assert {w.name: w.shape for w in weights} == stored
    assert len(weights) == len(stored)
    assert {w.name for w in weights if w.fp32} == fp32
    assert parameters(model_sizes) == count


def stages(model_sizes: ModelSizes, count: int) -> list[range]:
    ends = [model_sizes.num_layers * i // count for i in range(count + 1)]
    return [range(*pair) for pair in pairwise(ends)]


@pytest.mark.parametrize("preset", ["48b", *PRESETS])
@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize(("dtype", "state"), [("bfloat16", "bfloat16"), ("float32", "float32")])
@pytest.mark.parametrize("tokens", [None, 1888])
@pytest.mark.parametrize("pipeline", [1, 2])
def test_vllm_plans_the_same(preset: str, ranks: int, dtype: str, state: str, tokens: int | None, pipeline: int):
    """Groups, bytes of a block and number of blocks, from vLLM's own planning of our layers' specifications."""
    import torch
    from vllm.model_executor.layers.mamba.mamba_utils import MambaStateShapeCalculator
    from vllm.v1.core import kv_cache_utils

    with contextlib.suppress(ImportError):  # where vLLM 0.33 has put these functions
        from vllm.v1.core import kv_cache_planning as kv_cache_utils
    from vllm.v1.kv_cache_interface import KVCacheSpec, MambaSpec, MLAAttentionSpec
    from vllm.v1.kv_cache_layout import KVCacheLayout

    from vllm_kimi_linear.cache.spec import KdaSpec

    config = CONFIG_48B if preset == "48b" else demo_config(preset)
    model_sizes = ModelSizes.from_config(config)
    if not model_sizes.kda_layers:
        pytest.skip("vLLM chooses the block of a model without recurrent states")
    options: dict[str, Any] = {"activation_dtype": dtype, "state_dtype": state, "block_tokens": tokens}
    options["tensor_parallel"] = ranks
    plan = layout.cache_layout(model_sizes, kv_bytes=GIB, **options)
    mla = MLAAttentionSpec(block_size=plan.block_tokens, num_kv_heads=1, head_size=576, dtype=getattr(torch, dtype))
    assert mla.page_size_bytes == plan.block_tokens * plan.latent_bytes
    shapes = MambaStateShapeCalculator.kda_state_shape(
        ranks, model_sizes.kda_heads, model_sizes.kda_head_dim, conv_kernel_size=model_sizes.conv_kernel_size
    )
    assert shapes == layout.kda_state_shapes(model_sizes, ranks)
    dtypes = (getattr(torch, dtype), getattr(torch, state))
    bare = MambaSpec(shapes=shapes, dtypes=dtypes, block_size=plan.block_tokens)
    assert bare.state_content_size_bytes == plan.state_bytes
    kda = KdaSpec.of(bare, 1 << 20, plan)
    settings = SimpleNamespace(
        cache_config=SimpleNamespace(
            get_resolved_kv_cache_layout=lambda: KVCacheLayout.BLHNC,
            num_gpu_blocks_override=None,
            prefix_cache_retention_interval=0,
        ),
        attention_config=SimpleNamespace(hisparse_config=None),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        speculative_config=None,
        model_config=None,
    )
    vllm_config: Any = settings
    layers: dict[str, KVCacheSpec] = {
        f"{i}": kda if kind == "kda" else mla for i, kind in enumerate(model_sizes.layer_types)
    }
    groups = kv_cache_utils.get_kv_cache_groups(vllm_config, layers)
    kinds = [layers[group.layer_names[0]] for group in groups]
    assert (kinds.count(kda), kinds.count(mla)) == (plan.kda_groups, plan.mla_groups)
    for stage in stages(model_sizes, pipeline):
        here = layout.cache_layout(model_sizes, kv_bytes=GIB, layers=stage, **options)
        layers_here = {name: layers[name] for name in map(str, stage)}
        own = kv_cache_utils._project_kv_cache_groups_to_worker(groups, layers_here)
        made = kv_cache_utils.get_kv_cache_config_from_groups(vllm_config, own, GIB)
        assert made.num_blocks == here.num_blocks
        assert {tensor.block_stride for tensor in made.kv_cache_tensors} == {here.block_bytes}
