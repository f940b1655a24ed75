"""Random traffic for as long as wished: nothing dies, no answer is wrong, nothing is left behind.

    python -m tests.soak --minutes 30           or `make soak`; on a GPU with --gpu

First one `vllm serve` of the small trained model with drafts, a prefix cache that is too small for what is asked,
chunks, aborts and mixed sampling: greedy answers are compared with those to the same prompts alone and with nothing
cached. Then a gateway before it, with bad replicas and hostile clients beside the same traffic. Ends with a table;
status 0 only if all of it is as it must be. One minute is a round or two of each.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

from tests.soak import engine, front
from tests.soak.asking import Tally
from tests.support.completions import Completions

SHOWN = 20  # faults
# Below this lead of a logprob two right computations may take either token. In bf16 the prompts that the model was not
# trained on are level most of the time, those that it was trained on hardly ever.
LEVEL = {"float32": 0.05, "bfloat16": 2.0}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30, help="of traffic, two thirds without a gateway (30)")
    parser.add_argument("--gpu", action="store_true", help="in bfloat16, on a GPU")
    parser.add_argument("--seed", type=int, default=0, help="of the traffic (0)")
    parser.add_argument("--no-drafts", dest="drafts", action="store_false")
    parser.add_argument("--no-prefix-caching", dest="prefix_caching", action="store_false")
    parser.add_argument("--logs", type=Path, help="the folder for the logs (default: a new one)")
    args = parser.parse_args()
    folder = args.logs or Path(tempfile.mkdtemp(prefix="kimi-soak-"))
    tally = Tally(LEVEL["bfloat16" if args.gpu else "float32"])
    server = engine.server(folder, args.gpu, args.drafts, args.prefix_caching)
    print(f"Logs: {folder}", flush=True)
    dead = ""
    found: dict[str, float] = {}
    with server:
        completions, asked = Completions(server), engine.traffic(server, args.seed, args.drafts)
        begun, seconds = time.monotonic(), 60 * args.minutes
        try:
            asyncio.run(engine.rounds(completions, asked, tally, folder, begun + seconds * 2 / 3))
            asyncio.run(front.rounds(completions, asked, tally, folder, begun + seconds))
            found = metrics(completions)
        except engine.DeadEngineError as error:
            errors = [line for line in server.log.splitlines() if "ERROR" in line]
            dead = "\n".join([f"{error}; the first errors in its log:", *errors[:40]])
    return report(tally, dead, found, args)


def metrics(completions: Completions) -> dict[str, float]:
    """What the traffic was to bring about."""
    return {
        "preemptions": completions.metric("vllm:num_preemptions_total"),
        "tokens found in the prefix cache": completions.metric("vllm:prefix_cache_hits_total"),
        "accepted drafts": completions.metric("vllm:spec_decode_num_accepted_tokens_total"),
    }


def report(tally: Tally, dead: str, found: dict[str, float], args: argparse.Namespace) -> int:
    """Print one table; 0 if every line is as it must be."""
    wanted = {
        "preemptions": True,
        "tokens found in the prefix cache": args.prefix_caching,
        "accepted drafts": args.drafts,
    }
    rows: list[tuple[str, object, str, bool]] = [
        ("dead engines", int(bool(dead)), "0", not dead),
        ("wrong greedy tokens", len(tally.wrong), "0", not tally.wrong),
        ("requests without their answer, blocks or budgets left", len(tally.faults), "0", not tally.faults),
        ("greedy tokens compared", tally.compared, "> 0", tally.compared > 0),
        *((name, found.get(name, 0), "> 0", found.get(name, 0) > 0) for name, needed in wanted.items() if needed),
        *((f"requests {name}", count, "", True) for name, count in sorted(tally.ended.items())),
        ("comparisons that ended where two tokens are level", tally.level_ends, "", True),
    ]
    print("\n".join(["", *tally.wrong[:SHOWN], *tally.faults[:SHOWN], dead]))
    print(f"{'':55} {'found':>10} {'must be':>8}")
    for name, value, must, right in rows:
        print(f"{name:55} {value:>10,} {must:>8}{'' if right else '  NO'}")
    return 0 if all(right for *_, right in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
