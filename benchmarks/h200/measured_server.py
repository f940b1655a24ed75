"""A server of the comparison: started with its run's flags and routers that spread tokens, and measured row by row."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks import trace
from benchmarks.common import CONFIG
from benchmarks.h200.even_routers import SAMPLE, expected
from benchmarks.h200.quantised import quantised
from benchmarks.h200.results import Results
from benchmarks.h200.rows import Rows
from benchmarks.h200.runs import DUMMY, ENV, RUNS, START_LIMIT, model_config
from benchmarks.load import Load
from kimi_demo.server import Server


class MeasuredServer:
    """One run's server, measured row by row."""

    def __init__(self, name: str, rows: list[str], args: argparse.Namespace, results: Results, folder: Path) -> None:
        self.name, self.rows, self.args, self.results = name, rows, args, results
        base = json.loads((args.config or CONFIG).read_text()) | quantised(args.weights)
        self.config = base if args.config else model_config(RUNS[name], base, args.layers)
        self.flags = [*DUMMY.split(), *args.flags.split(), *RUNS[name].flags, f"--tensor-parallel-size={args.gpus}"]
        self.stem = f"{args.layers}-{args.gpus}-{name.replace(', ', '-').replace(' ', '-')}"
        tracing = [trace.flag(args.results / self.stem)] if args.trace else []
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(self.config))
        log_path = args.results / f"{self.stem}.log"
        self.server = Server(folder, [*self.flags, *tracing], log_path=log_path, env=ENV | dict(RUNS[name].env))
        self.measured: Rows | None = None

    def start(self) -> None:
        """A server that fails must not cost the other runs: it is said, and nothing is measured on it."""
        begun = time.perf_counter()
        try:
            self.server.start(timeout=START_LIMIT)
            seconds = time.perf_counter() - begun
            flags = " ".join(self.flags) + " --profiler-config=..." * self.args.trace
            self.results.started(self.name, seconds, flags)
            spread_routers(self.server.url, self.config)
            measured = Rows(Load(self.server.url, self.server.model, self.config["vocab_size"]), self.args.scale)
            measured.warm_up()
            self.measured = measured
        except (RuntimeError, OSError, httpx.HTTPError) as error:
            print(f"{self.name}: {error}", flush=True)

    def measure(self, row: str) -> None:
        if self.measured is None or (self.server.process and self.server.process.poll() is not None):
            return
        try:
            self.results.add(self.name, row, self.measured.measure(row))
        except (RuntimeError, ValueError, OSError, httpx.HTTPError) as error:
            sentence = " ".join(f"{type(error).__name__}: {error}".split())
            self.results.add(self.name, row, {"error": sentence[:300]})

    def record(self) -> None:
        if self.args.trace and self.measured:
            trace.Recorder(self.measured.load, self.args.results / self.stem).all(self.args.scale)

    def stop(self) -> None:
        self.server.stop()


def spread_routers(url: str, config: dict[str, Any]) -> None:
    """Raises RuntimeError where the tokens of a step would choose fewer experts than chance has them choose."""
    experts, top_k = config["num_experts"], config["num_experts_per_token"]
    reply = httpx.post(f"{url}/collective_rpc", json={"method": "spread_routers", "args": [top_k]}, timeout=60)
    reply.raise_for_status()
    chosen = float(reply.json()["results"][0])
    if chosen < 0.95 * (chance := expected(experts, top_k)):
        raise RuntimeError(f"{SAMPLE} tokens choose {chosen:.0f} experts of a layer, by chance {chance:.0f}")
