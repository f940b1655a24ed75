"""What is forecast of a rank's memory is what the model that vLLM builds and the cache that it allocates take."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kimi_demo.checkpoint import write_checkpoint
from kimi_demo.presets import demo_config
from kimi_server.planner import forecast
from kimi_server.planner.stored import STORED, as_stored
from tests.support.own_process import in_own_process
from vllm_kimi_linear.cache import layout
from vllm_kimi_linear.config.model import ModelSizes

CONFIG_48B = json.loads((Path(__file__).parents[3] / "benchmarks" / "config_48b.json").read_text())
PRESETS = ("demo", "one-mla", "dense")
# Model -> config and dtypes. "odd": a vocabulary short of 64 words.
MODELS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "48b": (CONFIG_48B, ("bfloat16",)),
    **{f"48b-{weights}": (as_stored(CONFIG_48B, weights), ("bfloat16",)) for weights in STORED},
    **{preset: (demo_config(preset), ("float32", "bfloat16")) for preset in PRESETS},
    "odd": (demo_config() | {"vocab_size": 1000}, ("float32",)),
    "tied": (demo_config() | {"vocab_size": 1000, "tie_word_embeddings": True}, ("float32",)),
}
CASES = [(model, dtype) for model, (_, dtypes) in MODELS.items() for dtype in dtypes]
ALONE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
PLACES = ((1, 0), (2, 0), (2, 1))  # ranks and rank
MIB = 1 << 20


def build(place: tuple[str, int, int]) -> dict[str, int]:
    """Bytes that one rank of each model in a folder holds: parameters, and what absorbed attention copies of them."""
    import torch
    from torch.nn import Module
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model

    folder, ranks, rank = place

    def held(module: Module) -> int:
        return sum(p.numel() * p.element_size() for p in module.parameters())

    sizes: dict[str, int] = {}
    for model, dtype in CASES:
        args = EngineArgs(
            model=f"{folder}/{model}",
            dtype=dtype,
            skip_tokenizer_init=True,
            load_format="dummy",
            max_model_len=8192,
            tensor_parallel_size=ranks,
        )
        config = args.create_engine_config()
        with set_current_vllm_config(config):
            if not sizes:
                os.environ["VLLM_DIST_IDENT"] = "forecast"  # as the CPU worker does
                init_distributed_environment(ranks, rank, f"file://{folder}/rendezvous-{ranks}", rank, "gloo")
                initialize_model_parallel(ranks, 1)
            torch.set_default_dtype(config.model_config.dtype)
            with torch.device("meta"):
                built = initialize_model(vllm_config=config)
                size = held(built)
                for layer in built.model.layers:
                    if hasattr(layer.self_attn, "attn"):
                        layer.self_attn.attn.process_weights_after_loading(config.model_config.dtype)
                absorbed = held(built) - size
        sizes[f"{model} {dtype}"] = size + absorbed
    return sizes


def allocate(folder: str) -> dict[str, list[int]]:
    """Blocks, their tokens, and bytes of the cache that the engine allocates for each model."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    found = {}
    for model in sorted(Path(folder).iterdir()):
        engine = LLM(
            model=str(model),
            dtype="float32",
            enforce_eager=True,
            max_model_len=4096,
            kv_cache_memory_bytes=64 * MIB,
            enable_prefix_caching=True,
            skip_tokenizer_init=True,
        )
        cache = engine.llm_engine.vllm_config.cache_config
        [size] = engine.apply_model(cache_bytes)
        found[model.name] = [cache.num_gpu_blocks, cache.block_size, size]
        del engine
        cleanup_dist_env_and_memory()
    return found


def cache_bytes(model: Any) -> int:
    """Bytes behind the cache tensors of a model's layers."""
    storages = {}
    for module in model.modules():
        cache = getattr(module, "kv_cache", ())
        for tensor in cache if isinstance(cache, tuple | list) else (cache,):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], dict[str, int]]:
    """(ranks, rank) -> what `build` says."""
    folder = tmp_path_factory.mktemp("configs")
    for name, (config, _) in MODELS.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    with ThreadPoolExecutor() as pool:  # the ranks of one model wait for each other
        jobs = {place: pool.submit(in_own_process, build, (str(folder), *place), **ALONE) for place in PLACES}
    return {place: job.result() for place, job in jobs.items()}


@pytest.mark.parametrize(("model", "dtype"), CASES)
@pytest.mark.parametrize(("ranks", "rank"), PLACES)
def test_weights_are_those_of_the_built_model(built, model: str, dtype: str, ranks: int, rank: int) -> None:
    model_sizes = ModelSizes.from_config(MODELS[model][0])
    assert forecast.held_weight_bytes(model_sizes, dtype, ranks) == built[ranks, rank][f"{model} {dtype}"]


@pytest.fixture(scope="module")
def allocated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    for preset in PRESETS:
        write_checkpoint(folder / preset, preset)
    return in_own_process(allocate, str(folder), **ALONE)


@pytest.mark.parametrize("preset", PRESETS)
def test_cache_is_what_the_engine_allocates(allocated, preset: str) -> None:
    model_sizes = ModelSizes.from_config(demo_config(preset))
    plan = layout.cache_layout(model_sizes, activation_dtype="float32", kv_bytes=64 * MIB, prefix_caching=True)
    block = plan.bytes_per_sequence(4096) // plan.blocks_per_sequence(4096)
    assert allocated[preset] == [plan.num_blocks, plan.block_tokens, plan.num_blocks * block]
