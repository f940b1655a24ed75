"""The servers that are compared, and the models that they serve."""

import os
from dataclasses import dataclass
from typing import Any

from benchmarks.common import CONFIG

LAYERS = 27
DUMMY = (
    "--load-format=dummy --skip-tokenizer-init --enable-prompt-tokens-details "
    "--worker-extension-cls=benchmarks.h200.even_routers.EvenRouters"
)
# Few graphs, for they are most of a start; the sizes of the rows, and what random arrivals are rounded up to.
FLAGS = (
    "--dtype=bfloat16 --max-model-len=1048576 --max-num-batched-tokens=16384 --max-num-seqs=128 "
    "--gpu-memory-utilization=0.94 --enable-prefix-caching --cudagraph-capture-sizes 1 2 4 8 16 32 48 64 128"
)
# Nothing is compiled for the sampler, graphs are captured once, not also to weigh them, and workers take a call.
ENV = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS": "0",
    "VLLM_SERVER_DEV_MODE": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(CONFIG.parents[1]), os.environ.get("PYTHONPATH")])),
}
START_LIMIT = 300  # seconds


@dataclass(frozen=True)
class Run:
    """One server: which implementation, with which rows."""

    rows: tuple[str, ...]
    attention_only: bool = False
    flags: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()


# vLLM's own needs CuTe DSL for its fused GEMM and all-reduce, which one GPU does not use.
OWN = (("VLLM_PLUGINS", ""), ("VLLM_KIMI_K3_GEMM_AR", "0"))
ALONE = ("tpot 1 4K", "ttft 8K", "tpot 1 128K")
# Blocks as long as ours; and a context that need not be computed, where a request says so.
FILLED = {"kv_transfer_params": {"filled": True}}
FILLING = '{"kv_connector":"FilledConnector","kv_connector_module_path":"benchmarks.h200.filled","kv_role":"kv_both"}'
ATTENTION = ("--block-size=256", "--no-enable-prefix-caching", f"--kv-transfer-config={FILLING}")
FILLED_MILLION = "tpot 1 1M filled"  # to prefill it with attention alone takes longer than all else
MANY = ("tpot 8 4K", "tpot 32 4K", "poisson", "tpot 8 128K")
RUNS = {
    "ours": Run((*ALONE, "million", *MANY, "ttft 512K")),
    "vLLM": Run((*ALONE, *MANY, "million"), env=OWN),
    "attention only": Run((*ALONE, FILLED_MILLION, "ttft 512K", *MANY), True, ATTENTION),
    "ours, vLLM's layers": Run(ALONE + MANY, flags=('--additional-config={"decode_kernels": false}',)),
    "ours, fused all-reduce": Run((*ALONE, "tpot 8 4K"), flags=('--additional-config={"fused_all_reduce": true}',)),
    "ours, no steady steps": Run((*ALONE, "tpot 8 4K"), flags=('--additional-config={"steady_steps": false}',)),
    "ours, bf16 state": Run(("tpot 1 4K", "tpot 8 4K", "tpot 32 4K"), flags=("--mamba-ssm-cache-dtype=bfloat16",)),
}


def model_config(run: Run, base: dict[str, Any], layers: int = LAYERS) -> dict[str, Any]:
    """`base` with its first `layers` layers, of the run's kind."""
    linear = dict(base["linear_attn_config"])
    full = [n for n in linear["full_attn_layers"] if n <= layers]
    if run.attention_only:
        full = list(range(1, layers + 1))
    linear["full_attn_layers"] = full
    linear["kda_layers"] = [n for n in range(1, layers + 1) if n not in full]
    return base | {"num_hidden_layers": layers, "linear_attn_config": linear}
