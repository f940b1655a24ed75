"""Part 2: a gateway before that server and before bad ones; hostile clients beside good ones."""

import asyncio
import io
import json
import random
import time
from pathlib import Path

import httpx

from kimi_server.gateway.config.settings import load
from kimi_server.gateway.gateway import Gateway
from kimi_server.gateway.keys.keys_file import digest
from kimi_server.gateway.server import Server as GatewayServer
from tests.soak.asking import Tally, ask
from tests.soak.engine import AT_ONCE, IDLE_SECONDS, STORM, ask_again, renew, say, until_idle
from tests.soak.hostile import ACTS, Client, bad_replicas
from tests.soak.traffic import Asked, Traffic
from tests.support.completions import Completions
from tests.support.gateway import Running
from tests.support.upstream import Background

KEY = "sk-soak"
HOSTILE = 24  # clients of a round


def configuration(folder: Path, replicas: list[str]) -> Path:
    keys = [{"id": "soak", "sha256": digest(KEY), "concurrency": 200}]
    (folder / "keys.yaml").write_text(json.dumps({"keys": keys}))
    path = folder / "gateway.yaml"
    settings = {
        "replicas": [{"url": url} for url in replicas],
        "keys": "keys.yaml",
        "metrics_port": 0,
        "admission": {"prefill_tokens": 40_000, "short_prompt": 1000, "short_reserve": 8000},
        "limits": {"header_seconds": 1, "body_seconds": 5, "client_seconds": 20, "replica_seconds": 300},
    }
    path.write_text(json.dumps(settings))  # JSON is YAML
    return path


async def rounds(completions: Completions, asked: Traffic, tally: Tally, folder: Path, until: float) -> int:
    """Rounds until a time of time.monotonic(), at least one; returns how many. Raises DeadEngineError."""
    done = 0
    choose = random.Random(asked.seed)
    async with bad_replicas() as bad:
        log = io.StringIO()
        gateway = Gateway(load(configuration(folder, [*bad, completions.server.url])), log)
        inner = GatewayServer(gateway)
        server = Background(inner)
        with server:
            running = Running(inner, server.url, log)
            await asyncio.to_thread(running.until, lambda: gateway.replicas.all[-1].up, "the good replica is up")
            limits, headers = httpx.Limits(max_connections=None, keepalive_expiry=2), {"authorization": f"Bearer {KEY}"}
            async with (
                httpx.AsyncClient(
                    base_url=server.url, headers=headers, timeout=600, limits=limits, trust_env=False
                ) as client,
                completions.connect() as straight,
            ):
                while not done or time.monotonic() < until:
                    await renew(straight, asked, tally)
                    hostile = [Client(server.port, KEY, asked.model, choose, tally) for _ in range(HOSTILE)]
                    places = asyncio.Semaphore(AT_ONCE)
                    await asyncio.gather(
                        *(good(client, each, tally, places) for each in asked.storm(STORM)),
                        *(bad_act(one, choose.uniform(0, 5)) for one in hostile),
                    )
                    await until_idle(completions, tally)
                    await ask_again(straight, asked, tally, folder)
                    await asyncio.to_thread(check_budgets, running, tally)
                    done += 1
                    say(done, tally)
        (folder / "gateway.jsonl").write_text(log.getvalue())
    return done


async def good(client: httpx.AsyncClient, asked: Asked, tally: Tally, places: asyncio.Semaphore) -> None:
    async with places:
        await ask(client, asked, tally, may_refuse=True)


async def bad_act(client: Client, pause: float) -> None:
    act = client.choose.choice(ACTS)
    await asyncio.sleep(pause)
    try:
        async with client:
            await act(client)
    except (OSError, TimeoutError) as error:
        client.tally.faults.append(f"{act.__name__}: {error!r}")


def check_budgets(running: Running, tally: Tally) -> None:
    """All that the gateway counts is back at zero; what is not is a fault."""
    try:
        running.until(lambda: running.gateway.active_requests == 0, "no request is left", IDLE_SECONDS)
        running.until_idle()
    except AssertionError as error:
        tally.faults.append(f"a budget of the gateway is not back at zero: {error}")
