"""The whole 48B model, on the meta device: every tensor of its layout finds its place, and no parameter is left.

`--load-format dummy` builds this same model with random values, which takes 98 GB.
"""

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest

from tests.support.own_process import in_own_process

CONFIG = Path(__file__).parents[3] / "benchmarks" / "config_48b.json"


def build(folder: str) -> dict[str, Any]:
    """What the model made from `folder`'s config holds, and what loading a whole checkpoint of its shapes fills."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model

    from vllm_kimi_linear import weights

    args = EngineArgs(model=folder, skip_tokenizer_init=True, load_format="dummy", max_model_len=8192)
    config = args.create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
        initialize_model_parallel(1, 1)
        torch.set_default_dtype(config.model_config.dtype)
        with torch.device("meta"):
            model = initialize_model(vllm_config=config)
            table = weights.targets(model.sizes)
            tensors = ((name, torch.empty(target.shapes[0])) for name, target in table.items())
            loaded = model.load_weights(tensors)
    return {
        "class": f"{type(model).__module__}.{type(model).__name__}",
        "devices": sorted({p.device.type for p in model.parameters()}),
        "parameters": {name: list(p.shape) for name, p in model.named_parameters()},
        "dtypes": {name: str(p.dtype).removeprefix("torch.") for name, p in model.named_parameters()},
        "targets": {name: [t.parameter, list(t.shapes[0])] for name, t in table.items()},
        "loaded": sorted(loaded),
    }


@pytest.mark.parametrize("backend", ["FLASHINFER_CUTLASS", "FLASHINFER_TRTLLM", "TRITON"])
def test_experts_of_eight_ranks_are_not_padded(backend: str):
    """An eighth of an expert is 128 wide, which every kernel that vLLM may choose on an NVIDIA GPU takes as it is."""
    from vllm.model_executor.layers.fused_moe.oracle import unquantized

    config = json.loads(CONFIG.read_text())
    sizes = config["hidden_size"], config["moe_intermediate_size"] // 8
    chosen = unquantized.UnquantizedMoeBackend[backend]
    assert unquantized.unquantized_round_up_hidden_size_and_intermediate_size(chosen, *sizes) == sizes


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("full")
    (folder / "config.json").write_text(CONFIG.read_text())
    return in_own_process(build, str(folder))


def published() -> dict[str, tuple[int, ...]]:
    """The checkpoint's tensors and shapes, written out by hand from docs/kda.md sections 1 and 9."""
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (163840, 2304),
        "model.norm.weight": (2304,),
        "lm_head.weight": (163840, 2304),
    }
    kda = {
        **{f"{part}_proj.weight": (4096, 2304) for part in "qkv"},
        **{f"{part}_conv1d.weight": (4096, 1, 4) for part in "qkv"},
        **{f"{gate}_a_proj.weight": (128, 2304) for gate in "fg"},
        **{f"{gate}_b_proj.weight": (4096, 128) for gate in "fg"},
        "A_log": (1, 1, 32, 1),
        "dt_bias": (4096,),
        "b_proj.weight": (32, 2304),
        "o_norm.weight": (128,),
        "o_proj.weight": (2304, 4096),
    }
    mla = {
        "q_proj.weight": (32 * 192, 2304),
        "kv_a_proj_with_mqa.weight": (576, 2304),
        "kv_a_layernorm.weight": (512,),
        "kv_b_proj.weight": (32 * 256, 512),
        "o_proj.weight": (2304, 4096),
    }
    dense = {f"mlp.{name}_proj.weight": (9216, 2304) for name in ("gate", "up")}
    dense["mlp.down_proj.weight"] = (2304, 9216)
    moe = {"gate.weight": (256, 2304), "gate.e_score_correction_bias": (256,)}
    moe |= {f"shared_experts.{name}_proj.weight": (1024, 2304) for name in ("gate", "up")}
    moe["shared_experts.down_proj.weight"] = (2304, 1024)
    for expert in range(256):
        moe |= {f"experts.{expert}.{name}.weight": (1024, 2304) for name in ("w1", "w3")}
        moe[f"experts.{expert}.w2.weight"] = (2304, 1024)
    for layer in range(27):
        at = f"model.layers.{layer}"
        tensors |= {f"{at}.{n}_layernorm.weight": (2304,) for n in ("input", "post_attention")}
        attention = mla if layer in (3, 7, 11, 15, 19, 23, 26) else kda
        tensors |= {f"{at}.self_attn.{name}": shape for name, shape in attention.items()}
        if layer == 0:
            tensors |= {f"{at}.{name}": shape for name, shape in dense.items()}
        else:
            tensors |= {f"{at}.block_sparse_moe.{name}": shape for name, shape in moe.items()}
    return tensors


def test_is_our_model_without_memory(built: dict[str, Any]) -> None:
    assert built["class"] == "vllm_kimi_linear.model.KimiLinearForCausalLM"
    assert built["devices"] == ["meta"]


def test_every_published_tensor_has_its_place(built: dict[str, Any]) -> None:
    targets = built["targets"]
    assert {name: tuple(shape) for name, (_, shape) in targets.items()} == published()
    assert {parameter for parameter, _ in targets.values()} <= built["parameters"].keys()


def test_every_parameter_is_filled_exactly(built: dict[str, Any]) -> None:
    filled = dict.fromkeys(built["parameters"], 0)
    for parameter, shape in built["targets"].values():
        filled[parameter] += prod(shape)
    assert filled == {name: prod(shape) for name, shape in built["parameters"].items()}
    assert built["loaded"] == sorted(built["parameters"])


def test_parameter_count(built: dict[str, Any]) -> None:
    count = sum(map(prod, built["parameters"].values()))
    assert count == sum(map(prod, published().values()))
    assert f"{count / 1e9:.1f}" == "49.1"


def test_fp32_where_it_matters(built: dict[str, Any]) -> None:
    fp32 = {name for name, dtype in built["dtypes"].items() if dtype == "float32"}
    gates_and_router = ("A_log", "dt_bias", "moe.gate.weight", "e_score_correction_bias")
    assert fp32 == {name for name in built["dtypes"] if name.endswith(gates_and_router)}
    assert set(built["dtypes"].values()) == {"bfloat16", "float32"}
