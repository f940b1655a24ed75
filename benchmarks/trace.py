"""Where the GPU's time goes in a decode step and in a prefill, from the traces of vLLM's own profiler.

    python -m benchmarks.trace FOLDER

prints, for every trace in a folder of `benchmarks.h200 --trace`, time by kind of kernel and the longest kernels.
"""

import argparse
import gzip
import json
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import httpx

from benchmarks.load import Load

# The first that a kernel's name matches. Experts are two launches of this kernel a layer, which tells steps apart.
EXPERTS = "fused_moe_kernel"
KINDS = {
    "experts": rf"{EXPERTS}|moe|topk|expert",
    "latent attention": r"flash|mla|concat_and_cache|merge_attn|gather",
    "KDA": r"^_?(decode|verify|prepare|intra|states|output|table|combine)(_kernel)?$"
    r"|recurrent|chunk|conv1d|kda|l2norm|layer_norm|cumsum|solve|recompute",
    "dense products": r"gemm|gemv|cutlass|nvjet|xmma|splitk|cublas|bmm",
    "the rest": r"",
}


class Span(NamedTuple):
    """One kernel, copy or fill on the GPU; microseconds."""

    name: str
    begin: float
    length: float


def flag(folder: Path) -> str:
    """The flag of `vllm serve` that lets a client have traces written to the folder."""
    asked = {"profiler": "torch", "torch_profiler_dir": str(folder.absolute()), "torch_profiler_with_stack": False}
    return f"--profiler-config={json.dumps(asked, separators=(',', ':'))}"


def record(load: Load, batches: Sequence[int] = (1, 32), context: int = 4096, prefill: int = 32768) -> None:
    """A trace of decoding each number of sequences for some time, and one of reading a prompt of `prefill` tokens."""

    def profile(action: str) -> None:
        httpx.post(f"{load.url}/{action}_profile", timeout=120).raise_for_status()

    for sequences in batches:
        prompts = [load.prompt(context) for _ in range(sequences)]
        decoding = Thread(target=load.at_once, args=(prompts, max(2000 // sequences, 400)))
        decoding.start()
        time.sleep(3)  # by then all prompts are read
        profile("start")
        time.sleep(0.4)
        profile("stop")
        decoding.join()
    prompt = load.prompt(prefill)
    profile("start")
    load.at_once([prompt], 1)
    profile("stop")


def read(path: Path) -> list[Span]:
    """What ran on the GPU, in order."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt") as file:
        events = json.load(file).get("traceEvents", [])
    on_gpu = ("kernel", "gpu_memcpy", "gpu_memset")
    found = [Span(e["name"], e["ts"], e["dur"]) for e in events if e.get("cat") in on_gpu]
    return sorted(found, key=lambda span: span.begin)


def busy(spans: Iterable[Span]) -> float:
    """Microseconds during which anything ran."""
    total, until = 0.0, 0.0
    for span in spans:
        end = span.begin + span.length
        total += max(end - max(span.begin, until), 0.0)
        until = max(until, end)
    return total


def kind(name: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE))


def lines(spans: list[Span], layers: int) -> Iterator[str]:
    """The table of one trace of a model with so many layers of experts, times a step."""
    steps = sum(span.name == EXPERTS for span in spans) / (2 * layers)
    whole = spans[-1].begin + spans[-1].length - spans[0].begin
    yield f"{steps:.1f} steps of {whole / steps:.0f} us, of which the GPU works {busy(spans) / steps:.0f}."
    yield ""
    yield "| kernel | launches a step | us a step | share |"
    yield "| --- | --- | --- | --- |"
    by_kind, by_name = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    for span in spans:
        by_kind[kind(span.name)].append(span.length)
        by_name[span.name[:60]].append(span.length)
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:12]
    for name, lengths in [*((f"**{name}**", by_kind[name]) for name in KINDS), *longest]:
        shown = name.replace("|", "/")
        yield f"| {shown} | {len(lengths) / steps:.1f} | {sum(lengths) / steps:.0f} | {sum(lengths) / whole:.0%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=26, help="that have experts")
    args = parser.parse_args()
    traces = sorted(args.folder.rglob("*.json*"), key=lambda path: path.stat().st_mtime)
    for path in traces:
        spans = read(path)
        if any(span.name == EXPERTS for span in spans):  # other processes leave traces without any
            print(f"## {path.relative_to(args.folder)}", "", *lines(spans, args.layers), "", sep="\n")


if __name__ == "__main__":
    main()
