"""Names and shapes of LoRA adapters, and whose tokens get what they add on a CPU."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from kimi_demo.presets import demo_config
from vllm_kimi_linear import ARCHITECTURE
from vllm_kimi_linear.adapters.names import TARGETS, AdapterNames
from vllm_kimi_linear.adapters.part import AdaptedPart, add_adapters
from vllm_kimi_linear.config.errors import ConfigError
from vllm_kimi_linear.config.model import ModelSizes
from vllm_kimi_linear.patches.adapter_faults import raise_after_all_answered
from vllm_kimi_linear.patches.adapter_shapes import check_shapes
from vllm_kimi_linear.patches.cpu_adapters import add_to_each_adapters_tokens

A, B = "lora_A.weight", "lora_B.weight"


@pytest.fixture(scope="module")
def names() -> AdapterNames:
    """Of the demo: 8 layers, latent attention at 3 and 7, the first one dense."""
    return AdapterNames(ModelSizes.from_config(demo_config()))


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ("self_attn.q_proj", "self_attn.in_proj.q_proj"),
        ("self_attn.b_proj", "self_attn.in_proj.b_proj"),
        ("self_attn.forget_gate.f_a_proj", "self_attn.in_proj.f_a_proj"),  # transformers'
        ("self_attn.f_a_proj", "self_attn.in_proj.f_a_proj"),  # the remote code's
        ("self_attn.forget_gate.f_b_proj", "self_attn.f_b_proj"),
        ("self_attn.g_b_proj", "self_attn.g_b_proj"),
        ("self_attn.o_proj", "self_attn.o_proj"),
        ("mlp.shared_experts.up_proj", "block_sparse_moe.shared_experts.up_proj"),
        ("block_sparse_moe.shared_experts.up_proj", "block_sparse_moe.shared_experts.up_proj"),
    ],
)
def test_names_of_whoever_trained_it(names: AdapterNames, given: str, ours: str) -> None:
    for matrix in (A, B):
        assert names._map_name(f"model.layers.1.{given}.{matrix}") == f"model.layers.1.{ours}.{matrix}"


def test_names_of_other_layers(names: AdapterNames) -> None:
    for spelling in ("mlp", "block_sparse_moe"):
        assert names._map_name(f"model.layers.0.{spelling}.gate_proj.{A}") == f"model.layers.0.mlp.gate_proj.{A}"
    latent = "model.layers.3.self_attn"
    for part in ("q_proj", "kv_a_proj_with_mqa"):
        assert names._map_name(f"{latent}.{part}.{A}") == f"{latent}.in_proj.{part}.{A}"


@pytest.mark.parametrize(
    "tensor",
    [
        f"model.layers.3.self_attn.kv_b_proj.{A}",
        f"model.layers.3.self_attn.k_proj.{A}",  # only KDA layers have one
        f"model.layers.8.self_attn.q_proj.{A}",
        f"model.layers.1.mlp.experts.{A}",
        f"model.layers.1.mlp.experts.base_layer.{A}",
        f"model.layers.1.block_sparse_moe.experts.3.w1.{A}",
        f"model.layers.1.block_sparse_moe.gate.{A}",
        f"lm_head.{A}",
        "model.embed_tokens.lora_embedding_A",
        "model.layers.1.self_attn.q_proj.lora_magnitude_vector.weight",
        "model.layers.1.self_attn.q_proj.weight",
    ],
)
def test_what_takes_no_adapter(names: AdapterNames, tensor: str) -> None:
    with pytest.raises(ConfigError) as error:
        names._map_name(tensor)
    message = str(error.value)
    assert tensor in message and "merge" in message.partition(";")[2]
    assert all(target in message for target in TARGETS)


def adapter(**shapes: Any) -> Any:
    """Of one module of rank 4, whose weight is [256, 128]."""
    found = {"lora_a": (4, 128), "lora_b": (256, 4)} | shapes
    matrices = {name: None if shape is None else torch.zeros(shape) for name, shape in found.items()}
    return SimpleNamespace(loras={"model.layers.0.self_attn.in_proj.q_proj": SimpleNamespace(rank=4, **matrices)})


def test_matrices_that_fit(names: AdapterNames) -> None:
    names.check(adapter())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"lora_a": (4, 64)}, "q_proj.lora_A.weight has shape [4, 64] where"),
        ({"lora_b": (128, 4)}, "q_proj.lora_B.weight has shape [128, 4] where"),
        ({"lora_a": (2, 128), "lora_b": (256, 2)}, "q_proj.lora_A.weight has shape [2, 128] where"),
        ({"lora_b": None}, "model.layers.0.self_attn.q_proj.lora_B.weight is missing;"),
    ],
)
def test_matrices_that_do_not_fit(names: AdapterNames, wrong: dict[str, Any], said: str) -> None:
    made = adapter(**wrong)
    with pytest.raises(ConfigError) as error:
        check_shapes(lambda *_, **__: made)(None, weights_mapper=names)
    assert said in str(error.value)
    assert check_shapes(lambda *_, **__: made)(None, weights_mapper=None) is made  # of another model


class Ranks:
    """An executor of workers that each load an adapter, or fail."""

    def __init__(self, *outcomes: bool | Exception, architecture: str = ARCHITECTURE) -> None:
        self.outcomes = outcomes
        self.vllm_config = SimpleNamespace(model_config=SimpleNamespace(architecture=architecture))

    def collective_rpc(self, method: Any, args: tuple[Any, ...]) -> list[Any]:
        def worker(outcome: bool | Exception) -> Any:
            return SimpleNamespace(add_lora=Mock(side_effect=outcome if isinstance(outcome, Exception) else [outcome]))

        return [method(worker(outcome), *args) for outcome in self.outcomes]


@pytest.mark.parametrize("error", [ConfigError("kv_b_proj"), FileNotFoundError("kv_b_proj"), KeyError("kv_b_proj")])
def test_every_rank_answers_before_an_adapter_is_refused(error: Exception) -> None:
    """What one leaves unread is taken for the answer to the next call."""
    add_lora = raise_after_all_answered(Mock(side_effect=AssertionError))
    with pytest.raises(RuntimeError, match="kv_b_proj"):
        add_lora(Ranks(True, error, error), SimpleNamespace(lora_name="a"))
    assert add_lora(Ranks(True, True), SimpleNamespace(lora_name="a")) is True
    assert add_lora(Ranks(True, False), SimpleNamespace(lora_name="a")) is False


def test_other_models_load_adapters_as_they_did() -> None:
    original = Mock(return_value=True)
    assert raise_after_all_answered(original)(Ranks(architecture="LlamaForCausalLM"), "request") is True
    original.assert_called_once()


def slots(of_tokens: list[int]) -> Any:
    return SimpleNamespace(indices_len=[len(of_tokens)], token_lora_indices=torch.tensor(of_tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_tokens", [[-1] * 4, [1] * 4, [0, -1, 1, 1, -1, 0, 2]], ids=str)
def test_each_token_gets_its_own_adapter(of_tokens: list[int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    widths, rank, columns, tokens = (32, 8), 8, 64, len(of_tokens)
    a = [torch.randn(3, 1, rank, columns, dtype=dtype) / 8 for _ in widths]
    b = [torch.randn(3, 1, width, rank, dtype=dtype) for width in widths]
    x, out = torch.randn(tokens, columns, dtype=dtype), torch.randn(tokens, sum(widths) + 4, dtype=dtype)
    wanted = out.float()
    for token, slot in enumerate(of_tokens):
        if slot >= 0:
            added = [
                b_[slot, 0].float() @ (a_[slot, 0].float() @ x[token].float()) for a_, b_ in zip(a, b, strict=True)
            ]
            wanted[token, :-4] += 0.5 * torch.cat(added)
    base = torch.tensor(of_tokens) < 0
    before = out[base].clone()
    add_to_each_adapters_tokens(lambda: None)(slots(of_tokens), out, x, tuple(a), tuple(b), 0.5, widths)
    torch.testing.assert_close(out.float(), wanted, **({} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.1}))
    assert torch.equal(out[base], before)


def test_a_layer_warmed_up_before_any_step() -> None:
    out = torch.ones(2, 8)
    nobody = SimpleNamespace(indices_len=[None])
    matrices = (torch.ones(1, 1, 4, 16),), (torch.ones(1, 1, 8, 4),)
    add_to_each_adapters_tokens(lambda: None)(nobody, out, torch.ones(2, 16), *matrices, 1.0, (8,))
    assert torch.equal(out, torch.ones(2, 8))


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a part of [12, 16] on the second of two ranks, with two slots."""
    from vllm.model_executor.layers import linear

    from vllm_kimi_linear.adapters import part as module

    lora = SimpleNamespace(max_loras=2, max_lora_rank=8, lora_dtype=torch.float32)
    monkeypatch.setattr(module, "get_current_vllm_config", lambda: SimpleNamespace(lora_config=lora))
    monkeypatch.setattr(linear, "get_tensor_model_parallel_rank", lambda: 1)
    monkeypatch.setattr(linear, "get_tensor_model_parallel_world_size", lambda: 2)
    return lambda split: AdaptedPart(16, 12, split, "part")


@pytest.mark.parametrize("split", [True, False])
def test_a_rank_holds_its_rows(part: Any, split: bool) -> None:
    layer, a, b = part(split), torch.randn(4, 16), torch.randn(12, 4)
    layer.set_lora(1, torch.ones(8, 16), torch.ones(12, 8))
    layer.set_lora(1, a, b)  # of a smaller rank, in the same slot
    x, out = torch.randn(3, 16), torch.zeros(3, 20)
    layer.punica_wrapper = slots([1, 0, -1])
    layer.punica_wrapper.add_lora_linear = lambda *args: add_to_each_adapters_tokens(lambda: None)(
        layer.punica_wrapper, *args
    )
    add_adapters(out, x, [layer])
    rows = slice(6, 12) if split else slice(0, 12)
    wanted = torch.zeros(3, 20)
    wanted[0, : len(b[rows])] = b[rows] @ (a @ x[0])
    torch.testing.assert_close(out, wanted)
