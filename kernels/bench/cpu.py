"""Time one KDA layer's operator on the CPU: ours, our torch reference, transformers. One run, medians.

    PYTHONPATH=kernels python -m bench.cpu [--heads 32] [--dim 128] [--dtype bfloat16] [--repeats 7]

Microseconds per token and layer, from the projections to the input of the output projection. transformers'
functions cover the recurrence alone (their convolution, gates and norm are not timed). Decode reads and writes
the whole state, so its floor is the time to update that many bytes in place, measured here with torch.
"""

import argparse
import inspect
import statistics
import time
from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch

from kda_kernels import interface, reference
from kda_kernels.interface import DecodeArgs, KdaInputs, KdaParams, KdaState, PrefillArgs

BACKENDS = {"ours": interface, "reference": reference}
CACHE_BYTES = 128 << 20  # decode goes round through this much state, so that none of it is found in a cache


def median(call: Callable[[], object], repeats: int) -> float:
    """Median seconds of one call, after one that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def make_layer(
    tokens: int, states: int, heads: int, dim: int, dtype: torch.dtype
) -> tuple[KdaInputs, KdaParams, KdaState, torch.Tensor]:
    width = heads * dim
    qkv, g, beta, output_gate = (torch.randn(tokens, n).to(dtype) for n in (3 * width, width, heads, width))
    params = KdaParams(
        (torch.randn(3 * width, 4) * 0.5).to(dtype),
        torch.rand(heads).mul(15).add(1).log(),
        torch.rand(width) * 5 - 7,
        torch.ones(dim).to(dtype),
        1e-5,
    )
    state = KdaState(torch.zeros(states, 3, 3 * width, dtype=dtype), torch.zeros(states, heads, dim, dim))
    return KdaInputs(qkv, g, beta, output_gate), params, state, torch.empty(tokens, width, dtype=dtype)


def prefill(tokens: int, args: argparse.Namespace, dtype: torch.dtype) -> dict[str, float]:
    inputs, params, state, out = make_layer(tokens, 2, args.heads, args.dim, dtype)
    bounds, state_indices = torch.tensor([0, tokens], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
    has_initial_state = torch.tensor([False])
    kernel_args = PrefillArgs(inputs, params, state, bounds, state_indices, has_initial_state, out)
    results = {}
    for name, backend in BACKENDS.items():
        call = partial(backend.prefill, kernel_args)
        results[name] = median(call, args.repeats) / tokens
    results["transformers"] = transformers("chunk", tokens, 1, args, dtype) / tokens
    return results


def decode(batch: int, args: argparse.Namespace, dtype: torch.dtype) -> dict[str, float]:
    bytes_of_state = batch * args.heads * args.dim * args.dim * 4
    layers = [
        make_layer(batch, batch + 1, args.heads, args.dim, dtype) for _ in range(max(1, CACHE_BYTES // bytes_of_state))
    ]
    state_indices = torch.arange(1, batch + 1, dtype=torch.int32)

    def step(backend: ModuleType) -> None:
        for inputs, params, state, out in layers:
            backend.decode(DecodeArgs(inputs, params, state, state_indices, out))

    def touch() -> None:
        for _, _, state, _ in layers:
            state.recurrent[1:].mul_(1.0)

    tokens = len(layers) * batch
    results = {name: median(partial(step, backend), args.repeats) / tokens for name, backend in BACKENDS.items()}
    results["transformers"] = transformers("recurrent", 1, batch, args, dtype) / batch
    results["floor"] = median(touch, args.repeats) / tokens
    return results


def transformers(form: str, tokens: int, batch: int, args: argparse.Namespace, dtype: torch.dtype) -> float:
    """Seconds of one call of transformers' plain torch function of this form; NaN without transformers."""
    try:
        from transformers.models.kimi_linear import modeling_kimi_linear
    except ImportError:
        return float("nan")
    function = inspect.unwrap(getattr(modeling_kimi_linear, f"{form}_kimi_delta_attention"))
    shape = (batch, tokens, args.heads, args.dim)
    q, k, v = (torch.randn(shape).to(dtype) for _ in range(3))
    g, beta = -torch.rand(shape), torch.rand(shape[:3]).to(dtype)
    state = torch.zeros(batch, args.heads, args.dim, args.dim)
    return median(
        lambda: function(
            q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
        ),
        args.repeats,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--lengths", type=int, nargs="*", default=[64, 512], help="prompt lengths")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16], help="decode batch sizes")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    name, reason = interface.describe("cpu", dtype, args.dim)
    print(f"{args.heads} heads of {args.dim}, {args.dtype}, {torch.get_num_threads()} threads, {name}: {reason}")
    print("microseconds per token and layer\n")
    print("| | ours | torch reference | transformers | state in place |")
    print("| --- | --- | --- | --- | --- |")
    cases = [(f"prefill {n}", prefill(n, args, dtype)) for n in args.lengths]
    cases += [(f"decode {n}", decode(n, args, dtype)) for n in args.batches]
    for label, seconds in cases:
        cells = [seconds.get(column) for column in ("ours", "reference", "transformers", "floor")]
        print(f"| {label} | " + " | ".join("-" if x is None else f"{x * 1e6:.1f}" for x in cells) + " |")


if __name__ == "__main__":
    main()
