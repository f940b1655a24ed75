"""A decode step's layer in few launches: every kernel alone and the layer as a chain, beside the bytes they read.

PYTHONPATH=kernels python -m bench.decode_layer [--ranks 4] [--tokens 1 2 4] [--weights fp8] [--tune]
"""

import argparse
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from bench.timing import copy_bandwidth, graph_time
from decode_kernels import cuda
from decode_kernels.cuda.experts import experts_down, experts_up
from decode_kernels.weights import QuantizedWeight, Weight
from kda_kernels.interface import KdaParams, KdaState

HIDDEN, HEADS, DIM, EXPERTS, TOP_K, INTER, CONV, EPS = 2304, 32, 128, 256, 8, 1024, 4, 1e-5
NOPE, ROPE, VALUE, LATENT, PAGE = 128, 64, 128, 512, 64  # of an MLA layer
LAYERS = 4  # with weights of their own, more than the second cache holds
# As public checkpoints have them: all linear layers by channel; the same in blocks, or 4 bits, of experts alone.
KINDS = ("bf16", "fp8", "fp8-block", "int4")


def stored(weight: Tensor, kind: str) -> Weight:
    """A weight of this kind and shape; its values are any."""

    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=weight.device)

    *outer, rows, columns = weight.shape
    if kind == "fp8":
        scales = zeros(*outer, rows, 1, dtype=torch.float32)
        return QuantizedWeight(weight.to(torch.float8_e4m3fn), scales, 1 << (columns - 1).bit_length())
    if kind == "fp8-block":
        scales = zeros(*outer, -(-rows // 128), -(-columns // 128), dtype=torch.float32)
        return QuantizedWeight(weight.to(torch.float8_e4m3fn), scales, 128, 128)
    if kind == "int4":
        scales = zeros(*outer, rows, columns // 32, dtype=torch.bfloat16)
        return QuantizedWeight(weight.view(torch.int32)[..., : columns // 8].contiguous(), scales, 32)
    return weight


class Layer:
    """One KDA layer of the 48B with its experts, of one of `ranks` ranks, and a batch of `tokens` tokens."""

    def __init__(self, tokens: int, ranks: int, device: str = "cuda", kind: str = "bf16") -> None:
        def random(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, device=device, dtype=torch.bfloat16) * scale).to(dtype)

        heads, inter = HEADS // ranks, INTER // ranks
        width = heads * DIM
        self.norm = random(HIDDEN)
        self.in_proj = random(-(-(3 * width + heads + 2 * DIM) // 8) * 8, HIDDEN, scale=HIDDEN**-0.5)
        self.gates_b = random(2, width, DIM, scale=DIM**-0.5)
        self.o_proj = random(HIDDEN, width, scale=width**-0.5)
        self.gate = random(EXPERTS, HIDDEN, dtype=torch.float32, scale=HIDDEN**-0.5)
        self.bias = random(EXPERTS, dtype=torch.float32, scale=0.01)
        self.up, self.down = random(EXPERTS, 2 * inter, HIDDEN, scale=HIDDEN**-0.5), random(EXPERTS, HIDDEN, inter)
        self.shared_up, self.shared_down = random(2 * inter, HIDDEN, scale=HIDDEN**-0.5), random(HIDDEN, inter)
        self.up, self.down = stored(self.up, kind), stored(self.down, kind)
        if kind == "fp8":
            self.in_proj, self.o_proj = stored(self.in_proj, kind), stored(self.o_proj, kind)
        if kind.startswith("fp8"):
            self.shared_up, self.shared_down = stored(self.shared_up, kind), stored(self.shared_down, kind)
        self.done = torch.zeros(1, dtype=torch.int32, device=device)
        A_log, dt_bias = random(heads, dtype=torch.float32), random(width, dtype=torch.float32)
        self.params = KdaParams(random(3 * width, CONV), A_log, dt_bias, random(DIM), EPS)
        recurrent = random(tokens + 1, heads, DIM, DIM, dtype=torch.float32)
        self.state = KdaState(random(tokens + 1, CONV - 1, 3 * width), recurrent)
        self.indices = torch.arange(1, tokens + 1, dtype=torch.int32, device=device)
        # What each kernel of a chain takes from the one before it, here random.
        self.x, self.residual, self.out = random(tokens, HIDDEN), random(tokens, HIDDEN), random(tokens, width)
        self.projected = random(tokens, len(self.in_proj))
        ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(tokens)]).int()
        self.used, self.ids = len(ids.unique()), ids.to(device)
        self.weights = torch.rand(tokens, TOP_K, device=device)
        self.acts, self.shared_acts = random(tokens * TOP_K, inter), random(tokens, inter)
        # An MLA layer's, beside its attention and what it has in common with a KDA layer.
        self.kv_b, self.latent_norm = random(heads, NOPE + VALUE, LATENT, scale=LATENT**-0.5), random(LATENT)
        self.queries, self.mixed = random(tokens, heads * (NOPE + ROPE) + LATENT + ROPE), random(tokens, heads, LATENT)
        self.cache, self.slots = random(tokens, PAGE, LATENT + ROPE), PAGE * torch.arange(tokens, device=device)

    def in_projection(self, **tile: int) -> tuple[Tensor, Tensor]:
        return cuda.norm_linear(self.x, self.residual, self.norm, self.in_proj, EPS, **tile)

    def kda(self, **tile: int) -> Tensor:
        return cuda.kda_decode(self.projected, self.gates_b, self.params, self.state, self.indices, **tile)

    def out_projection(self, **tile: int) -> Tensor:
        return cuda.linear(self.out, self.o_proj, **tile)

    def router(self, **tile: int) -> tuple[Tensor, ...]:
        norm = (self.x, self.residual, self.norm, EPS)
        weights = (self.gate, self.bias, self.shared_up, self.done)
        return cuda.router(*norm, *weights, top_k=TOP_K, renormalize=True, scale=2.4, **tile)

    def experts_up(self, **tile: int) -> Tensor:
        return experts_up(self.x, self.up, self.ids, **tile)

    def experts_down(self, **tile: int) -> Tensor:
        shared = (self.shared_acts, self.shared_down)
        return experts_down(self.acts, self.down, self.ids, self.weights, *shared, **tile)

    def latent_query(self, **tile: int) -> Tensor:
        own = (self.latent_norm, EPS, self.cache, self.slots)
        return cuda.latent_query(self.queries, self.kv_b, *own, NOPE, **tile)

    def latent_value(self, **tile: int) -> Tensor:
        return cuda.latent_value(self.mixed, self.kv_b, NOPE, **tile)

    def run(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The chain."""
        self.x, self.residual = x, residual
        self.projected, self.residual = self.in_projection()
        self.out = self.kda()
        self.x = self.out_projection()
        self.x, self.residual, self.ids, self.weights, self.shared_acts = self.router()
        self.acts = self.experts_up()
        return self.experts_down(), self.residual

    def calls(self) -> dict[str, tuple[Callable[..., object], float, list[dict[str, int]]]]:
        """Name -> the call, the bytes that it has to move, the launch options to try. First those of `run`."""
        tokens, used = len(self.x), self.used
        rows = {"BN": (1, 2, 4, 8), "num_warps": (2, 4, 8)}
        if isinstance(self.up, QuantizedWeight):
            rows["BN"] = (2, 4, 8, 16)
        eight_bits = isinstance(self.up, QuantizedWeight) and self.up.values.dtype != torch.int32
        halves = {"HALVES": (False, True)} if eight_bits else {}
        state = 2 * tokens * size(self.state.recurrent[0])
        return {
            "in_proj": (self.in_projection, size(self.in_proj), tiles(**rows) if tokens < 3 else []),
            "kda": (self.kda, size(self.gates_b) + state, tiles(num_warps=(4, 8), INNER=(32, 64))),
            "o_proj": (self.out_projection, size(self.o_proj), tiles(**rows) if tokens < 3 else []),
            "router": (
                self.router,
                size(self.gate, self.shared_up),
                tiles(BN=(1, 2, 4), PAIRS=(1, 2, 4, 8), num_warps=(2, 4)),
            ),
            "experts_up": (self.experts_up, used * size(self.up[0]), tiles(**rows, **halves)),
            "experts_down": (
                self.experts_down,
                used * size(self.down[0]) + size(self.shared_down),
                tiles(**rows, **halves),
            ),
            "latent_query": (self.latent_query, size(self.kv_b) // 2, tiles(BL=(32, 64, 128), num_warps=(2, 4, 8))),
            "latent_value": (self.latent_value, size(self.kv_b) // 2, tiles(BN=(4, 8, 16, 32), num_warps=(2, 4, 8))),
        }


def tiles(**values: tuple[int, ...]) -> list[dict[str, int]]:
    return [dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())]


def size(*weights: Weight) -> int:
    parts = [part for w in weights for part in ((w.values, w.scales) if isinstance(w, QuantizedWeight) else (w,))]
    return sum(t.numel() * t.element_size() for t in parts)


def measure(tokens: int, ranks: int, kind: str, bandwidth: float, tune: bool) -> None:
    layers = [Layer(tokens, ranks, kind=kind) for _ in range(LAYERS)]
    calls = [layer.calls() for layer in layers]
    total = 0.0
    print(f"\n{tokens} tokens, {ranks} ranks, {kind}", flush=True)
    for name, (_, count, ways) in calls[0].items():
        found = []
        for way in [{}, *ways] if tune else [{}]:

            def run(i: int, name: str = name, way: dict[str, int] = way) -> object:
                return calls[i % LAYERS][name][0](**way)

            found.append((graph_time(run, 4 * LAYERS) * 1e6, way))
        default, *_ = found
        found.sort(key=lambda each: each[0])
        total += 0 if name.startswith("latent") else count
        best = "; ".join(f"{us:.1f} {' '.join(f'{k}={v}' for k, v in way.items())}" for us, way in found[:3] if tune)
        print(
            f"  {name:13s}{count / 1e6:7.1f} MB, {count / bandwidth * 1e6:6.1f} us, {default[0]:6.1f} us; {best}",
            flush=True,
        )

    def chain(_: int) -> None:
        x, residual = layers[0].x, layers[0].residual
        for layer in layers:
            x, residual = layer.run(x, residual)

    us = graph_time(chain, 3) * 1e6 / LAYERS
    floor = total / bandwidth * 1e6
    print(f"  layer in a chain: {us:.1f} us, floor {floor:.1f} us ({100 * floor / us:.0f}%)", flush=True)
    for name in ("in_proj", "o_proj") if kind == "bf16" else ():

        def product(i: int, name: str = name) -> Tensor:
            layer = layers[i % LAYERS]
            return torch.mm(layer.x if name == "in_proj" else layer.out, getattr(layer, name).t())

        print(f"  cuBLAS {name}: {graph_time(product, 4 * LAYERS) * 1e6:.1f} us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1])
    parser.add_argument("--weights", nargs="+", choices=KINDS, default=["bf16"])
    parser.add_argument("--tune", action="store_true", help="try other launch options, too")
    args = parser.parse_args()
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e12:.2f} TB/s")
    for ranks, kind, tokens in itertools.product(args.ranks, args.weights, args.tokens):
        measure(tokens, ranks, kind, bandwidth, args.tune)


if __name__ == "__main__":
    main()
