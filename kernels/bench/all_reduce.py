"""A decode step's layers on several GPUs: the ranks' sums in the norm's launch, beside vLLM's all-reduce before it.

PYTHONPATH=kernels python -m bench.all_reduce [--ranks 2] [--tokens 1 4 8] --out docs/benchmarks/all-reduce.md

Needs vLLM, and GPUs of one host that reach each other's memory. "none" leaves the sums out: what is above it is theirs.
NVLink multicast is used by vLLM where it finds it; VLLM_FLASHINFER_ALLREDUCE_BACKEND=trtllm leaves it off.
"""

import argparse
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.decode_layer import EPS, HIDDEN, LAYERS, TOP_K, Layer
from decode_kernels import cuda

Add = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # part, residual, norm weight -> norm, total
ROUNDS, REPLAYS = 8, 30  # chains of a graph, replays of it


def run(layer: Layer, x: Tensor, residual: Tensor, add_norm: Add | None, all_reduce: Callable[[Tensor], Tensor]) -> Any:
    """A layer that begins with the last one's parts, as `KimiDecoderLayer.decode` has it."""
    router: dict[str, Any] = {"top_k": TOP_K, "renormalize": True, "scale": 2.4}
    weights = (layer.gate, layer.bias, layer.shared_up, layer.done)
    if add_norm is None:
        projected, residual = cuda.norm_linear(all_reduce(x), residual, layer.norm, layer.in_proj, EPS)
    else:
        normed, residual = add_norm(x, residual, layer.norm)
        projected = cuda.linear(normed, layer.in_proj)
    mixed = cuda.linear(
        cuda.kda_decode(projected, layer.gates_b, layer.params, layer.state, layer.indices), layer.o_proj
    )
    if add_norm is None:
        found = cuda.router(all_reduce(mixed), residual, layer.norm, EPS, *weights, **router)
    else:
        normed, residual = add_norm(mixed, residual, layer.norm)
        found = cuda.router(normed, residual, None, EPS, *weights, **router)
    normed, residual, ids, chosen, shared = found
    out = cuda.experts(normed, layer.up, layer.down, ids, chosen, shared, layer.shared_down)
    return out, residual


def ways(rank: int, ranks: int) -> dict[str, tuple[Add | None, Callable[[Tensor], Tensor]]]:
    from vllm.distributed import get_tp_group, tensor_model_parallel_all_reduce
    from vllm.distributed.device_communicators.custom_all_reduce import CustomAllreduce

    group, most = get_tp_group(), 8
    size = cuda.Workspace.buffer_bytes(ranks, most, HIDDEN * 2)
    addresses = CustomAllreduce.create_shared_buffer(size, group=group.cpu_group)
    workspace = cuda.Workspace(
        torch.tensor(addresses, device="cuda"), torch.zeros(most, dtype=torch.int32, device="cuda"), rank
    )

    def ours(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return cuda.all_reduce_add_norm(x, residual, weight, EPS, workspace)

    def nothing(x: Tensor) -> Tensor:
        return x

    return {
        "none": (None, nothing),
        "vLLM's all-reduce": (None, tensor_model_parallel_all_reduce),
        "with the norm": (ours, nothing),
    }


def measure(rank: int, ranks: int, tokens: int, add_norm: Add | None, all_reduce: Callable[[Tensor], Tensor]) -> float:
    """Microseconds of a layer, the slowest rank's."""
    from vllm.distributed.parallel_state import get_tp_group, graph_capture

    torch.manual_seed(0)
    layers = [Layer(tokens, ranks) for _ in range(LAYERS)]

    def chain(rounds: int) -> None:
        for _ in range(rounds):
            x, residual = layers[0].x, layers[0].residual
            for layer in layers:
                x, residual = run(layer, x, residual, add_norm, all_reduce)

    chain(1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with graph_capture(torch.device("cuda", rank)) as context, torch.cuda.graph(graph, stream=context.stream):
        chain(ROUNDS)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPLAYS)]
    torch.distributed.barrier(get_tp_group().cpu_group)
    for before, after in events:
        before.record()
        graph.replay()
        after.record()
    torch.cuda.synchronize()
    own = statistics.median(a.elapsed_time(b) for a, b in events[2:]) * 1e3 / (ROUNDS * LAYERS)
    slowest = torch.tensor(own)
    torch.distributed.all_reduce(slowest, torch.distributed.ReduceOp.MAX, get_tp_group().cpu_group)
    return slowest.item()


def worker(rank: int, ranks: int, tokens: list[int], out: Path | None, port: int) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel

    torch.cuda.set_device(rank)
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(ranks, rank, f"tcp://127.0.0.1:{port}", rank, "nccl")
        initialize_model_parallel(ranks)
        found = ways(rank, ranks)
        rows = [
            [str(count), *(f"{measure(rank, ranks, count, *way):.1f}" for way in found.values())] for count in tokens
        ]
    if rank == 0:
        head = ["tokens", *found]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))
        print(table, flush=True)
        if out:
            title = f"# Sums over {ranks} ranks in a decode step\n\n    PYTHONPATH=kernels python -m bench.all_reduce"
            title += (
                f" --ranks {ranks}\n\n{ranks} x {torch.cuda.get_device_name()}; us a KDA layer with its experts, bf16."
            )
            out.write_text(f"{title}\n\n{table}\n")
    os._exit(0)  # nothing of the ranks is to wait for another


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--port", type=int, default=29533)
    args = parser.parse_args()
    torch.multiprocessing.spawn(worker, (args.ranks, args.tokens, args.out, args.port), args.ranks)


if __name__ == "__main__":
    main()
