"""Short questions while a very long prompt is read: through the gateway, and straight to `vllm serve`.

    python -m benchmarks.gateway --out docs/benchmarks/gateway.md

serves the demo checkpoint, sends one prompt of 100,000 tokens and, while it is read, short questions at random times,
in every way of WAYS, several times each; then measures a request and a streamed token in front of a stand-in that
answers at once, straight and through the gateway. The page is written anew after each measurement; ways named with
--only are measured, or measured again, and the figures of the others are kept in --results. Other routers are measured
beside ours where --peers names their programs (`peers.py` says how they are installed).
"""

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

from benchmarks.gateway.bodies import measure_bodies
from benchmarks.gateway.overhead import measure_overhead
from benchmarks.gateway.page import page
from benchmarks.gateway.questions import ANSWER, SHORT, WAYS, question_times, served
from benchmarks.load import Load
from kimi_demo import checkpoint
from kimi_demo.server import DEFAULT_ENV

VOCAB = 1024  # of the demo checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gateway", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="where to write the page (default: print it)")
    parser.add_argument("--results", type=Path, default=Path(".demo/gateway-bench.json"), help="figures of all runs")
    parser.add_argument("--model", type=Path, default=Path(".demo/model"), help="where the checkpoint is kept")
    parser.add_argument("--runs", type=int, default=3, help="of each way")
    parser.add_argument("--only", nargs="+", choices=[*WAYS, "overhead", "bodies"], metavar="WAY", help="measure these")
    parser.add_argument("--peers", nargs="+", type=Path, default=[], help="such as ROUTER/bin/vllm-router")
    parser.add_argument("--note", default="", help="a sentence for the page, on what else the machine did")
    args = parser.parse_args()
    given = {"", *(program.name for program in args.peers)}
    for name in args.only or ():
        if name in WAYS and WAYS[name].peer not in given:
            parser.error(f"--only {name} needs {WAYS[name].peer}: give its program with --peers")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that no server is left behind
    os.environ.update({name: os.environ.get(name, value) for name, value in DEFAULT_ENV.items()})
    checkpoint.main(["--out", str(args.model)])
    results = json.loads(args.results.read_text()) if args.results.exists() else {}
    args.results.parent.mkdir(parents=True, exist_ok=True)
    command = "python -m benchmarks.gateway --out docs/benchmarks/gateway.md"

    def keep() -> None:
        args.results.write_text(json.dumps(results))
        if args.out:
            args.out.write_text(page(results, command, args.note))

    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder)
        for name in args.only or ["overhead", "bodies", *(name for name, way in WAYS.items() if way.peer in given)]:
            if name in ("overhead", "bodies"):
                results[name] = measure_overhead(logs, args.peers) if name == "overhead" else measure_bodies(logs)
                keep()
                continue
            results[name] = []
            with served(WAYS[name], args.model, logs, args.peers) as (url, replicas):
                for run in range(args.runs):
                    for replica in replicas:  # an answer means that it is idle: a long prompt left is out of its step
                        load = Load(replica, str(args.model), VOCAB, seed=100 + run)
                        load.at_once([load.prompt(SHORT)], ANSWER)
                    load = Load(url, str(args.model), VOCAB, seed=run)
                    results[name].append(asyncio.run(question_times(load, WAYS[name])))
                    keep()
    print(page(results, command, args.note))


if __name__ == "__main__":
    main()
