"""What is forecast of a rank's memory: how its parts add up."""

import json
from pathlib import Path
from typing import Any

import pytest

from kimi_server.planner import forecast
from vllm_kimi_linear.cache import layout
from vllm_kimi_linear.config.model import ModelSizes

CONFIG_48B = json.loads((Path(__file__).parents[3] / "benchmarks" / "config_48b.json").read_text())


def test_what_is_left_is_the_cache() -> None:
    model_sizes = ModelSizes.from_config(CONFIG_48B)
    sizes = {
        "dtype": "bfloat16",
        "device": "cuda",
        "batch_tokens": 8192,
        "batch_sequences": 256,
        "tensor_parallel": 4,
    }
    held = forecast.forecast(model_sizes, memory_bytes=70 << 30, **sizes)  # type: ignore[arg-type]  # one dict for all
    assert held.cache == (70 << 30) - held.weights - held.activations - held.runtime
    options: dict[str, Any] = {
        "activation_dtype": "bfloat16",
        "tensor_parallel": 4,
        "prefix_caching": True,
        "device": "cuda",
    }
    assert held.plan == layout.cache_layout(model_sizes, kv_bytes=held.cache, **options)
    for context in (1, 4096, 100_000, 1 << 20):
        count = held.sequences(context)
        assert held.shortage(count, context) == 0
        assert held.shortage(count + 1, context) > 0
        assert held.kda_bytes(count) + held.latent_bytes(count, context) <= held.cache_bytes(count, context)
    none = forecast.forecast(model_sizes, memory_bytes=1 << 30, **sizes)  # type: ignore[arg-type]
    assert (none.sequences(1), none.shortage(1, 1) > -none.cache > 0) == (0, True)


def test_activations_grow_with_the_step() -> None:
    model_sizes = ModelSizes.from_config(CONFIG_48B)
    sizes = [forecast.activation_bytes(model_sizes, "bfloat16", "cuda", rows, 256) for rows in (2048, 8192, 16384)]
    assert sizes == sorted(set(sizes))
    assert forecast.activation_bytes(model_sizes, "bfloat16", "cuda", 8192, 1 << 14) > sizes[1]  # logits count, too


def test_constants_are_those_of_what_they_describe() -> None:
    from vllm_kimi_linear.attention import cpu_mla

    assert forecast.CONTEXT_TOKENS["cpu"] == cpu_mla.CONTEXT_TILE


@pytest.mark.parametrize("limit", [0, 1, 7, 1 << 20])
def test_longest_context(limit: int) -> None:
    for most in (0, 1, 5, 1 << 19):
        assert layout.longest_context(limit, most.__ge__) == min(limit, most)
