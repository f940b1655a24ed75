"""Where the GPU's time goes in decode steps, a prefill and random arrivals, from the traces of vLLM's own profiler.

    python -m benchmarks.trace FOLDER

prints, for every trace in a folder of `benchmarks.h200 --trace`, time by kind of kernel and the longest kernels; with
--steps also each step by itself, for those of random arrivals differ.
"""

import argparse
import gzip
import json
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from threading import Semaphore
from typing import NamedTuple

import httpx

from benchmarks.load import Load

# Kernels of the experts, and which part of a layer's one launch is: that tells steps apart.
EXPERTS = {"fused_moe_kernel": 0.5, "experts_up_kernel": 1.0}
# The first that a kernel's name matches.
KINDS = {
    "experts": r"moe|topk|expert|router",
    "latent attention": r"flash|mla|concat_and_cache|merge_attn|gather",
    "KDA": r"kda|recurrent|chunk|conv1d|l2norm|layer_norm|cumsum|solve|recompute",
    "dense products": r"linear|add_norm|gemm|gemv|cutlass|nvjet|xmma|splitk|cublas|bmm",
    "the rest": r"",
}
DECODES = ((1, 4096), (8, 4096), (32, 4096), (8, 131072))  # sequences, tokens of context
PREFILL = 32768


class Span(NamedTuple):
    """One kernel, copy or fill on the GPU; microseconds."""

    name: str
    begin: float
    length: float


def flag(folder: Path) -> str:
    """The flag of `vllm serve` that lets a client have traces written to the folder."""
    asked = {"profiler": "torch", "torch_profiler_dir": str(folder.absolute()), "torch_profiler_with_stack": False}
    return f"--profiler-config={json.dumps(asked, separators=(',', ':'))}"


class Recorder:
    """Has a server that was started with `flag(folder)` trace itself under a client's load."""

    def __init__(self, load: Load, folder: Path) -> None:
        self.load, self.folder = load, folder

    def all(self, scale: int = 1) -> None:
        """Steps of each number of sequences, a prompt, and random arrivals; `scale` divides all lengths."""
        for sequences, context in DECODES:
            self.decode(sequences, context // scale)
        self.prefill(PREFILL // scale)
        self.arrivals(2048 // scale)

    def decode(self, sequences: int, context: int) -> None:
        """Some steps in which so many sequences decode."""
        self.load.begun = Semaphore(0)
        prompts = [self.load.prompt(context) for _ in range(sequences)]
        with ThreadPoolExecutor(1) as pool:
            decoding = pool.submit(self.load.at_once, prompts, max(2000 // sequences, 500))
            for _ in prompts:
                if not self.load.begun.acquire(timeout=self.load.limit):
                    raise RuntimeError(f"not all of {sequences} prompts of {context} tokens had a token in time")
            with self.traced(f"decode-{sequences}x{context}"):
                time.sleep(0.4)
            decoding.result()

    def prefill(self, length: int) -> None:
        """One prompt of so many tokens."""
        prompt = self.load.prompt(length)
        with self.traced(f"prefill-{length}"):
            self.load.at_once([prompt], 1)

    def arrivals(self, length: int, seconds: float = 10) -> None:
        """Steps that read prompts and decode, while 16 prompts a second arrive at random, after some seconds of it."""
        prompts = [self.load.prompt(length) for _ in range(256)]
        with ThreadPoolExecutor(1) as pool:
            arriving = pool.submit(self.load.poisson, prompts, 256, rate=16)
            time.sleep(seconds)
            with self.traced(f"arrivals-{length}"):
                time.sleep(0.8)
            arriving.result()

    @contextmanager
    def traced(self, name: str) -> Iterator[None]:
        """Trace what runs meanwhile, in files whose names begin with this one."""
        before = set(self.folder.rglob("*.json*"))
        self._profiler("start")
        yield
        self._profiler("stop")
        for path in set(self.folder.rglob("*.json*")) - before:
            path.rename(path.with_name(f"{name}.{path.name}"))

    def _profiler(self, action: str) -> None:
        httpx.post(f"{self.load.url}/{action}_profile", timeout=120).raise_for_status()


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
    steps = sum(EXPERTS.get(span.name, 0) for span in spans) / layers
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


def each(spans: list[Span], layers: int) -> Iterator[str]:
    """A line for every whole step, from its first experts to the next one's, in us."""
    begins, done = [], 0.0  # done: layers of all steps so far
    for i, span in enumerate(spans):
        if span.name in EXPERTS:
            if done % layers == 0:
                begins.append(i)
            done += EXPERTS[span.name]
    yield "| step | GPU works | " + " | ".join(KINDS) + " |"
    yield "| --- " * (2 + len(KINDS)) + "|"
    for begin, end in pairwise(begins):
        step = spans[begin:end]
        parts = [sum(span.length for span in step if kind(span.name) == name) for name in KINDS]
        times = [spans[end].begin - spans[begin].begin, busy(step), *parts]
        yield "| " + " | ".join(f"{time:.0f}" for time in times) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=26, help="that have experts")
    parser.add_argument("--steps", action="store_true", help="print each step by itself, too")
    args = parser.parse_args()
    traces = sorted(args.folder.rglob("*.json*"), key=lambda path: path.stat().st_mtime)
    for path in traces:
        spans = read(path)
        if any(span.name in EXPERTS for span in spans):  # other processes leave traces without any
            print(f"## {path.relative_to(args.folder)}", "", *lines(spans, args.layers), "", sep="\n")
            if args.steps:
                print(*each(spans, args.layers), "", sep="\n")


if __name__ == "__main__":
    main()
