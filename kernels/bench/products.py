"""Products of a few tokens on a CPU, weights in every form that the C kernels take; oneDNN's packed fp32 beside them.

PYTHONPATH=kernels OMP_NUM_THREADS=1 python -m bench.products [--shape 12832 2304] [--tokens 1 16]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from decode_kernels import interface
from decode_kernels.weights import QuantizedWeight, Weight

LAYERS = 4  # with weights of their own, more than the caches hold
FORMS = ("fp32", "bf16", "int8", "fp8", "int4")


def weight(form: str, rows: int, columns: int) -> Weight:
    """Any values; scales a row, or for 32 columns of int4."""
    if form == "fp32":
        return torch.randn(rows, columns)
    if form == "bf16":
        return torch.randn(rows, columns).bfloat16()
    if form == "int4":
        words = torch.randint(-(1 << 31), 1 << 31, (rows, columns // 8)).to(torch.int32)
        return QuantizedWeight(words, torch.rand(rows, columns // 32), 32)
    values = torch.randn(rows, columns) * 30
    stored = values.to(torch.int8 if form == "int8" else torch.float8_e4m3fn)
    return QuantizedWeight(stored, torch.rand(rows, 1), 1 << columns.bit_length())


def microseconds(call: Callable[[int], object], repeats: int = 12) -> float:
    """Median of calls with the number of the layer, after three that are not timed."""
    seconds = []
    for turn in range(repeats + 3):
        begun = time.perf_counter()
        call(turn % LAYERS)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[3:]) * 1e6


def packed(weights: list[Tensor], x: Tensor) -> float | None:
    """oneDNN's time by vLLM's operations, None without them."""
    try:
        from vllm import _custom_ops as ops

        handlers = [ops.create_onednn_mm(each.t(), 1) for each in weights]
    except (ImportError, AttributeError, RuntimeError):
        return None
    return microseconds(lambda layer: ops.onednn_mm(handlers[layer], x, None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=2, default=[12832, 2304], help="rows and columns")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16])
    args = parser.parse_args()
    kernels = interface.kernels("cpu")
    for form in FORMS:
        weights = [weight(form, *args.shape) for _ in range(LAYERS)]
        for tokens in args.tokens:
            x = torch.randn(tokens, args.shape[1]).to(torch.float32 if form == "fp32" else torch.bfloat16)
            ours = microseconds(lambda layer, weights=weights, x=x: kernels.linear(x, weights[layer]))  # type: ignore[misc]
            beside = packed(weights, x) if form == "fp32" else None
            print(f"{form}, {tokens} tokens: {ours:.0f} us" + (f", oneDNN {beside:.0f}" if beside else ""), flush=True)


if __name__ == "__main__":
    main()
