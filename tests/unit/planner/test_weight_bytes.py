"""Bytes of weights on a rank and on a pipeline stage, against a checkpoint and among each other."""

import json
from itertools import pairwise
from math import prod
from pathlib import Path

import pytest

from kimi_demo.presets import PRESETS, demo_config
from kimi_server.planner.weight_bytes import weight_bytes
from vllm_kimi_linear.config import tensors
from vllm_kimi_linear.config.model import ModelSizes

CONFIG_48B = json.loads((Path(__file__).parents[3] / "benchmarks" / "config_48b.json").read_text())


def test_those_of_a_checkpoint(demo_model: Path) -> None:
    size = (demo_model / "model.safetensors").stat().st_size
    model_sizes = ModelSizes.from_config(demo_config())
    assert 0 < size - weight_bytes(model_sizes, "bfloat16") < 64 * 1024  # the file's header


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float32", 4)])
def test_one_rank_holds_every_tensor(preset: str, dtype: str, size: int) -> None:
    model_sizes = ModelSizes.from_config(demo_config(preset))
    held = tensors.weights(model_sizes)  # those of the checkpoint, see test_memory
    assert weight_bytes(model_sizes, dtype) == sum(prod(w.shape) * (4 if w.fp32 else size) for w in held)


def test_a_pipeline_stage() -> None:
    model_sizes = ModelSizes.from_config(CONFIG_48B)
    stages = [weight_bytes(model_sizes, "bfloat16", layers) for layers in (range(14), range(14, 27))]
    assert sum(stages) == weight_bytes(model_sizes, "bfloat16")
    assert stages[0] > 163840 * 2304 * 2  # the embedding


def test_weights_of_a_rank() -> None:
    """Two ranks hold each tensor once, but for these, which each holds in full."""
    copies = ("norm.weight", "f_a_proj.weight", "g_a_proj.weight", "kv_a_proj_with_mqa.weight", "gate.weight")
    model_sizes = ModelSizes.from_config(demo_config())
    copied = sum(
        prod(w.shape) * (4 if w.name.endswith("bias") else 2)
        for w in tensors.weights(model_sizes)
        if w.name.endswith((*copies, "e_score_correction_bias"))
    )
    whole, half = (weight_bytes(model_sizes, "bfloat16", tensor_parallel=ranks) for ranks in (1, 2))
    assert 2 * half - whole == copied > 0


def test_tied_embeddings_lie_on_both_ends() -> None:
    """One matrix serves both, but the first and the last stage of a pipeline each need it."""
    config = demo_config()
    tied, untied = (ModelSizes.from_config(config | {"tie_word_embeddings": tie}) for tie in (True, False))
    matrix = config["vocab_size"] * config["hidden_size"] * 2
    whole, stages_of = weight_bytes, stages(untied, 2)
    assert whole(untied, "bfloat16") - whole(tied, "bfloat16") == matrix
    assert [whole(tied, "bfloat16", s) for s in stages_of] == [whole(untied, "bfloat16", s) for s in stages_of]


def stages(model_sizes: ModelSizes, count: int) -> list[range]:
    ends = [model_sizes.num_layers * i // count for i in range(count + 1)]
    return [range(*pair) for pair in pairwise(ends)]
