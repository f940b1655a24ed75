"""The gateway in front of two real `vllm serve` replicas of the demo checkpoint."""

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from kimi_demo.server import Server
from kimi_server.gateway.config.settings import ReplicaSettings
from kimi_server.gateway.request.parsed_request import parse_request, plain_prompt
from kimi_server.gateway.request.prompt_size import TEMPLATE
from kimi_server.gateway.routes import CLOSED, ROUTES, TOKENIZE
from kimi_server.gateway.upstream.replicas import Replica
from kimi_server.gateway.upstream.token_counter import TokenCounter
from tests.conftest import FLAGS
from tests.support import patience
from tests.support.completions import Completions
from tests.support.gateway_process import GatewayProcess

ROOT = Path(__file__).resolve().parents[3]
LONG = 1500  # tokens of an answer that is still running when something happens


@pytest.fixture
def replicas(servers: Callable[..., Server], demo_model: Path) -> list[Server]:
    """Two servers with the same flags."""
    found = [servers(demo_model, *FLAGS, env={"KIMI_TEST_REPLICA": str(number)}) for number in range(2)]
    for server in found:
        if not server.is_healthy():  # killed by a test
            server.stop()
            server.start(patience.SECONDS)
    return found


@pytest.fixture
def gateway(replicas: list[Server], tmp_path: Path) -> Iterator[GatewayProcess]:
    with GatewayProcess(tmp_path, [server.url for server in replicas]) as process:
        yield process


def body(model: str, session: int, tokens: int, prompt: int = 20) -> dict:
    return {
        "model": model,
        "prompt": [(session * 31 + place) % 900 + 40 for place in range(prompt)],
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


class Stream(threading.Thread):
    """One streamed answer: `begun` with its first token, then `text` and `replica`."""

    def __init__(self, gateway: GatewayProcess, asked: dict) -> None:
        super().__init__(daemon=True)
        self.url, self.asked = gateway.url, asked
        self.begun = threading.Event()
        self.text, self.status, self.replica = "", 0, -1
        self.start()

    def run(self) -> None:
        url = f"{self.url}/v1/completions"
        with httpx.stream("POST", url, json=self.asked, timeout=patience.SECONDS, trust_env=False) as reply:
            self.status, self.replica = reply.status_code, int(reply.headers.get("x-kimi-replica", -1))
            for chunk in reply.iter_text():
                self.text += chunk
                self.begun.set()
        self.begun.set()

    @property
    def whole(self) -> bool:
        return self.text.endswith("data: [DONE]\n\n") and '"error"' not in self.text

    def __repr__(self) -> str:
        return f"<from replica {self.replica}: {self.status}, {len(self.text)} characters, last {self.text[-300:]!r}>"

    @property
    def error(self) -> dict | None:
        """The last event, if that is an error."""
        return json.loads(self.text.rstrip().rsplit("data: ", 1)[1]).get("error") if not self.whole else None


def first_of_each(streams: list[Stream]) -> list[Stream]:
    """Of each replica the first stream to begin, in the order in which they began."""
    found: dict[int, Stream] = {}
    deadline = time.monotonic() + 120
    while len(found) < 2:
        assert time.monotonic() < deadline, streams
        for stream in streams:
            if stream.begun.is_set():
                found.setdefault(stream.replica, stream)
        time.sleep(0.01)
    return list(found.values())


def outstanding(gateway: GatewayProcess) -> float:
    """Prefill tokens and running requests in the gateway's books."""
    text = httpx.get(gateway.metrics_url, trust_env=False).text
    names = ("kimi_gateway_prefill_tokens_outstanding{", "kimi_gateway_running{", "kimi_gateway_queued{")
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(names))


def arrived(gateway: GatewayProcess) -> float:
    """Prompts that were let in, those that are answered too."""
    text = httpx.get(gateway.metrics_url, trust_env=False).text
    lines = re.findall(r"^kimi_gateway_queue_seconds_count\S* (\S+)$", text, re.MULTILINE)
    return sum(map(float, lines))


def test_the_list_of_routes_is_that_of_vllm(replicas: list[Server]) -> None:
    paths = httpx.get(f"{replicas[0].url}/openapi.json", trust_env=False).json()["paths"]
    served = {(method.upper(), path) for path in paths for method in paths[path] if path.startswith("/v1/")}
    listed = {(route.method, route.path) for route in ROUTES}
    assert served - {("POST", path) for path in CLOSED} == listed


def test_what_a_replica_says_is_what_comes(gateway: GatewayProcess, replicas: list[Server]) -> None:
    asked = body(replicas[0].model, 1, 8) | {"stream": False, "stream_options": None}
    through = httpx.post(f"{gateway.url}/v1/completions", json=asked, timeout=patience.SECONDS, trust_env=False)
    straight = httpx.post(f"{replicas[0].url}/v1/completions", json=asked, timeout=patience.SECONDS, trust_env=False)
    assert through.json()["choices"] == straight.json()["choices"]
    assert through.json()["usage"] == straight.json()["usage"]
    assert through.json()["id"].endswith(through.headers["x-request-id"])


TEXTS = ("31415926535897932384626433" * 40, "def f(x):\n\treturn x**2  # []\n" * 40, "人们一直在寻找" * 60, "word " * 9)


@pytest.mark.parametrize("text", TEXTS)
def test_prompts_are_counted_as_vllm_counts_them(replicas: list[Server], text: str) -> None:
    """Exactly where a replica takes the same body, and else but for the template; never above the bound."""
    server, messages = replicas[0], [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
    bodies = {
        "/v1/chat/completions": {"messages": messages, "max_tokens": 1},
        "/v1/completions": {"prompt": text, "max_tokens": 1},
        "/v1/messages": {"messages": messages[1:], "system": "Be brief.", "max_tokens": 1},
        "/v1/responses": {"input": messages, "max_output_tokens": 1},
    }

    async def count(path: str, body: bytes) -> int | None:
        async with httpx.AsyncClient(trust_env=False) as client:
            return await TokenCounter(client).count(Replica(0, ReplicaSettings(server.url)), path, body)

    for route in ROUTES:
        if route.path in bodies:
            asked = bodies[route.path] | {"model": server.model}
            sent = json.dumps(asked).encode()
            usage = httpx.post(server.url + route.path, json=asked, timeout=patience.SECONDS, trust_env=False).json()[
                "usage"
            ]
            tokens = usage.get("prompt_tokens", usage.get("input_tokens"))
            assert tokens <= parse_request(sent).size.max_tokens
            if route.tokenize_path:
                assert asyncio.run(count(route.tokenize_path, sent)) == tokens
            else:
                counted = asyncio.run(count(TOKENIZE, plain_prompt(sent)))
                assert counted is not None and abs(counted - tokens) <= TEMPLATE / 4


def test_odd_requests_are_answered_as_vllm_answers_them(gateway: GatewayProcess, replicas: list[Server]) -> None:
    path, short = "/v1/completions", {"model": replicas[0].model, "prompt": [50, 51]}
    sent: list[tuple[str, str, bytes]] = [
        ("GET", "/v1/models?a=%20:+[]", b""),
        ("GET", "/v1/models/", b""),
        ("POST", f"{path}/", json.dumps(short).encode()),
        ("POST", path, b"\xef\xbb\xbf" + json.dumps(short).encode()),
        *(("POST", path, json.dumps(short | more).encode()) for more in ODD),
    ]
    for method, target, content in sent:
        answers = [
            httpx.request(
                *(method, url + target),
                content=content,
                headers={"content-type": "application/json"},
                timeout=patience.SECONDS,
                trust_env=False,
            )
            for url in (replicas[0].url, gateway.url)
        ]
        assert answers[0].status_code == answers[1].status_code, (target, content, answers[1].text)


MOST: list[object] = ["3", 3.0, 3e0, True, None, "many", 1.5, 0, -1, []]
ANSWERS: list[object] = ["2", 2.0, 0, -1, "x"]
ODD: list[dict] = [
    *({"max_tokens": most} for most in MOST),
    *({"max_tokens": 1, "n": answers} for answers in ANSWERS),
    {"max_tokens": 1, "user": "\ud800"},
]


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.soak)])
def test_random_disconnects_leave_no_running_sequence(
    gateway: GatewayProcess, replicas: list[Server], count: int
) -> None:
    choose = random.Random(count)
    finished: list[int] = []

    async def one(client: httpx.AsyncClient, session: int, places: asyncio.Semaphore) -> None:
        asked = body(replicas[0].model, session, choose.randint(2, 200), choose.choice([10, 10, 10, 1200]))
        pieces = choose.choice([0, 1, 3, 10, 1000])
        async with places:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(choose.random() if pieces == 0 else patience.SECONDS):
                    async with client.stream("POST", "/v1/completions", json=asked) as reply:
                        async for _ in reply.aiter_raw():
                            pieces -= 1
                            if pieces == 0:
                                return
                        finished.append(reply.status_code)

    async def run() -> None:
        async with (
            httpx.AsyncClient(base_url=gateway.url, trust_env=False, timeout=patience.SECONDS) as client,
            asyncio.TaskGroup() as tasks,
        ):
            places = asyncio.Semaphore(16)
            for session in range(count):
                tasks.create_task(one(client, session, places))
        for server in replicas:
            await Completions(server).until_idle()

    asyncio.run(run())
    assert set(finished) == {200}
    assert outstanding(gateway) == 0
    assert [Completions(server).load for server in replicas] == [0, 0]


def test_sigterm_under_load_loses_nothing(gateway: GatewayProcess, replicas: list[Server]) -> None:
    streams = [Stream(gateway, body(replicas[0].model, session, LONG // 3)) for session in range(10)]
    # Not begun yet, some of them: prompts that are read, or wait.
    streams += [Stream(gateway, body(replicas[0].model, session, 5, 3000)) for session in range(10, 16)]
    for stream in streams[:10]:
        assert stream.begun.wait(patience.SECONDS)
    end = time.monotonic() + 120
    while arrived(gateway) < 16:
        assert time.monotonic() < end, gateway.log.read_text()
        time.sleep(0.02)
    gateway.process.terminate()
    for stream in streams:
        stream.join(240)
        assert not stream.is_alive()
    assert [stream.status for stream in streams] == [200] * 16
    assert all(stream.whole for stream in streams)
    assert gateway.process.wait(60) == 0


@pytest.mark.soak
def test_conformance_through_the_gateway(gateway: GatewayProcess) -> None:
    command = [sys.executable, "-m", "pytest", "tests/e2e/conformance", "-q", "--base-url", f"{gateway.url}/v1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]


def test_a_replica_killed_loses_only_its_running_streams(gateway: GatewayProcess, replicas: list[Server]) -> None:
    model = replicas[0].model
    # The twelfth goes to the other replica, if all before it had the same: its load is above its bound.
    streams = [Stream(gateway, body(model, session, LONG)) for session in range(12)]
    begun = first_of_each(streams)
    # Of the two the one that began last: it is farthest from its end, however slow the machine is.
    index = begun[-1].replica
    process = replicas[index].process
    assert process is not None
    os.killpg(process.pid, signal.SIGKILL)
    later = [Stream(gateway, body(model, session, 5)) for session in range(100, 120)]
    for stream in [*streams, *later]:
        stream.join(240)
        assert not stream.is_alive()
    lost = [stream for stream in streams if stream.replica == index and not stream.whole]
    broken = [
        stream for stream in [*streams, *later] if stream not in lost and not (stream.status == 200 and stream.whole)
    ]
    assert not broken, "\n".join([gateway.errors.read_text(), gateway.log.read_text(), replicas[1 - index].log[-4000:]])
    assert begun[-1] in lost
    for stream in lost:
        assert stream.error is not None
        assert stream.error["code"] == 502
    assert outstanding(gateway) == 0
    assert gateway.get("/readyz") == 200
