"""Speed on a CPU: ours through vLLM's engine against transformers, one run, medians, as shares of the floor.

    python -m benchmarks.cpu [--out docs/benchmarks/cpu.md] [--llama-bench PATH --gguf FILE]

The checkpoint has the layer sizes of the 48B in 4 layers and 16 experts (723 M parameters, random weights);
it is written to --model once. Every engine runs in a process of its own, one after another; run nothing else. What
is measured is kept in --results: begun again it goes on with what is missing.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.cpu.decode_profile import measure_profile
from benchmarks.cpu.engines import WEIGHTS, measure_llama, measure_narrow, measure_ours, measure_transformers
from benchmarks.cpu.floor import BYTES, measure_floor
from benchmarks.cpu.page import table
from benchmarks.cpu.rows import DECODES, sizes_of
from benchmarks.cpu.start import measure_start
from kimi_demo.checkpoint import write_checkpoint
from kimi_demo.server import DEFAULT_ENV


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path(".demo/bench"), help="where the checkpoint is kept")
    parser.add_argument("--out", type=Path, help="write the table here instead of printing it")
    parser.add_argument("--results", type=Path, default=Path(".demo/cpu.json"), help="where figures are kept")
    parser.add_argument("--llama-bench", type=Path, help="llama.cpp's llama-bench, for a third column")
    parser.add_argument("--gguf", type=Path, help="the same checkpoint converted for llama.cpp, bf16")
    parser.add_argument("--only", nargs="+", help=argparse.SUPPRESS)  # the child processes
    args = parser.parse_args()
    small = args.model.parent / "model"
    if args.only:
        what, *rest = args.only
        measures: dict[str, Callable[..., dict[str, float]]] = {
            "floor": measure_floor,
            "ours": lambda dtype: measure_ours(args.model, dtype),
            "narrow": lambda weights: measure_narrow(args.model, weights),
            "transformers": lambda dtype: measure_transformers(args.model, dtype),
            "start": lambda: measure_start(small),
            "profile": lambda sequences: measure_profile(args.model, int(sequences)),
        }
        print(json.dumps(measures[what](*rest)))
        return
    if not (args.model / "config.json").exists():
        write_checkpoint(args.model, "bench")
    if not (small / "config.json").exists():
        write_checkpoint(small)
    results = json.loads(args.results.read_text()) if args.results.exists() else {}
    jobs = ["floor", "start", *(f"profile {sequences}" for sequences in DECODES)]
    jobs += [f"{who} {dtype}" for dtype in BYTES for who in ("ours", "transformers")]
    jobs += [f"narrow {weights}" for weights in WEIGHTS]
    # Imports without bytecode take twice as long, here as with `make`.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    for job in [job for job in jobs if job not in results]:
        print(f"{job} ...", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "benchmarks.cpu", "--model", str(args.model), "--only", *job.split()]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=DEFAULT_ENV | env)
        # vLLM logs to standard output, also after the result.
        results[job] = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
        print(f"  {results[job]}", file=sys.stderr, flush=True)
        args.results.write_text(json.dumps(results))
    if args.llama_bench and args.gguf:
        results["llama.cpp"] = measure_llama(args.llama_bench, args.gguf)
    text = table(results, sizes_of(args.model), " ".join(["python -m benchmarks.cpu", *sys.argv[1:]]))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
