"""The whole server on one GPU, up to a million tokens of context: ours, vLLM's own implementation, and all attention.

    python -m benchmarks.h200 --out docs/benchmarks/h200.md

serves the 48B's config (benchmarks/config_48b.json) with random weights once for each run of RUNS, sends the
rows of the run, the most telling first, and keeps every figure as it comes: in --results, and in the table. Begun
again it goes on with what is missing or failed. No row and no start takes longer than its limit, and after --seconds
none is begun. A smaller GPU takes --layers, all else alike, or --gpus shares the model out. The routers are real, with
weights that spread tokens evenly (`even_routers.py`). --weights serves a quantised checkpoint of the same sizes.
--at-once starts all servers before the first row, and each row is measured on one after the other; --flags must leave
room for them.
"""

import argparse
import math
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.h200.measured_server import MeasuredServer
from benchmarks.h200.quantised import WEIGHTS
from benchmarks.h200.results import Results
from benchmarks.h200.runs import FLAGS, LAYERS, RUNS


def serve(names: list[str], args: argparse.Namespace, results: Results, deadline: float) -> None:
    """Start the runs' servers, beside each other, and measure every row on one after the other."""
    wanted = {name: [row for row in RUNS[name].rows if not args.rows or row in args.rows] for name in names}
    missing = {name: rows for name in names if (rows := results.missing(name, wanted[name]))}
    with tempfile.TemporaryDirectory() as folder:
        servers = [
            MeasuredServer(name, rows, args, results, Path(folder) / str(number))
            for number, (name, rows) in enumerate(missing.items())
        ]
        try:
            with ThreadPoolExecutor() as pool:
                list(pool.map(MeasuredServer.start, servers))
            for row in dict.fromkeys(row for rows in missing.values() for row in rows):
                for server in servers:
                    if row in server.rows and time.monotonic() < deadline:
                        server.measure(row)
            for server in servers:
                server.record()
        finally:
            for server in servers:
                server.stop()


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
    parser.add_argument("--at-once", action="store_true", help="start all servers at once, where the GPU holds them")
    parser.add_argument("--flags", default=FLAGS, help="of every server, in one string")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    args.results /= args.weights
    args.results.mkdir(parents=True, exist_ok=True)
    results = Results(args.results, args.layers, args.gpus, args.out, args.note, args.weights)
    for names in [args.only] if args.at_once else [[name] for name in args.only]:
        if time.monotonic() < deadline:
            serve(names, args, results, deadline)
    results.save()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
