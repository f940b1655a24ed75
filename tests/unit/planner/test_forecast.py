"""The forecast of a rank's memory: its parts add up, and what fits is what is left.

tests/e2e/planner compares it with the model that vLLM builds and the cache that it allocates.
"""

import json
from pathlib import Path
from typing import Any

from kimi_server.planner import forecast
from vllm_kimi_linear import demo, memory
from vllm_kimi_linear.config import Geometry

CONFIG_48B = json.loads((Path(__file__).parents[3] / "benchmarks" / "config_48b.json").read_text())


def test_what_is_left_is_the_cache() -> None:
    geometry = Geometry.from_config(CONFIG_48B, tensor_parallel=4)
    sizes = {"dtype": "bfloat16", "device": "cuda", "batch_tokens": 8192, "batch_sequences": 256}
    held = forecast.forecast(geometry, memory_bytes=70 << 30, **sizes)  # type: ignore[arg-type]  # one dict for all
    assert held.cache == (70 << 30) - held.weights - held.activations - held.runtime
    options: dict[str, Any] = {"activation_dtype": "bfloat16", "prefix_caching": True, "device": "cuda"}
    assert held.plan == memory.plan(geometry, kv_bytes=held.cache, **options)
    for context in (1, 4096, 100_000, 1 << 20):
        count = held.sequences(context)
        assert held.shortage(count, context) == 0
        assert held.shortage(count + 1, context) > 0
        assert held.kda_bytes(count) + held.latent_bytes(count, context) <= held.cache_bytes(count, context)
    none = forecast.forecast(geometry, memory_bytes=1 << 30, **sizes)  # type: ignore[arg-type]
    assert (none.sequences(1), none.shortage(1, 1) > -none.cache > 0) == (0, True)


def test_activations_grow_with_the_step() -> None:
    geometry = Geometry.from_config(CONFIG_48B)
    sizes = [forecast.activation_bytes(geometry, "bfloat16", "cuda", rows, 256) for rows in (2048, 8192, 16384)]
    assert sizes == sorted(set(sizes))
    assert forecast.activation_bytes(geometry, "bfloat16", "cuda", 8192, 1 << 14) > sizes[1]  # logits count, too


def test_constants_are_those_of_what_they_describe() -> None:
    from vllm_kimi_linear.cpu import mla_backend

    assert forecast.CONTEXT_TOKENS["cpu"] == mla_backend.CONTEXT_TILE


def test_memory_is_not_promised_twice() -> None:
    """Weights, activations and cache are all of the memory that was given."""
    geometry = Geometry.from_config(demo.demo_config())
    held = forecast.forecast(
        geometry, memory_bytes=256 << 20, dtype="float32", device="cpu", batch_tokens=2048, batch_sequences=128
    )
    block = held.cache_bytes(1, 8192) - memory.plan(
        geometry, activation_dtype="float32", kv_bytes=0, prefix_caching=True
    ).bytes_per_sequence(8192)
    assert held.memory - block < held.weights + held.activations + held.plan.num_blocks * block <= held.memory
