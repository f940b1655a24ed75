"""Short questions while a very long prompt is read: through the gateway, and straight to `vllm serve`.

    python -m benchmarks.gateway --out docs/benchmarks/gateway.md

serves the demo checkpoint, sends one prompt of 100,000 tokens and, while it is read, short questions at random times,
in every way of WAYS, several times each; then measures what the gateway adds to a request and to a streamed token,
in front of a stand-in that answers at once. The page is written anew after each measurement; ways named with --only
are measured, or measured again, and the figures of the others are kept in --results.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx

from benchmarks.load import Load, percentile
from kimi_demo import checkpoint
from kimi_demo.server import DEFAULT_ENV, Server, free_port

VOCAB = 1024  # of the demo checkpoint
FLAGS = ("--dtype=float32", "--max-model-len=131072", "--kv-cache-memory-bytes=1G", "--max-num-batched-tokens=2048")
THRESHOLD = ("--long-prefill-token-threshold=512",)
SHORT, ANSWER = 200, 4  # tokens of a question and of its answer
QUESTIONS, RATE = 64, 1.0  # of one run, and how many come a second
CONSOLE = "import sys; from kimi_server.cli import main; sys.exit(main())"


@dataclass(frozen=True)
class Way:
    """How the questions reach a model. `gateway`: the `admission` of its configuration; None for none at all."""

    name: str
    flags: tuple[str, ...] = ()
    replicas: int = 1
    gateway: dict[str, int] | None = None
    longs: int = 1
    length: int = 100_000  # tokens of each long prompt

    @property
    def title(self) -> str:
        return f"{self.longs} x {self.length:,} tokens" if self.longs > 1 else f"one of {self.length:,} tokens"


ONE_AT_A_TIME = {"prefill_tokens": 36864, "short_reserve": 16384}
WAYS = {
    "bare": Way("`vllm serve`"),
    "flag": Way("`vllm serve`, threshold 512", THRESHOLD),
    "gateway": Way("gateway, 2 replicas", (), 2, {}),
    "gateway-flag": Way("gateway, 2 replicas, threshold 512", THRESHOLD, 2, {}),
    "several-flag": Way("`vllm serve`, threshold 512", THRESHOLD, longs=6, length=20_000),
    "several-gateway": Way("gateway, 1 replica, threshold 512", THRESHOLD, 1, ONE_AT_A_TIME, 6, 20_000),
}


@contextlib.contextmanager
def gateway(urls: list[str], admission: dict[str, int], logs: Path) -> Iterator[str]:
    """A gateway in front of these replicas; its URL."""
    port = free_port()
    config = logs / "gateway.yaml"
    replicas = [{"url": url} for url in urls]
    settings = {"port": port, "metrics_port": free_port(), "replicas": replicas, "admission": admission}
    config.write_text(json.dumps(settings))
    with (logs / "gateway.log").open("ab") as log:
        command = [sys.executable, "-c", CONSOLE, "gateway", "--config", str(config)]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait_for(f"http://127.0.0.1:{port}/readyz", process)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(90)


def wait_for(url: str, process: subprocess.Popen, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, trust_env=False).status_code == 200:
                return
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"{url} does not answer: see the log beside the configuration")
        time.sleep(0.1)


@contextlib.contextmanager
def served(way: Way, model: Path, logs: Path) -> Iterator[tuple[str, list[str]]]:
    """The servers of a way: the URL to ask, and those of the replicas."""
    with contextlib.ExitStack() as stack:
        env = {"OMP_NUM_THREADS": "1"}
        servers = [
            stack.enter_context(Server(model, (*FLAGS, *way.flags), log_path=logs / f"vllm-{number}.log", env=env))
            for number in range(way.replicas)
        ]
        urls = [server.url for server in servers]
        yield (urls[0] if way.gateway is None else stack.enter_context(gateway(urls, way.gateway, logs))), urls


async def question_times(load: Load, way: Way) -> dict[str, Any]:
    """One run: seconds to the first token of every question, and of the long prompts (None if still being read)."""
    async with load.connect() as client:
        longs = [asyncio.create_task(load.ask(client, load.prompt(way.length), 1)) for _ in range(way.longs)]
        await asyncio.sleep(3)
        questions = []
        for _ in range(QUESTIONS):
            questions.append(asyncio.create_task(load.ask(client, load.prompt(SHORT), ANSWER)))
            await asyncio.sleep(load.random.expovariate(RATE))
        reading = sum(not long.done() for long in longs)
        times = [reply.ttft for reply in await asyncio.gather(*questions)]
        done = [long.result().ttft for long in longs if long.done()]
        for long in longs:
            long.cancel()
        await asyncio.gather(*longs, return_exceptions=True)
    if not reading:
        raise RuntimeError("the long prompt was read before the last question came: make it longer")
    return {"questions": times, "long": done}


# What the gateway adds, measured in front of a stand-in: an application that stamps the events of its streams.


async def stand_in(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answers /health and streams as many events as the body's max_tokens says, each with the time it was sent."""
    if scope["type"] != "http":
        while True:
            kind = (await receive())["type"]
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    asked = json.loads(body) if 0 < len(body) < 65536 else {}  # a large one would hold up its own streams
    form = b"text/event-stream" if asked.get("stream") else b"application/json"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", form)]})
    for _ in range(asked["max_tokens"] if asked.get("stream") else 0):
        event = b'data: {"choices":[{"index":0,"delta":{"content":"word"}}],"sent":%.7f}\n\n' % time.monotonic()
        await send({"type": "http.response.body", "body": event, "more_body": True})
        await asyncio.sleep(0.005)
    await send({"type": "http.response.body", "body": b'{"data":[{"id":"x","max_model_len":9}]}', "more_body": False})


async def overhead(url: str) -> dict[str, list[float]]:
    """Seconds of whole requests, and from the sending of a streamed event to its arrival."""
    chat = {"model": "x", "messages": [{"role": "user", "content": "word " * 200}], "max_tokens": 400}
    requests, events = [], []
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=60) as client:
        for number in range(1100):
            begun = time.perf_counter()
            (await client.post("/v1/chat/completions", json=chat)).raise_for_status()
            if number >= 100:
                requests.append(time.perf_counter() - begun)
        for number in range(6):
            async with client.stream("POST", "/v1/chat/completions", json=chat | {"stream": True}) as reply:
                async for line in arrivals(reply):
                    if number:
                        events.append(time.monotonic() - json.loads(line)["sent"])
    return {"request": requests, "event": events}


async def arrivals(reply: httpx.Response) -> AsyncIterator[str]:
    async for line in reply.aiter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")


@contextlib.contextmanager
def standing_in() -> Iterator[str]:
    port = free_port()
    stop = "timeout_graceful_shutdown=1"  # streams whose reader left
    script = f"import uvicorn; uvicorn.run('benchmarks.gateway:stand_in', port={port}, log_level='critical', {stop})"
    process = subprocess.Popen([sys.executable, "-c", script])
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def measure_overhead(logs: Path) -> dict[str, dict[str, list[float]]]:
    with standing_in() as url, gateway([url], {}, logs) as through:
        return {"bare": asyncio.run(overhead(url)), "gateway": asyncio.run(overhead(through))}


# What large bodies do to the streams of others.

LARGE = {8: 4, 64: 2}  # MiB: how many at once
ALONE = 400  # events of the stream before those come
PIECES = {"objects": b"{}", "texts": b'""', "numbers": b"1234567"}


def post(url: str, body: bytes) -> float:
    begun = time.monotonic()
    httpx.post(f"{url}/v1/chat/completions", content=body, trust_env=False, timeout=300).raise_for_status()
    return time.monotonic() - begun


async def ways_beside(url: str, body: bytes, count: int) -> dict[str, Any]:
    """The longest way of a stream's event in seconds, alone and beside bodies, and until the last of those is answered.

    Events are sent 5 ms apart, so where one takes longer this is the gap in the stream.
    """
    chat = {"model": "x", "messages": [], "max_tokens": 1 << 20, "stream": True}
    loop, ways = asyncio.get_running_loop(), list[float]()
    with ProcessPoolExecutor(count) as senders:
        async with (
            httpx.AsyncClient(base_url=url, trust_env=False, timeout=300) as client,
            client.stream("POST", "/v1/chat/completions", json=chat) as reply,
        ):
            posts: asyncio.Future[list[float]] | None = None
            async for line in arrivals(reply):
                ways.append(time.monotonic() - json.loads(line)["sent"])
                if len(ways) == ALONE:
                    posts = asyncio.gather(*(loop.run_in_executor(senders, post, url, body) for _ in range(count)))
                elif posts and posts.done():
                    return {"alone": max(ways[:ALONE]), "way": max(ways[ALONE:]), "answered": max(posts.result())}
    raise RuntimeError("the stream ended before the bodies were answered")


def measure_bodies(logs: Path) -> list[dict[str, Any]]:
    found = []
    with standing_in() as url:
        for size, count in LARGE.items():
            for kind, piece in PIECES.items():
                body = b'{"messages":[' + b",".join([piece] * ((size << 20) // (len(piece) + 1))) + b"]}"
                with gateway([url], {}, logs) as through:
                    rows = asyncio.run(ways_beside(through, body, count))
                    found.append({"size": size, "count": count, "kind": kind, **rows})
    return found


def page(results: dict[str, Any], command: str, note: str) -> str:
    found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    lines = [
        "# Short questions beside a very long prompt",
        "",
        f"    {command}",
        "",
        f"{found.group(1) if found else platform.machine()}, {os.cpu_count()} cores, {date.today()}, vllm "
        f"{metadata.version('vllm')}. The demo checkpoint, one thread a replica, `{' '.join(FLAGS)}`. A question has "
        f"{SHORT} tokens and an answer of {ANSWER}; {QUESTIONS} come at random times, {RATE:g} a second, while the "
        "long prompts are read. Seconds to the first token of a question, p50 / p95 of each run.",
        *([note] if note else []),
        "",
        "| long prompts | way | runs | p50 / p95 of each run | first long prompt done after |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, way in WAYS.items():
        runs = results.get(name)
        if not runs:
            continue
        cells = [f"{percentile(r['questions'], 0.5):.3f} / {percentile(r['questions'], 0.95):.3f}" for r in runs]
        done = [min(r["long"]) for r in runs if r["long"]]
        last = f"{statistics.median(done):.0f} s" if done else "after the last question"
        lines.append(f"| {way.title} | {way.name} | {len(runs)} | {', '.join(cells)} | {last} |")
    if measured := results.get("overhead"):
        lines += [
            "",
            "What the gateway adds, in front of a stand-in that answers at once; milliseconds, p50 / p99:",
            "",
            "| | straight | through the gateway | p50 more |",
            "| --- | --- | --- | --- |",
        ]
        for what, title in (("request", "a whole request"), ("event", "a streamed token, from sent to received")):
            bare, through = (measured[way][what] for way in ("bare", "gateway"))
            more = 1e3 * (percentile(through, 0.5) - percentile(bare, 0.5))
            cells = [f"{1e3 * percentile(v, 0.5):.2f} / {1e3 * percentile(v, 0.99):.2f}" for v in (bare, through)]
            lines.append(f"| {title} ({len(through)}) | {cells[0]} | {cells[1]} | {more:.2f} |")
    if measured := results.get("bodies"):
        lines += [
            "",
            "A stream beside large bodies that come at once, in front of the same stand-in; senders share the machine:",
            "",
            "| bodies | of | longest way of a streamed token | before they came | last body answered after |",
            "| --- | --- | --- | --- | --- |",
        ]
        for row in measured:
            size = f"{row['count']} x {row['size']} MiB"
            ways = " | ".join(f"{1e3 * row[name]:.0f} ms" for name in ("way", "alone"))
            lines.append(f"| {size} | {row['kind']} | {ways} | {row['answered']:.1f} s |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="where to write the page (default: print it)")
    parser.add_argument("--results", type=Path, default=Path(".demo/gateway-bench.json"), help="figures of all runs")
    parser.add_argument("--model", type=Path, default=Path(".demo/model"), help="where the checkpoint is kept")
    parser.add_argument("--runs", type=int, default=3, help="of each way")
    parser.add_argument("--only", nargs="+", choices=[*WAYS, "overhead", "bodies"], metavar="WAY", help="measure these")
    parser.add_argument("--note", default="", help="a sentence for the page, on what else the machine did")
    args = parser.parse_args()
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
        for name in args.only or ["overhead", "bodies", *WAYS]:
            if name in ("overhead", "bodies"):
                results[name] = measure_overhead(logs) if name == "overhead" else measure_bodies(logs)
                keep()
                continue
            results[name] = []
            with served(WAYS[name], args.model, logs) as (url, replicas):
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
