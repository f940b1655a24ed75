"""Gaps between the tokens of running sequences while long prompts are read: by one server, two, or another.

    python -m benchmarks.prefill_decode --out docs/benchmarks/prefill-decode.md

serves the 48B's config with random weights, a server a GPU, of two; needs nixl. --sequences sequences decode; after a
while --longs prompts of --long tokens come, one after the other. A trial on a CPU: --config CONFIG --flags FLAGS
--settings JSON, further settings of vLLM's connector.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import CONFIG, GIB, MILLION, gpus, versions
from benchmarks.gateway.process import gateway
from benchmarks.h200.runs import ENV
from benchmarks.load import Load, Reply, percentile
from kimi_demo.server import Server, free_port

FLAGS = (
    "--dtype=bfloat16 --max-model-len=1048576 --max-num-batched-tokens=8192 --long-prefill-token-threshold=3840 "
    "--max-num-seqs=64"
)
COMMON = "--load-format=dummy --skip-tokenizer-init --enable-prompt-tokens-details --enable-prefix-caching"
PROMPT = 4096  # tokens of the sequences that decode
BEFORE = 5.0  # seconds that these decode alone


@dataclass(frozen=True)
class Way:
    """`replicas` answer; `prefill` others read long prompts for them."""

    replicas: int
    prefill: int = 0


WAYS = {"one server": Way(1), "two replicas": Way(2), "prefill apart": Way(1, 1)}


def connector(port: int, settings: dict[str, Any]) -> str:
    tier = {"type": "p2p", "host": "127.0.0.1", "port": port, "unbound_store_timeout_s": 600}
    given = {"spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": 24 * GIB, "secondary_tiers": [tier], **settings}
    config = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": given}
    return f"--kv-transfer-config={json.dumps(config)}"


@contextlib.contextmanager
def served(way: Way, model: Path, args: argparse.Namespace) -> Iterator[str]:
    """The URL at which a way is asked."""
    ports = [free_port() for _ in range(way.replicas + way.prefill)]
    with contextlib.ExitStack() as stack:
        servers = []
        for number, port in enumerate(ports):
            flags = [*COMMON.split(), *args.flags.split()]
            if way.prefill:
                flags.append(connector(port, args.settings))
            env = {**ENV, "CUDA_VISIBLE_DEVICES": str(number)}
            server = Server(model, flags, log_path=model / f"vllm-{number}.log", env=env)
            stack.callback(server.stop)
            server.launch()
            servers.append(server)
        for server in servers:
            server.wait(600)
        if len(servers) == 1:
            yield servers[0].url
            return
        urls = [server.url for server in servers]
        readers = [
            {"url": url, "p2p": f"127.0.0.1:{port}"}
            for url, port in list(zip(urls, ports, strict=True))[way.replicas :]
        ]
        yield stack.enter_context(gateway(urls[: way.replicas], {"short_prompt": PROMPT + 1024}, model, readers))


async def run(load: Load, args: argparse.Namespace) -> tuple[list[Reply], list[Reply]]:
    """The sequences that decode, and the long prompts."""
    async with load.connect() as client:
        decoding = [
            asyncio.create_task(load.ask(client, load.prompt(args.prompt), args.answer)) for _ in range(args.sequences)
        ]
        for _ in decoding:
            await asyncio.to_thread(load.begun.acquire)
        await asyncio.sleep(BEFORE)
        longs = [await load.ask(client, load.prompt(args.long), 1) for _ in range(args.longs)]
        return await asyncio.gather(*decoding), longs


def gaps(replies: Sequence[Reply], begin: float, end: float) -> list[float]:
    """Seconds between two pieces of an answer of which the second came in this time."""
    pairs = (pair for reply in replies for pair in zip(reply.times, reply.times[1:], strict=False))
    return [later - earlier for earlier, later in pairs if begin < later <= end]


def row(name: str, decoding: Sequence[Reply], longs: Sequence[Reply]) -> str:
    begin = longs[0].asked
    alone = gaps(decoding, max(reply.times[0] for reply in decoding), begin)
    beside = gaps(decoding, begin, min(longs[-1].times[0], *(reply.times[-1] for reply in decoding)))
    if min(reply.times[-1] for reply in decoding) < longs[-1].times[0]:
        print(f"{name}: answers ended before the last long prompt was read; --answer more", flush=True)
    cells = [name, *(f"{1e3 * percentile(alone, share):.2f}" for share in (0.5, 0.99))]
    cells += [f"{1e3 * percentile(beside, share):.2f}" for share in (0.5, 0.99)]
    cells += [f"{1e3 * max(beside):.0f}", f"{statistics.median(reply.ttft for reply in longs):.2f}"]
    print(cells, flush=True)
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=PROMPT, help="tokens of their prompts")
    parser.add_argument("--answer", type=int, default=12_000, help="tokens of their answers")
    parser.add_argument("--long", type=int, default=MILLION)
    parser.add_argument("--longs", type=int, default=1)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--flags", default=FLAGS)
    parser.add_argument("--settings", type=json.loads, default={})
    args = parser.parse_args()
    config: dict[str, Any] = json.loads(args.config.read_text())
    rows = []
    for name in args.ways:
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder)
            (model / "config.json").write_text(json.dumps(config))
            with served(WAYS[name], model, args) as url:
                load = Load(url, str(model), config["vocab_size"])
                load.at_once([load.prompt(args.prompt)] * 2, 4)  # what the first prompts cost
                load.begun = type(load.begun)(0)
                rows.append(row(name, *asyncio.run(run(load, args))))
        if args.out:
            args.out.write_text(table(rows, args))


def table(rows: Sequence[str], args: argparse.Namespace) -> str:
    return "\n".join(
        [
            "# Prompts read by a server of their own",
            "",
            "    python -m benchmarks.prefill_decode "
            f"--sequences {args.sequences} --long {args.long} --longs {args.longs}",
            "",
            f"{gpus()}, {os.cpu_count()} cores, {versions('vllm', 'torch', 'triton')}; the 48B's config with random",
            f"weights, a server a GPU. {args.sequences} sequences decode after prompts of {args.prompt:,} tokens while",
            f"{args.longs} of {args.long:,} tokens come, one after the other.",
            "",
            "| way | gap alone, p50, ms | p99 | beside long prompts, p50, ms | p99 | longest | TTFT of a long one, s |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    main()
