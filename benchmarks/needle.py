"""How well the small trained model answers through `vllm serve`, by length, by depth and by kind of question.

    python -m benchmarks.needle --out docs/benchmarks/needle.md

Each log is asked about many times, so that all but the first question find it in the prefix cache. An answer is right
if its text is. Rows are kept in --results and written as they come; --ways and --lengths measure only some.
"""

import argparse
import asyncio
import json
import random
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI

from benchmarks import heat_map
from benchmarks.common import K
from examples.demo_model.conversations import KINDS, Asker, Log, Question, make_log
from kimi_demo.server import Server

MODEL = Path("examples/demo_model/checkpoint")
DEPTHS = tuple(n / 10 for n in range(10))
MARGIN = 64  # tokens that a question and the template add
CACHE = "4G"
PATIENCE = {"VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT": "300"}  # s; on a busy machine vLLM's 30 ran out at a million tokens


@dataclass(frozen=True)
class Way:
    """A way to serve the model; its name begins with the way that its answers are compared with."""

    flags: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    lengths: tuple[int, ...] = (4 * K,)


PLAIN = "fp32"
TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "OMP_NUM_THREADS": "1"}
WAYS = {
    PLAIN: Way(("--dtype=float32",), lengths=(K, 4 * K, 16 * K, 64 * K, 128 * K)),
    "fp32, nothing cached": Way(("--dtype=float32", "--no-enable-prefix-caching")),
    "fp32, chunks of 256": Way(("--dtype=float32", "--max-num-batched-tokens=256")),
    "fp32, two ranks": Way(("--dtype=float32", "--tensor-parallel-size=2"), TWO_RANKS),
    "bf16": Way(("--dtype=bfloat16",), lengths=(4 * K, 16 * K)),
}
GPU_LENGTHS = (K, 4 * K, 16 * K, 64 * K, 128 * K, 1000 * K)
GPU_FLAGS = ("--dtype=bfloat16", "--gpu-memory-utilization=0.1")  # --cache says what it takes; this must only be free
GPU_WAYS = {
    "bf16 on a GPU": Way(GPU_FLAGS, lengths=GPU_LENGTHS),
    "bf16 on a GPU, nothing cached": Way((*GPU_FLAGS, "--no-enable-prefix-caching"), lengths=(4 * K, 16 * K)),
    "bf16 on a GPU, chunks of 256": Way((*GPU_FLAGS, "--max-num-batched-tokens=256"), lengths=GPU_LENGTHS),
    "bf16 on a GPU, state in bf16": Way((*GPU_FLAGS, "--mamba-ssm-cache-dtype=bfloat16"), lengths=GPU_LENGTHS),
}


def questions(length: int, logs: int, each: int, seed: int = 1) -> list[tuple[Log, list[Question]]]:
    """Logs of about `length` tokens; `each` questions at each depth and of each other kind about every one of them."""
    rng = random.Random(seed + length)
    asked = []
    for _ in range(logs):
        log = make_log(rng, length - MARGIN)
        asker = Asker(log, rng)
        some = [asker.at_depth(depth + rng.random() / 10) for depth in DEPTHS for _ in range(each)]
        some += [asker.ask(kind) for kind in KINDS if kind != "find" for _ in range(each)]
        asked.append((log, some))
    return asked


class Reader:
    """A client that asks about one log after another, `at_once` questions at a time."""

    def __init__(self, server: Server, at_once: int) -> None:
        self.server = server
        self.client = AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=3600, max_retries=0)
        self.turn = asyncio.Semaphore(at_once)

    async def ask(self, log: Log, question: Question) -> str:
        async with self.turn:
            reply = await self.client.chat.completions.create(
                model=self.server.model,
                messages=[{"role": "user", "content": log.text + question.text}],
                temperature=0,
                max_tokens=64,
            )
        return reply.choices[0].message.content or ""

    async def ask_all(self, asked: list[tuple[Log, list[Question]]]) -> list[str]:
        answers: list[str] = []
        for log, some in asked:
            first = await self.ask(log, some[0])
            answers += [first, *await asyncio.gather(*(self.ask(log, question) for question in some[1:]))]
        return answers


def measure(server: Server, length: int, logs: int, each: int, at_once: int) -> dict[str, Any]:
    """Right and asked, by kind and, of `find`, by depth; and the answers, for comparison with another way."""
    asked = questions(length, logs, each)

    async def all_of_them() -> list[str]:
        reader = Reader(server, at_once)
        async with reader.client:
            return await reader.ask_all(asked)

    answers = asyncio.run(all_of_them())
    return {"logs": logs, "counts": count(asked, answers), "answers": answers}


def count(asked: list[tuple[Log, list[Question]]], answers: list[str]) -> dict[str, list[int]]:
    """[right, asked] of each kind and, of `find`, of each tenth of the log."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for question, answer in zip([q for _, some in asked for q in some], answers, strict=True):
        right = answer == question.answer
        keys = [question.kind, *([f"depth {int(question.depth * 10)}"] if question.kind == "find" else [])]
        for key in keys:
            counts[key][0] += right
            counts[key][1] += 1
    return dict(counts)


def serve(name: str, way: Way, args: argparse.Namespace, results: dict[str, Any]) -> None:
    flags = [f"--max-model-len={max(way.lengths) + K}", f"--kv-cache-memory-bytes={args.cache}", *way.flags]
    if not any("batched-tokens" in flag for flag in flags):
        flags.append("--max-num-batched-tokens=4096")
    log_path = args.results / f"{name.replace(', ', '-').replace(' ', '-')}.log"
    with Server(args.model, flags, log_path=log_path, env=PATIENCE | way.env) as server:
        for length in args.lengths or way.lengths:
            if length in way.lengths:
                logs, each = (args.logs, args.each) if length <= 16 * K else (args.long_logs, args.each)
                results.setdefault(name, {})[str(length)] = measure(server, length, logs, each, args.at_once)
                save(args, results)
                counts = results[name][str(length)]["counts"]
                print(name, length, {k: v for k, v in counts.items() if k in KINDS}, flush=True)


def save(args: argparse.Namespace, results: dict[str, Any]) -> None:
    (args.results / "needle.json").write_text(json.dumps(results))
    if args.out:
        args.out.write_text(page(results, args.out))


def page(results: dict[str, Any], out: Path) -> str:
    lines = [
        "# Answers of the small trained model",
        "",
        "    python -m benchmarks.needle --out docs/benchmarks/needle.md",
        "",
        "Right answers of those asked, through `vllm serve` and the chat template, greedy. The model was trained on",
        "conversations of up to 32,768 tokens. `differ`: how many answers are not those that the plain server, or for",
        f"bf16 the one of {PLAIN}, gives to the same questions. Where fewer were asked,",
        "`--logs`, `--long-logs` and `--each` said so; rows of a GPU are from `--gpu`.",
        "",
    ]
    lines += ["| served | tokens | logs | " + " | ".join(KINDS) + " | differ |", "| --- " * (len(KINDS) + 4) + "|"]
    for name, by_length in results.items():
        for length, found in sorted(by_length.items(), key=lambda item: int(item[0])):
            cells = [_share(found["counts"].get(kind)) for kind in KINDS]
            base, _, change = name.partition(",")
            plain = results.get(base if change else PLAIN, {}).get(length, {}).get("answers")
            differ = "-"
            if name != PLAIN and plain and found["answers"]:  # of the logs that both were asked about
                differ = str(sum(a != b for a, b in zip(plain, found["answers"], strict=False)))
            lines.append(f"| {name} | {int(length):,} | {found['logs']} | {' | '.join(cells)} | {differ} |")
    for name, by_length in results.items():
        if sum("depth 0" in found["counts"] for found in by_length.values()) > 2:
            picture = out.with_name(f"needle-{name.replace(', ', '-').replace(' ', '-')}.svg")
            shares = {
                f"{int(length):,}": [_ratio(found["counts"].get(f"depth {n}")) for n in range(len(DEPTHS))]
                for length, found in sorted(by_length.items(), key=lambda item: int(item[0]))
            }
            picture.write_text(heat_map.svg(shares, rows=[f"{n * 10}%" for n in range(len(DEPTHS))]))
            lines += ["", f"`find` by length and depth, {name}:", "", f"![Right answers]({picture.name})"]
    return "\n".join(lines) + "\n"


def _ratio(count: list[int] | None) -> float | None:
    return count[0] / count[1] if count else None


def _share(count: list[int] | None) -> str:
    return f"{count[0]} of {count[1]}" if count else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--results", type=Path, default=Path(".demo/needle"))
    parser.add_argument("--gpu", action="store_true", help="the ways of a GPU in place of a CPU's")
    parser.add_argument("--ways", nargs="+", help="only these")
    parser.add_argument("--lengths", type=int, nargs="+", help="only these of a way's")
    parser.add_argument("--logs", type=int, default=10, help="logs of each length up to 16K")
    parser.add_argument("--long-logs", type=int, default=2, help="logs of each longer length")
    parser.add_argument("--each", type=int, default=20, help="questions at each depth and of each kind, of each log")
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--cache", default=CACHE, help="bytes of the key-value cache")
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    kept = args.results / "needle.json"
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    for name, way in (GPU_WAYS if args.gpu else WAYS).items():
        if not args.ways or name in args.ways:
            serve(name, way, args, results)
    save(args, results)


if __name__ == "__main__":
    main()
