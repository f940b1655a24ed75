"""Time the GPU kernels beside vLLM's and fla-core's and write docs/benchmarks/kernels.md.

    PYTHONPATH=kernels python -m bench.peers SITE_PACKAGES .gpu/peers      once, where vLLM 0.32.0 is installed
    PYTHONPATH=kernels python -m bench.kernels --out docs/benchmarks/kernels.md

Every time is the median of replays of a CUDA graph; decode and spec_decode rotate over states that exceed the
L2 cache. The file is written anew after each row, so that a run cut short leaves what it has measured.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench import cases, peers, timing
from kda_kernels import cuda, reference

CACHE = 200e6  # bytes of state to rotate over, several times the L2 cache
COMMAND = "PYTHONPATH=kernels python -m bench.kernels --out docs/benchmarks/kernels.md"
DIM = 128
Row = list[str]


def measure(run: Callable[[int], object], calls: int = 1, replays: int = 5) -> float | None:
    """Median seconds of `run`, or None, with the reason on the screen, if it cannot run."""
    try:
        return timing.graph_time(run, calls, replays)
    except Exception as error:  # a peer's limits are its own: the table says "-"
        print("cannot run:", str(error)[:300], flush=True)
        return None
    finally:
        torch.cuda.empty_cache()


def decodes(decode: Callable[[Tensor], object], tables: list[Tensor]) -> Callable[[int], object]:
    """The i-th call decodes with the i-th table of state indices."""
    return lambda i: decode(tables[i])


def each(call: Callable[[], object]) -> Callable[[int], object]:
    """The same whichever call it is."""
    return lambda _: call()


def number(x: float) -> str:
    return f"{x:.0f}" if x >= 1000 else f"{x:.3g}"


def times(ours: float, theirs: float | None) -> Row:
    return ["-", "-"] if theirs is None else [number(theirs * 1e6), f"{theirs / ours:.2f}"]


def moves(seconds: float, moved: float, bandwidth: float) -> Row:
    """us, MB, the us of a copy of as many bytes, GB/s, and its share of the copy's."""
    rate = moved / seconds
    row = [number(x) for x in (seconds * 1e6, moved / 1e6, moved / bandwidth * 1e6, rate / 1e9)]
    return [*row, f"{rate / bandwidth:.0%}"]


MOVES = "us | MB | us of a copy | GB/s | of copy"


def rotation(sequences: int, heads: int, dtype: torch.dtype, steps: int = 1) -> tuple[cases.Case, list[Tensor]]:
    """Sequences of one token and the state indices of several calls, no state in two of them while it is cached."""
    calls = int(min(max(2, CACHE / (sequences * steps * heads * DIM * DIM * dtype.itemsize)), 256))
    case = cases.make([1] * sequences * steps, heads, states=sequences * steps * calls + 1, state_dtype=dtype)
    order = [torch.randperm(sequences * steps * calls, device="cuda") for _ in range(calls)]
    return case, [(o[: sequences * steps] + 1).to(torch.int32) for o in order]


def decode(bandwidth: float) -> Iterator[tuple[str, str] | Row]:
    yield (
        "Decode, one launch\n\nMB counts the recurrent state, read and written.",
        f"sequences | heads | state | {MOVES} | vLLM us | times faster",
    )
    f32, bf16 = torch.float32, torch.bfloat16
    shapes = [(b, h, f32) for h in (32, 16, 8, 4) for b in (1, 8, 32)]
    shapes += [(b, 32, d) for d in (f32, bf16) for b in (64, 128, 256, 512)]
    for sequences, heads, dtype in shapes:
        case, tables = rotation(sequences, heads, dtype)
        ours = timing.graph_time(decodes(partial(case.decode, cuda), tables), len(tables))
        chain = peers.VllmChain(case)
        theirs = measure(decodes(chain.decode, tables), len(tables), 20)
        moved = 2 * sequences * heads * DIM * DIM * dtype.itemsize
        name = str(dtype).removeprefix("torch.")
        yield [f"{sequences}", f"{heads}", name, *moves(ours, moved, bandwidth), *times(ours, theirs)]
        del case, chain


def spec_decode(bandwidth: float) -> Iterator[tuple[str, str] | Row]:
    steps = 4
    yield (
        f"Spec decode, {steps} tokens a sequence in one launch\n\nMB counts one state read and {steps} written. "
        f"Beside it our own decode, {steps} steps of it.",
        f"sequences | heads | state | {MOVES} | decode us | times faster",
    )
    for sequences, heads, dtype in [(b, 32, torch.float32) for b in (1, 8, 32, 128)] + [(32, 32, torch.bfloat16)]:
        case, tables = rotation(sequences, heads, dtype, steps)
        bounds = torch.arange(0, sequences * steps + 1, steps, device="cuda", dtype=torch.int32)
        num_accepted_tokens = torch.randint(1, steps + 1, (sequences,), device="cuda", dtype=torch.int32)
        wide = [table.view(sequences, steps) for table in tables]

        ours = partial(_spec_decode, case, bounds, wide, num_accepted_tokens)
        single, state_indices = rotation(sequences, heads, dtype)
        plain = partial(_decode_steps, single, state_indices, steps)
        seconds, theirs = timing.graph_time(ours, len(wide)), timing.graph_time(plain, len(state_indices))
        moved = (1 + steps) * sequences * heads * DIM * DIM * dtype.itemsize
        name = str(dtype).removeprefix("torch.")
        yield [f"{sequences}", f"{heads}", name, *moves(seconds, moved, bandwidth), *times(seconds, theirs)]
        del case, single, ours, plain


def _spec_decode(case: cases.Case, bounds: Tensor, tables: list[Tensor], num_accepted_tokens: Tensor, i: int) -> None:
    case.spec_decode(cuda, bounds, tables[i], num_accepted_tokens)


def _decode_steps(case: cases.Case, tables: list[Tensor], steps: int, i: int) -> None:
    for _ in range(steps):
        case.decode(cuda, tables[i])


def prefill(bandwidth: float) -> Iterator[tuple[str, str] | Row]:
    yield (
        "Prefill\n\nMB: q, k, v, g, output gate and out, each once.",
        f"sequences | heads | {MOVES} | vLLM us | times faster | fla us | times faster",
    )
    shapes = [([8192], 32), ([512] * 16, 32), ([32768], 32), ([131072], 32), ([2048] * 64, 32)]
    for lengths, heads in [*shapes, ([131072], 8), ([131072], 4)]:
        case = cases.make(lengths, heads)
        ours = timing.graph_time(each(partial(case.prefill, cuda)), 1, 5)
        peer_times: Row = []
        for chain in (peers.VllmChain, peers.FlaChain):
            peer = chain(case)
            peer_times += times(ours, measure(each(peer.prefill)))
            del peer
        moved = sum(lengths) * heads * DIM * 12
        yield [f"{len(lengths)} x {lengths[0]}", f"{heads}", *moves(ours, moved, bandwidth), *peer_times]
        del case
        torch.cuda.empty_cache()


def mixed(bandwidth: float) -> Iterator[tuple[str, str] | Row]:
    yield (
        "Mixed step: sequences that decode and a prompt\n\nOurs in two calls, decode and prefill; vLLM's chain takes "
        "all tokens through its prefill, or, as the second pair of columns, the two apart. MB: as above, together.",
        f"sequences | heads | {MOVES} | vLLM us | times faster | vLLM apart us | times faster",
    )
    sequences, prompt, heads = 127, 2048, 32
    few, long = cases.make([1] * sequences, heads, has_initial_state=True), cases.make([prompt], heads)
    together = cases.make([1] * sequences + [prompt], heads, has_initial_state=True)

    def ours(_: int) -> None:
        few.decode(cuda, few.state_indices)
        long.prefill(cuda)

    chain, first, second = peers.VllmChain(together), peers.VllmChain(few), peers.VllmChain(long)

    def apart(_: int) -> None:
        first.decode(few.state_indices)
        second.prefill()

    seconds = timing.graph_time(ours, 1)
    moved = prompt * heads * DIM * 12 + 2 * sequences * heads * DIM * DIM * 4
    row = [f"{sequences} + 1 x {prompt}", f"{heads}", *moves(seconds, moved, bandwidth)]
    row += times(seconds, measure(each(chain.prefill)))
    yield [*row, *times(seconds, measure(apart))]


def errors(_: float) -> Iterator[tuple[str, str] | Row]:
    yield (
        "Relative error of bf16 inputs against the reference in fp64",
        "sequences | heads | out | state | vLLM out | vLLM state | fla out | fla state",
    )
    for lengths, heads in (([4096], 4), ([100] * 16, 4)):
        case = cases.make(lengths, heads)
        want = copy.deepcopy(case)
        want.inputs = type(case.inputs)(*(x.double() for x in vars(case.inputs).values()))
        want.state = type(case.state)(case.state.conv.double(), case.state.recurrent.double())
        want.out = case.out.double()
        want.prefill(reference)
        row = [f"{len(lengths)} x {lengths[0]}", f"{heads}"]
        index = case.state_indices.long()
        for chain in (None, peers.VllmChain, peers.FlaChain):
            trial = copy.deepcopy(case)
            if chain is None:
                trial.prefill(cuda)
                out = trial.out
            else:
                out = chain(trial).prefill()
            pairs = (
                (out.reshape(want.out.shape), want.out),
                (trial.state.recurrent[index], want.state.recurrent[index]),
            )
            row += [f"{float((a.double() - b).norm() / b.norm()):.2e}" for a, b in pairs]
        yield row


SECTIONS = {"decode": decode, "prefill": prefill, "mixed": mixed, "spec_decode": spec_decode, "errors": errors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further row after so long")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    peers.tune()
    peers.stand_in()
    import triton

    if {"prefill", "mixed", "errors"} & set(arguments.sections):
        peers.compile_all([32, 8, 4] if "prefill" in arguments.sections else [32])
    bandwidth = timing.copy_bandwidth()
    torch.cuda.empty_cache()
    text = f"""# GPU kernels

    {COMMAND} --sections {" ".join(arguments.sections)}

{torch.cuda.get_device_name(0)}, torch {torch.__version__}, Triton {triton.__version__}; a device-to-device copy moved
{bandwidth / 1e12:.2f} TB/s (read + written) in this run. bf16 inputs, head size {DIM}, W = 4, fp32 state unless named.
Peers, in the same run: vLLM 0.32.0's kernels chained as its KDA layer chains them, and fla-core 0.6.0, each free to
choose among its configurations. Times are medians of CUDA-graph replays; - was not run. Registers, spills and shared
memory: [compiled.md](compiled.md).
"""
    missed = Path(__file__).with_name("missed.md").read_text()  # by hand: what falls short of its target, and why
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.sections:
        rows = SECTIONS[name](bandwidth)
        title, head = next(rows)
        text += f"\n## {title}\n\n| {head} |\n|{' --- |' * len(head.split(' | '))}\n"
        print(head, flush=True)
        while time.monotonic() < deadline and (row := next(rows, None)):
            text += f"| {' | '.join(row)} |\n"
            arguments.out.write_text(f"{text}\n{missed}")
            print(*row, sep=" | ", flush=True)


if __name__ == "__main__":
    main()
