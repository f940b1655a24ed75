"""Experts run for every size of step at the start, as vLLM's GPU worker has it done: here called by hand."""

from pathlib import Path
from typing import Any

from kimi_demo.checkpoint import write_checkpoint
from tests.support.own_process import in_own_process


def start(folder: str) -> dict[str, Any]:
    """Layers and tokens that ran, and the warnings, of a warmup and of one in which the experts fail."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
    from vllm.model_executor.warmup.jit_warmup import JitWarmupRegistry

    from vllm_kimi_linear import log
    from vllm_kimi_linear.moe import MixtureOfExperts

    args = EngineArgs(model=folder, dtype="float32", max_model_len=512, max_num_batched_tokens=100, max_num_seqs=8)
    config = args.create_engine_config()
    registry = JitWarmupRegistry(config)
    ran: list[tuple[str, int]] = []
    warnings: list[str] = []
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
        initialize_model_parallel(1, 1)
        torch.set_default_dtype(config.model_config.dtype)
        with registry.activate():
            model = initialize_model(vllm_config=config)
        get_model_loader(config.load_config).load_weights(model, config.model_config)
        process_weights_after_loading(model, config.model_config, torch.device("cpu"))
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MixtureOfExperts)}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, inputs, out, name=name: ran.append((name, len(out))))
    registry.warmup()
    log.logger.warning_once = lambda text, *values: warnings.append(text % values)
    for layer in layers.values():
        layer.experts = None
    registry.warmup()
    return {"layers": list(layers), "ran": ran, "warnings": warnings}


def test_experts_are_warmed_up_and_a_failure_is_only_said(tmp_path: Path):
    write_checkpoint(tmp_path)
    found = in_own_process(start, str(tmp_path), VLLM_LOGGING_LEVEL="ERROR")
    assert len(found["layers"]) > 1
    sizes = [*range(1, 11), *range(15, 19), *range(31, 35), *range(63, 67), 99, 100]
    assert found["ran"] == [[found["layers"][0], tokens] for tokens in sizes]
    assert len(found["warnings"]) == len(sizes)
    assert "experts could not be run with 100 tokens" in found["warnings"][-1]
