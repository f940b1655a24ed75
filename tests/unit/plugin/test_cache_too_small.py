"""A cache that cannot hold one sequence: the sentence names the flag that made it so."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from kimi_demo.presets import demo_config
from vllm_kimi_linear.cache import configured, layout
from vllm_kimi_linear.config.model import ModelSizes
from vllm_kimi_linear.patches.cache_too_small import out_of_memory_message

PLAN = layout.cache_layout(
    ModelSizes.from_config(demo_config()), activation_dtype="float32", kv_bytes=0, prefix_caching=True
)


def message(monkeypatch: pytest.MonkeyPatch, blocks: int, override: int | None) -> str:
    monkeypatch.setattr(configured, "cache_layout", lambda config, blocks: replace(PLAN, num_blocks=blocks))
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=2048), cache_config=SimpleNamespace(num_gpu_blocks_override=override)
    )
    return out_of_memory_message(config, blocks * PLAN.block_bytes)


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for override in (None, 1000):
        text = message(monkeypatch, 3, override)
        assert text.startswith("--max-model-len is 2048; ") and text.endswith("--kv-cache-memory-bytes")


def test_the_number_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = PLAN.blocks_per_sequence(2048) + 1
    text = message(monkeypatch, 1000, needed - 1)
    assert text == (
        f"--num-gpu-blocks-override is {needed - 1}; a sequence of --max-model-len 2048 needs {needed} blocks: "
        "give as many, or leave the flag out"
    )
