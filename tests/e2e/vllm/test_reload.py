"""Weights that are exchanged under a running engine are used, all of them, whichever way they come."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from kimi_demo.checkpoint import write_checkpoint
from kimi_demo.reference import HfReference
from tests.support import adapters
from tests.support.own_process import in_own_process
from vllm_kimi_linear.adapters.names import TARGETS

PROMPT = list(range(100, 160))
# What a KDA layer holds itself, beside vLLM's linear layers: tensors of a checkpoint, and parameters.
OWN = ("f_b_proj.weight", "g_b_proj.weight", "conv1d.weight", "A_log", "dt_bias", "o_norm.weight")
PARAMETERS = ("gates_b", "conv_weight", "A_log", "dt_bias", "o_norm_weight")


def answers(asked: dict[str, Any]) -> dict[str, list[int]]:
    """24 greedy tokens of engines of three checkpoints, and of the first one's while it is given other weights."""
    from vllm import LLM, SamplingParams
    from vllm.config import set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    found = {}

    def start(model: str) -> LLM:
        return LLM(
            model=model,
            dtype=asked["dtype"],
            enforce_eager=True,
            max_model_len=512,
            max_num_batched_tokens=64,
            kv_cache_memory_bytes=64 << 20,
            enable_prefix_caching=False,
        )

    def answer(name: str, engine: LLM) -> None:
        sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
        [output] = engine.generate({"prompt_token_ids": PROMPT}, sampling, use_tqdm=False)
        found[name] = list(output.outputs[0].token_ids)

    def own(model: Any) -> dict[str, Any]:
        return {name: p for name, p in model.named_parameters() if name.endswith(PARAMETERS)}

    engine = start(asked["models"]["first"])
    answer("first", engine)
    [before] = engine.apply_model(lambda model: {name: p.data.clone() for name, p in own(model).items()})
    engine.collective_rpc("reload_weights", kwargs={"weights_path": asked["models"]["second"]})
    answer("reloaded", engine)

    def replace(model: Any) -> None:
        for name, parameter in own(model).items():
            parameter.data = before[name]

    engine.apply_model(replace)
    answer("replaced", engine)

    config = engine.llm_engine.vllm_config

    def send(model: Any) -> None:
        """Tensor by tensor, as vLLM's engines for trainers do."""
        with set_current_vllm_config(config):
            initialize_layerwise_reload(model)
            for file in sorted(Path(asked["models"]["first"]).glob("*.safetensors")):
                for tensor in load_file(file).items():
                    model.load_weights([tensor])
            finalize_layerwise_reload(model, config.model_config)

    engine.apply_model(send)
    answer("sent", engine)
    for name in ("second", "mixed"):
        del engine
        cleanup_dist_env_and_memory()
        engine = start(asked["models"][name])
        answer(name, engine)
    return found


def answers_with_adapter(asked: dict[str, str]) -> list[list[int]]:
    """24 greedy tokens of the model, and of the adapter on it, after it was given the second checkpoint's weights."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    options: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "enable_prefix_caching": False}
    limits: dict[str, Any] = {"max_model_len": 512, "max_num_batched_tokens": 64, "kv_cache_memory_bytes": 64 << 20}
    engine = LLM(model=asked["first"], enable_lora=True, **options, **limits)
    sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    prompts, adapter = [{"prompt_token_ids": PROMPT}] * 2, [None, LoRARequest("a", 1, asked["adapter"])]
    engine.generate(prompts, sampling, lora_request=adapter, use_tqdm=False)
    engine.collective_rpc("reload_weights", kwargs={"weights_path": asked["second"]})
    outputs = engine.generate(prompts, sampling, lora_request=adapter, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder: Path = tmp_path_factory.mktemp("reload")
    names = ("first", "second", "mixed")
    for seed, name in zip((0, 1, 1), names, strict=True):
        write_checkpoint(folder / name, layers=4, seed=seed)
    first, mixed = (load_file(folder / name / "model.safetensors") for name in ("first", "mixed"))
    mixed |= {name: tensor for name, tensor in first.items() if name.endswith(OWN)}
    save_file(mixed, folder / "mixed" / "model.safetensors", metadata={"format": "pt"})
    return {name: str(folder / name) for name in names}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reload(models: dict[str, str], dtype: str) -> None:
    """By vLLM's `reload_weights`, by `parameter.data`, and tensor by tensor, as trainers send them.

    With bfloat16 as on a processor without AVX-512, where no product is packed, float32 as this one is.
    """
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
    if dtype == "bfloat16":
        environment["ONEDNN_MAX_CPU_ISA"] = "AVX2"
    found = in_own_process(answers, {"models": models, "dtype": dtype}, **environment)
    assert found["first"] != found["second"] != found["mixed"]
    assert found["reloaded"] == found["second"]
    assert found["replaced"] == found["mixed"]
    assert found["sent"] == found["first"]


def test_reload_under_an_adapter(models: dict[str, str], tmp_path: Path) -> None:
    """Layers that vLLM wraps for adapters get their weights, too."""
    reference = HfReference(models["second"])
    names = adapters.modules(reference.model, TARGETS)
    adapter = adapters.write(tmp_path / "adapter", reference.model, names)
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
    found = in_own_process(answers_with_adapter, models | {"adapter": str(adapter)}, **environment)
    for answer, folder in zip(found, (None, adapter), strict=True):
        with adapters.merged(reference.model, folder):
            assert reference.score(PROMPT, answer).agrees
