"""Tiles for the experts on GPUs for which vLLM has none, made by `kernels/bench/expert_tiles.py`.

A table is read in steps through experts that were handed to `use_tables` alone. A folder that the user names takes its
place.
"""

import functools
import json
from pathlib import Path
from typing import Any
from weakref import WeakSet

from torch import nn

from vllm_kimi_linear.patches.patch import Function, Hook, Patch

TABLES = Path(__file__).parent / "fused_moe_tables"

_ours: WeakSet[nn.Module] = WeakSet()


def use_tables(experts: nn.Module) -> None:
    """Look for tables of ours in steps through these experts, which have a `layer_name`."""
    _ours.add(experts)


def prefer_tables(original: Function) -> Function:
    from vllm import envs
    from vllm.model_executor.layers.fused_moe import fused_moe

    def get_moe_configs(E: Any, N: Any, dtype: Any, block_n: Any = None, block_k: Any = None) -> Any:
        shape = [block_n, block_k] if block_n and block_k else None
        table = _table(fused_moe.get_config_file_name(E, N, dtype, shape))
        if table and not envs.VLLM_TUNED_CONFIG_FOLDER and not envs.VLLM_BATCH_INVARIANT and _in_a_step_of_ours():
            return table
        return original(E, N, dtype, block_n, block_k)

    return get_moe_configs


@functools.cache
def _table(name: str) -> dict[int, Any] | None:
    """Tokens of a step -> tiles, without the version of the compiler that the file notes."""
    path = TABLES / name
    if not path.exists():
        return None
    return {int(tokens): tiles for tokens, tiles in json.loads(path.read_text()).items() if tokens != "triton_version"}


def _in_a_step_of_ours() -> bool:
    from vllm.forward_context import get_forward_context, is_forward_context_available

    layers = get_forward_context().no_compile_layers if is_forward_context_available() else {}
    return any(layers.get(experts.layer_name) is experts for experts in _ours)  # asked often: the first one tells


PATCH = Patch(
    symptom="On an H200 the experts of this model run with vLLM's default tiles, tuned for no GPU in particular.",
    cause="vLLM looks for tables by GPU and sizes in its own folder and in VLLM_TUNED_CONFIG_FOLDER, which applies "
    "to every model and to other kernels of the process.",
    remove_when="vLLM ships the tables in `fused_moe_tables/`, or a layer can name its own.",
    device="cuda",
    speed=True,
    hooks=(
        Hook(
            "vllm.model_executor.layers.fused_moe.fused_moe:get_moe_configs",
            "E N dtype block_n block_k",
            prefer_tables,
        ),
    ),
)
