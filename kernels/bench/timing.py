"""Times from replays of a CUDA graph: no launch cost of the host's, medians over replays."""

import statistics
from collections.abc import Callable

import torch


def graph_time(run: Callable[[int], object], calls: int, replays: int = 20) -> float:
    """Median seconds of one run(i), over `replays` replays of a graph of run(0) .. run(calls-1)."""
    for i in range(min(calls, 3)):
        run(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            run(i)
    for _ in range(2):
        graph.replay()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
    for before, after in events:
        before.record()
        graph.replay()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in events) / calls * 1e-3


def copy_bandwidth(bytes_each: int = 4 << 30) -> float:
    """Bytes a second, read and written, of a device-to-device copy of random data: the best of two kernels."""
    source = torch.randint(0, 1 << 30, (bytes_each // 4,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    ways = (lambda _: target.copy_(source), lambda _: torch.bitwise_not(source, out=target))
    return max(2 * bytes_each / graph_time(way, calls=2, replays=5) for way in ways)


def floating_rate(size: int = 8192) -> float:
    """Floating-point operations a second of a square bf16 product of random data."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    return 2 * size**3 / graph_time(lambda _: torch.mm(a, b, out=c), calls=4)
