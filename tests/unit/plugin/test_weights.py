"""A checkpoint that does not fit its config is refused, and the error names the tensor.

No server is needed: a model without parameters takes every tensor for one of another pipeline stage's, after
the checks. That the parameters themselves are filled is in e2e/plugin/test_full_size.py and in every exact answer.
"""

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from kimi_demo.presets import demo_config
from kimi_demo.random_weights import RandomWeights
from kimi_demo.tokenizer import build_vocabulary
from vllm_kimi_linear import weights
from vllm_kimi_linear.config.model import ModelSizes
from vllm_kimi_linear.config.tensors import weights as tensors_of

Tensor = tuple[str, torch.Tensor]
EXPERT = "model.layers.2.block_sparse_moe.experts.5.w2.weight"


@pytest.fixture(scope="module")
def model_sizes() -> ModelSizes:
    return ModelSizes.from_config(demo_config())


@pytest.fixture(scope="module")
def checkpoint() -> list[Tensor]:
    """The demo's tensors, as the demo itself writes them."""
    config = demo_config()
    vocabulary = build_vocabulary(config["vocab_size"])
    return list(RandomWeights(config, vocabulary, seed=0, dtype="bfloat16"))


def load(model_sizes: ModelSizes, tensors: Iterator[Tensor] | list[Tensor]) -> set[str]:
    return weights.load(nn.Module(), model_sizes, tensors)


def replaced(checkpoint: list[Tensor], name: str, tensor: torch.Tensor) -> list[Tensor]:
    assert name in dict(checkpoint)
    return [(n, tensor if n == name else t) for n, t in checkpoint]


def test_demo_checkpoint_fits(model_sizes: ModelSizes, checkpoint: list[Tensor]) -> None:
    assert load(model_sizes, checkpoint) == set()
    assert load(model_sizes, reversed(checkpoint)) == set()


def test_flat_a_log_fits(model_sizes: ModelSizes, checkpoint: list[Tensor]) -> None:
    flat = [(n, t.flatten() if n.endswith("A_log") else t) for n, t in checkpoint]
    assert any(n.endswith("A_log") for n, _ in flat)
    assert load(model_sizes, flat) == set()


def saved(checkpoint: list[Tensor]) -> list[Tensor]:
    """As transformers names them: a feed-forward is block_sparse_moe in every layer."""
    return [(name.replace(".mlp.", ".block_sparse_moe."), tensor) for name, tensor in checkpoint]


@pytest.mark.parametrize("dense", [0, 1, 2, 8])
def test_names_that_transformers_saves(dense: int) -> None:
    model_sizes = ModelSizes.from_config(demo_config() | {"first_k_dense_replace": dense})
    tensors = [(w.name, torch.empty(w.shape)) for w in tensors_of(model_sizes)]
    assert sum(".mlp." in name for name, _ in tensors) == 3 * dense
    assert load(model_sizes, tensors) == load(model_sizes, saved(tensors)) == set()
    if dense:
        dense_parts = [(name, tensor) for name, tensor in tensors if ".mlp." in name]
        [twice, *_] = saved(dense_parts)
        with pytest.raises(weights.WeightError, match=f"tensor {twice[0]} is stored twice"):
            load(model_sizes, [*tensors, twice])
        with pytest.raises(weights.WeightError, match=rf"mlp\.down_proj\.weight{' and ' if dense > 1 else ' '}"):
            load(
                model_sizes, [(n, t) for n, t in saved(tensors) if not n.endswith("block_sparse_moe.down_proj.weight")]
            )


def test_inv_freq_is_skipped(
    model_sizes: ModelSizes, checkpoint: list[Tensor], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.INFO, "vllm")
    spare = [(f"model.layers.{n}.self_attn.rotary_emb.inv_freq", torch.zeros(32)) for n in (3, 7)]
    assert load(model_sizes, [*spare, *checkpoint]) == set()
    assert [record.message for record in caplog.records] == [
        "Skipping rotary_emb.inv_freq of the checkpoint: this model has no rotary positions"
    ]


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.forget_gate.A_log",
        "model.layers.0.self_attn.forget_gate.f_a_proj.weight",
        "model.layers.0.self_attn.conv1d.weight",
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
    ],
)
def test_a_running_models_names(model_sizes: ModelSizes, checkpoint: list[Tensor], name: str) -> None:
    with pytest.raises(weights.WeightError, match=f"tensor {name} is not .* save_pretrained"):
        load(model_sizes, [*checkpoint, (name, torch.zeros(4))])


def test_tied_embeddings(checkpoint: list[Tensor]) -> None:
    tied = ModelSizes.from_config(demo_config() | {"tie_word_embeddings": True})
    assert load(tied, [(n, t) for n, t in checkpoint if n != "lm_head.weight"]) == set()
    with pytest.raises(weights.WeightError, match=r"tensor lm_head\.weight is not part of this model"):
        load(tied, checkpoint)


@pytest.mark.parametrize(
    "name",
    [
        EXPERT,
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.A_log",
        "model.layers.0.self_attn.dt_bias",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.block_sparse_moe.gate.e_score_correction_bias",
        "model.layers.1.block_sparse_moe.shared_experts.down_proj.weight",
        "model.layers.3.self_attn.kv_a_layernorm.weight",
        "model.layers.4.self_attn.k_conv1d.weight",
        "model.layers.7.post_attention_layernorm.weight",
    ],
)
def test_missing(model_sizes: ModelSizes, checkpoint: list[Tensor], name: str) -> None:
    rest = [(n, t) for n, t in checkpoint if n != name]
    assert len(rest) == len(checkpoint) - 1
    with pytest.raises(weights.WeightError, match=f"tensor {name} is missing"):
        load(model_sizes, rest)


def test_many_missing(model_sizes: ModelSizes, checkpoint: list[Tensor]) -> None:
    rest = [(n, t) for n, t in checkpoint if ".experts." not in n]
    lost = len(checkpoint) - len(rest)
    with pytest.raises(weights.WeightError, match=rf"experts\.0\.w1\.weight and {lost - 1} more is missing"):
        load(model_sizes, rest)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.8.input_layernorm.weight",  # a layer too many
        "model.layers.2.block_sparse_moe.experts.8.w1.weight",  # an expert too many
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.kv_b_proj.weight",  # MLA in a KDA layer
        "model.layers.3.self_attn.A_log",  # KDA in an MLA layer
        "model.layers.0.block_sparse_moe.gate.weight",  # experts in the dense layer
        "model.layers.1.mlp.gate_proj.weight",  # a dense MLP in a layer of experts
        "model.layers.1.block_sparse_moe.up_proj.weight",  # a dense MLP under its other name, in a layer of experts
        "model.layers.1.block_sparse_moe.experts.0.w1.weight_scale",  # quantised
        "transformer.wte.weight",
    ],
)
def test_too_many(model_sizes: ModelSizes, checkpoint: list[Tensor], name: str) -> None:
    with pytest.raises(weights.WeightError, match=f"tensor {name} is not part of this model"):
        load(model_sizes, [*checkpoint, (name, torch.zeros(4))])


@pytest.mark.parametrize("name", [EXPERT, "model.embed_tokens.weight", "model.layers.0.self_attn.A_log"])
def test_wrong_shape(model_sizes: ModelSizes, checkpoint: list[Tensor], name: str) -> None:
    shape = tuple(dict(checkpoint)[name].shape)
    for wrong in ((*shape[:-1], shape[-1] + 1), (*shape, 1), ()):
        with pytest.raises(weights.WeightError) as caught:
            load(model_sizes, replaced(checkpoint, name, torch.zeros(wrong)))
        assert name in str(caught.value)
        assert str(list(wrong)) in str(caught.value)
        assert str(list(shape)) in str(caught.value)


def test_transposed(model_sizes: ModelSizes, checkpoint: list[Tensor]) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    turned = dict(checkpoint)[name].T
    with pytest.raises(weights.WeightError, match=name):
        load(model_sizes, replaced(checkpoint, name, turned))


def test_stored_twice(model_sizes: ModelSizes, checkpoint: list[Tensor]) -> None:
    with pytest.raises(weights.WeightError, match=f"tensor {EXPERT} is stored twice"):
        load(model_sizes, [*checkpoint, (EXPERT, dict(checkpoint)[EXPERT])])


def test_errors_are_one_sentence(model_sizes: ModelSizes, checkpoint: list[Tensor]) -> None:
    broken = {
        "missing": checkpoint[1:],
        "extra": [*checkpoint, ("extra", torch.zeros(1))],
        "shape": [(checkpoint[0][0], torch.zeros(1)), *checkpoint[1:]],
        "twice": [checkpoint[0], *checkpoint],
    }
    for tensors in broken.values():
        with pytest.raises(weights.WeightError) as caught:
            load(model_sizes, tensors)
        what, _, remedy = str(caught.value).partition(": ")
        assert what and remedy
        assert "\n" not in str(caught.value)
