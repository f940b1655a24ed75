"""The tiles of vLLM's Triton kernel for experts at this model's shapes: tried one by one, and the fastest kept.

    PYTHONPATH=kernels python -m bench.expert_tiles --out docs/benchmarks/expert-tiles.md [--fp8]

vLLM ships tables of tiles for many shapes and GPUs, none for 256 experts of 1,024 in bf16 or in fp8 by channel on a
Hopper. Where a table is missing it goes by a rule. This writes the missing one into the package, as vLLM names and
reads it, and how much it gains over the rule. Tokens choose their experts evenly. A tile whose output differs from
the rule's is not taken.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from torch import Tensor

from bench.data_sheet import bandwidth

TABLES = Path(__file__).parents[2] / "vllm_kimi_linear" / "fused_moe_tables"
EXPERTS, WIDTH, HIDDEN, CHOSEN = 256, 1024, 2304, 8  # of the 48B
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
COMMAND = "PYTHONPATH=kernels python -m bench.expert_tiles"
SHARED_MEMORY = 227 * 1024  # bytes a program of a Hopper can have
Tile = dict[str, int]


@dataclass(frozen=True)
class Shape:
    """One rank's experts."""

    experts: int
    width: int  # rows of gate, and of up
    hidden: int
    chosen: int  # experts a token
    fp8: bool = False  # weights by channel, activations by token


def candidates(shape: Shape, tokens: int) -> Iterator[Tile]:
    """Tiles worth trying: few rows where an expert has few, many stages where weights are waited for."""
    each, size = tokens * shape.chosen / shape.experts, 1 if shape.fp8 else 2
    if each <= 8:
        choices = product((16,), (32, 64, 128), (64, 128, 256), (1,), (4,), (3, 4, 5))
    elif shape.fp8:
        rows = (16, 32, 64) if each <= 64 else (64, 128)
        choices = product(rows, (64, 128, 256), (128,), (1,), (4, 8), (3, 4))
    elif each <= 64:
        choices = product((16, 32, 64), (64, 128, 256), (64, 128), (1,), (4, 8), (3,))
    else:
        choices = product((64, 128), (128, 256), (64,), (1, 16), (4, 8), (3, 4))
    for m, n, k, group, warps, stages in choices:
        if (m + n) * k * size * stages <= SHARED_MEMORY:
            yield {
                "BLOCK_SIZE_M": m,
                "BLOCK_SIZE_N": n,
                "BLOCK_SIZE_K": k,
                "GROUP_SIZE_M": group,
                "num_warps": warps,
                "num_stages": stages,
            }


class Experts:
    """Random weights of one layer and, for each number of tokens, one call of vLLM's kernels."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        torch.manual_seed(0)
        self.up = self.weight(shape.experts, 2 * shape.width, shape.hidden)
        self.down = self.weight(shape.experts, shape.hidden, shape.width)
        self.config = None
        if shape.fp8:
            from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config

            (self.up, up), (self.down, down) = self.by_channel(self.up), self.by_channel(self.down)
            self.config = fp8_w8a8_moe_quant_config(up, down, per_act_token_quant=True, per_out_ch_quant=True)

    @staticmethod
    def weight(*sizes: int) -> Tensor:
        return torch.randn(*sizes, dtype=torch.bfloat16, device="cuda") * sizes[-1] ** -0.5

    @staticmethod
    def by_channel(weight: Tensor) -> tuple[Tensor, Tensor]:
        scales = weight.float().abs().amax(-1, keepdim=True) / 448
        return (weight.float() / scales).to(torch.float8_e4m3fn), scales

    def call(self, tokens: int) -> Callable[[], Tensor]:
        from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

        x = torch.randn(tokens, self.shape.hidden, dtype=torch.bfloat16, device="cuda")
        ids = torch.rand(tokens, self.shape.experts, device="cuda").argsort(1)[:, : self.shape.chosen].int()
        weights = torch.rand(tokens, self.shape.chosen, device="cuda")
        return lambda: fused_experts(x, self.up, self.down, weights, ids, quant_config=self.config)


def attempt(call: Callable[[], Tensor], tile: Tile | None) -> Tensor | None:
    """The output with this tile, or by vLLM's rule; None where the GPU has no room for the tile."""
    from vllm.model_executor.layers.fused_moe import override_config

    try:
        if tile is None:
            return call()
        with override_config(tile):
            return call()
    except triton.runtime.errors.OutOfResources:
        return None


def compile_all(shape: Shape, pairs: list[tuple[int, Tile]]) -> None:
    """Compile in a process of its own: what it leaves in Triton's cache the measurement finds there."""
    call = cache(Experts(shape).call)
    for tokens, tile in pairs:
        attempt(call(tokens), tile)
    torch.cuda.synchronize()


def microseconds(call: Callable[[], Tensor], tile: Tile | None) -> float:
    """Median of CUDA-graph replays."""
    return 1e3 * triton.testing.do_bench_cudagraph(lambda: attempt(call, tile), rep=20, return_mode="median")


def tune(experts: Experts, tokens: int) -> tuple[float, float, Tile]:
    """Microseconds by vLLM's rule, by the best tile, and this."""
    call = experts.call(tokens)
    wanted = attempt(call, None)
    assert wanted is not None
    ours = {}
    for tile in candidates(experts.shape, tokens):
        out = attempt(call, tile)
        if out is not None and (out - wanted).norm() <= 0.01 * wanted.norm():
            ours[microseconds(call, tile)] = tile
    best = min(ours)
    return microseconds(call, None), best, ours[best]


def floor(shape: Shape, tokens: int, bytes_a_second: float) -> float:
    """Microseconds to read the weights of the experts that `tokens` choose evenly."""
    touched = 1 - (1 - shape.chosen / shape.experts) ** tokens
    size = 1 if shape.fp8 else 2
    return 1e6 * touched * shape.experts * 3 * shape.width * shape.hidden * size / bytes_a_second


def page(shape: Shape, found: dict[int, tuple[float, float, Tile]], command: str) -> str:
    """The Markdown table of what was found."""
    device = torch.cuda.get_device_name()
    bytes_a_second, weights = bandwidth(device), "fp8 by channel" if shape.fp8 else "bf16"
    lines = [
        f"# Tiles for {shape.experts} experts of {shape.width}",
        "",
        f"    {command}",
        "",
        f"{device}, torch {torch.__version__}, Triton {triton.__version__}. Both products of a layer's experts and "
        f"what lies between, {weights}, {shape.chosen} experts a token, by vLLM's rule and tuned. The floor reads the "
        f"weights at {bytes_a_second / 1e12} TB/s.",
        "",
        "| tokens | rule us | tuned us | times faster | floor us | rows x columns x depth, group, warps, stages |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for tokens, (rule, tuned, t) in found.items():
        sizes = " x ".join(str(t[f"BLOCK_SIZE_{axis}"]) for axis in "MNK")
        lines.append(
            f"| {tokens} | {rule:.1f} | {tuned:.1f} | {rule / tuned:.2f} | {floor(shape, tokens, bytes_a_second):.1f} "
            f"| {sizes}, {t['GROUP_SIZE_M']}, {t['num_warps']}, {t['num_stages']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="write what was gained here")
    parser.add_argument("--tables", type=Path, default=TABLES, help="the folder that gets the table")
    parser.add_argument("--ranks", type=int, default=1, help="that share each expert (tensor parallel)")
    parser.add_argument("--fp8", action="store_true", help="weights by channel, activations by token")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="the numbers of tokens to tune for")
    args = parser.parse_args()
    from vllm.model_executor.layers.fused_moe.fused_moe import get_config_file_name

    shape = Shape(EXPERTS, WIDTH // args.ranks, HIDDEN, CHOSEN, args.fp8)
    pairs = [(tokens, tile) for tokens in args.tokens for tile in candidates(shape, tokens)]
    workers = min(12, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        # Pairs of one tile go to one worker, lest two compile the same.
        pairs.sort(key=lambda pair: (str(pair[1]), pair[0]))
        share = -(-len(pairs) // workers)
        list(pool.map(compile_all, [shape] * workers, [pairs[i * share : (i + 1) * share] for i in range(workers)]))
    experts, found = Experts(shape), {}
    for tokens in args.tokens:
        found[tokens] = tune(experts, tokens)
        print(tokens, *found[tokens], flush=True)
        table = {str(tokens): tile for tokens, (_, _, tile) in found.items()}
        args.tables.mkdir(parents=True, exist_ok=True)
        name = get_config_file_name(shape.experts, shape.width, "fp8_w8a8" if args.fp8 else None)
        (args.tables / name).write_text(json.dumps({"triton_version": triton.__version__, **table}, indent=1) + "\n")
        tuned = " ".join(map(str, found))
        command = f"{COMMAND}{' --fp8' * args.fp8} --ranks {args.ranks} --tokens {tuned} --out {args.out}"
        args.out.write_text(page(shape, found, command))


if __name__ == "__main__":
    main()
