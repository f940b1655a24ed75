"""Are the answers the same however a prompt is cut into chunks? All layers of the 48B, random weights, greedy.

    python -m benchmarks.chunks --out docs/benchmarks/chunks.md

Each size of chunk is a server of its own. The router is the model's, on the weights that vLLM's dummy loader makes.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.common import CONFIG, MILLION
from benchmarks.h200.results import machine
from benchmarks.h200.runs import DUMMY, ENV, START_LIMIT
from benchmarks.load import Load
from kimi_demo.server import Server

CHUNKS = (16384, 8192)
PROMPTS = (40_000, MILLION)
TOKENS = 64
FLAGS = (
    "--dtype=bfloat16 --max-model-len=1048576 --max-num-seqs=8 --gpu-memory-utilization=0.94 "
    "--enable-prefix-caching --cudagraph-capture-sizes 1"
)

Answers = dict[int, list[int]]  # of each length of prompt


def answers(chunk: int, config: Path, flags: Sequence[str], lengths: Sequence[int], log: Path) -> Answers:
    """Of one server that reads at most `chunk` tokens a step; the same prompts for every size."""
    base = json.loads(config.read_text())
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(base))
        server = Server(folder, [*DUMMY.split(), *flags, f"--max-num-batched-tokens={chunk}"], log_path=log, env=ENV)
        try:
            server.start(timeout=START_LIMIT)
            load = Load(server.url, server.model, base["vocab_size"], seed=3)
            return {length: load.at_once([load.prompt(length)], TOKENS)[0].tokens for length in lengths}
        finally:
            server.stop()


def page(found: Mapping[int, Answers], out: Path) -> str:
    """In Markdown: of each prompt, the tokens that are the first size's, and how many different ones there are."""
    first, *others = found
    lines = [
        "# One prompt in other chunk sizes",
        "",
        f"    python -m benchmarks.chunks --out {out}",
        "",
        f"{machine()}. Greedy tokens that are those of the server with chunks of {first:,}. "
        "Random weights soon repeat a few tokens, which makes this a weak check.",
        "",
        "| prompt | chunks of | the same | different tokens in the answer |",
        "| --- | --- | --- | --- |",
    ]
    for length, answer in found[first].items():
        for chunk in others:
            same = sum(a == b for a, b in zip(answer, found[chunk][length], strict=True))
            lines.append(f"| {length:,} | {chunk:,} | {same} of {len(answer)} | {len(set(answer))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/chunks.md"), help="write the table here")
    parser.add_argument("--config", type=Path, default=CONFIG, help="another config.json, for a trial")
    parser.add_argument("--chunks", type=int, nargs="+", default=CHUNKS, help="tokens a step; the first is the measure")
    parser.add_argument("--prompts", type=int, nargs="+", default=PROMPTS, help="their lengths in tokens")
    parser.add_argument("--flags", default=FLAGS, help="of every server, in one string")
    parser.add_argument("--logs", type=Path, default=Path(".demo/chunks"), help="where the servers' logs are kept")
    args = parser.parse_args()
    args.logs.mkdir(parents=True, exist_ok=True)
    found: dict[int, Answers] = {}
    for chunk in args.chunks:
        found[chunk] = answers(chunk, args.config, args.flags.split(), args.prompts, args.logs / f"{chunk}.log")
        print(chunk, found[chunk], flush=True)
    args.out.write_text(page(found, args.out))


if __name__ == "__main__":
    main()
