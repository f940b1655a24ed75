"""The whole server on one GPU, up to a million tokens of context: ours, vLLM's own implementation, and all attention.

    python -m benchmarks.h200 --out docs/benchmarks/h200.md

serves the 48B's config (benchmarks/config_48b.json) with random weights once for each run of RUNS, sends the
rows of the run, the most telling first, and keeps every figure as it comes: in --results, and in the table. Begun
again it goes on with what is missing or failed. No row and no start takes longer than its limit, and after --seconds
none is begun. A smaller GPU takes --layers, all else alike, or --gpus shares the model out. The routers are real, with
weights that spread tokens evenly (`even_routers.py`). --weights serves a quantised checkpoint of the same sizes.
"""

import argparse
import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks import trace
from benchmarks.common import CONFIG
from benchmarks.h200.even_routers import SAMPLE, expected
from benchmarks.h200.quantised import WEIGHTS, quantised
from benchmarks.h200.results import Results
from benchmarks.h200.rows import Rows
from benchmarks.h200.runs import DUMMY, ENV, FLAGS, LAYERS, RUNS, START_LIMIT, model_config
from benchmarks.load import Load
from kimi_demo.server import Server


def serve(name: str, args: argparse.Namespace, results: Results, deadline: float) -> None:
    """Start the run's server, unless nothing of it is missing, and measure its rows."""
    run = RUNS[name]
    rows = results.missing(name, [row for row in run.rows if not args.rows or row in args.rows])
    if not rows:
        return
    base = json.loads((args.config or CONFIG).read_text()) | quantised(args.weights)
    config = base if args.config else model_config(run, base, args.layers)
    flags = [*DUMMY.split(), *args.flags.split(), *run.flags, f"--tensor-parallel-size={args.gpus}"]
    stem = f"{args.layers}-{args.gpus}-{name.replace(', ', '-').replace(' ', '-')}"
    tracing = [trace.flag(args.results / stem)] if args.trace else []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        server = Server(folder, [*flags, *tracing], log_path=args.results / f"{stem}.log", env=ENV | dict(run.env))
        begun = time.perf_counter()
        try:
            server.start(timeout=START_LIMIT)
            results.started(name, time.perf_counter() - begun, " ".join(flags) + " --profiler-config=..." * args.trace)
            spread_routers(server.url, config)
            measured = Rows(Load(server.url, server.model, config["vocab_size"]), args.scale)
            measured.warm_up()
            for row in rows:
                if time.monotonic() > deadline or (server.process and server.process.poll() is not None):
                    return
                try:
                    results.add(name, row, measured.measure(row))
                except (RuntimeError, ValueError, OSError, httpx.HTTPError) as error:
                    sentence = " ".join(f"{type(error).__name__}: {error}".split())
                    results.add(name, row, {"error": sentence[:300]})
            if args.trace:
                trace.Recorder(measured.load, args.results / stem).all(args.scale)
        finally:
            server.stop()


def spread_routers(url: str, config: dict[str, Any]) -> None:
    """Raises RuntimeError where the tokens of a step would choose fewer experts than chance has them choose."""
    experts, top_k = config["num_experts"], config["num_experts_per_token"]
    reply = httpx.post(f"{url}/collective_rpc", json={"method": "spread_routers", "args": [top_k]}, timeout=60)
    reply.raise_for_status()
    chosen = float(reply.json()["results"][0])
    if chosen < 0.95 * (chance := expected(experts, top_k)):
        raise RuntimeError(f"{SAMPLE} tokens choose {chosen:.0f} experts of a layer, by chance {chance:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.h200", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the table here")
    parser.add_argument("--note", default="", help="what to know of the run, for the table's page")
    parser.add_argument("--results", type=Path, default=Path(".demo/h200"), help="where figures and logs are kept")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=[*RUNS], help="the runs to run now")
    parser.add_argument("--rows", nargs="+", help="of their rows, only these")
    parser.add_argument("--layers", type=int, default=LAYERS, help="the first so many layers, for a smaller GPU")
    parser.add_argument("--gpus", type=int, default=1, help="that share each server's model (tensor parallel)")
    parser.add_argument("--trace", action="store_true", help="and record traces, for benchmarks.trace to read")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing after so many")
    parser.add_argument("--scale", type=int, default=1, help="divide all lengths, for a trial")
    parser.add_argument("--config", type=Path, help="another config.json, for a trial")
    parser.add_argument("--weights", choices=WEIGHTS, default="bf16", help="how the checkpoint stores them")
    parser.add_argument("--flags", default=FLAGS, help="of every server, in one string")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    args.results /= args.weights
    args.results.mkdir(parents=True, exist_ok=True)
    results = Results(args.results, args.layers, args.gpus, args.out, args.note)
    for name in args.only:
        if time.monotonic() > deadline:
            break
        try:
            serve(name, args, results, deadline)
        except (RuntimeError, OSError, httpx.HTTPError) as error:  # a server that fails must not cost the other runs
            print(f"{name}: {error}", flush=True)
    results.save()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
