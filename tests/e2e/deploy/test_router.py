"""LiteLLM with the configuration of deploy/router.md, before two stand-ins for gateways.

Needs LITELLM=path/to/bin/litellm, in an environment of its own.
"""

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from kimi_demo.server import free_port

ROUTER = Path(__file__).resolve().parents[3] / "deploy/router.md"
LITELLM = os.environ.get("LITELLM", "")
KEYS = {"KIMI_KEY": "sk-gateway", "LITELLM_MASTER_KEY": "sk-fleet"}
USAGE = {
    "prompt_tokens": 5,
    "completion_tokens": 2,
    "total_tokens": 7,
    "prompt_tokens_details": {"cached_tokens": 4},
}


class Gateway(ThreadingHTTPServer):
    """Answers chats with its own port, `busy` with 429, and keeps what reached it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[dict[str, Any]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def port(self) -> int:
        return self.server_address[1]


class Handler(BaseHTTPRequestHandler):
    server: Gateway

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append({"session": self.headers["X-Session-ID"], "key": self.headers["Authorization"]})
        base = {"id": "1", "created": 1, "model": body["model"]}
        if body["messages"][-1]["content"] == "busy":
            self.answer(
                429, json.dumps({"error": {"message": "The queue is full.", "code": 429}}), {"Retry-After": "7"}
            )
        elif body.get("stream"):
            time.sleep(1)  # so that requests sent together meet
            choice = {"index": 0, "delta": {"role": "assistant", "content": str(self.server.port)}}
            chunks: list[dict[str, Any]] = [
                {"choices": [choice]},
                {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
                {"choices": [], "usage": USAGE},
            ]
            lines = [json.dumps(base | {"object": "chat.completion.chunk"} | chunk) for chunk in chunks]
            text = "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"])
            self.answer(200, text, {"Content-Type": "text/event-stream"})
        else:
            message = {"role": "assistant", "content": str(self.server.port)}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            more = {"object": "chat.completion", "choices": [choice], "usage": USAGE}
            self.answer(200, json.dumps(base | more), {"Content-Type": "application/json"})

    def answer(self, status: int, text: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(text.encode()))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


def config() -> dict[str, Any]:
    """The YAML of router.md that LiteLLM reads."""
    blocks = re.findall(r"```yaml\n(.*?)```", ROUTER.read_text(), re.DOTALL)
    (found,) = (one for one in map(yaml.safe_load, blocks) if "model_list" in one)
    return found


def test_the_configuration_names_two_gateways() -> None:
    bases = [model["litellm_params"]["api_base"] for model in config()["model_list"]]
    assert bases == ["http://gateway-0:8080/v1", "http://gateway-1:8080/v1"]


@pytest.fixture(scope="module")
def gateways() -> Iterator[list[Gateway]]:
    made = [Gateway(), Gateway()]
    yield made
    for gateway in made:
        gateway.shutdown()
        gateway.server_close()


@pytest.fixture(scope="module")
def client(gateways: list[Gateway], tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Of a running LiteLLM before the stand-ins."""
    if not LITELLM:
        pytest.skip("LITELLM names no LiteLLM")
    folder = tmp_path_factory.mktemp("litellm")
    settings = config()
    for model, gateway in zip(settings["model_list"], gateways, strict=True):
        model["litellm_params"]["api_base"] = f"http://127.0.0.1:{gateway.port}/v1"
    (folder / "litellm.yaml").write_text(yaml.safe_dump(settings))
    port = free_port()
    command = [LITELLM, "--config", str(folder / "litellm.yaml"), "--host", "127.0.0.1", "--port", str(port)]
    env = {"PATH": os.environ["PATH"], "HOME": str(folder), "LITELLM_LOCAL_MODEL_COST_MAP": "True", **KEYS}
    log = folder / "litellm.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=folder, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    headers = {"Authorization": f"Bearer {KEYS['LITELLM_MASTER_KEY']}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=120, trust_env=False) as client:
        try:
            deadline = time.monotonic() + 300
            while True:
                try:
                    if client.get("/health/readiness").status_code == 200:
                        break
                except httpx.TransportError:
                    assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
                time.sleep(0.5)
            yield client
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ask(client: httpx.Client, content: str = "hello", session: str = "", **more: Any) -> httpx.Response:
    model = config()["model_list"][0]["model_name"]
    body = {"model": model, "messages": [{"role": "user", "content": content}], **more}
    headers = {"X-Session-ID": session} if session else {}
    return client.post("/v1/chat/completions", json=body, headers=headers)


@pytest.mark.cluster
def test_answers_usage_and_session_come_through(client: httpx.Client, gateways: list[Gateway]) -> None:
    reply = ask(client, session="s1").raise_for_status().json()
    assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == 4
    seen = [one for gateway in gateways for one in gateway.seen]
    assert {"session": "s1", "key": f"Bearer {KEYS['KIMI_KEY']}"} in seen
    stream = ask(client, stream=True, stream_options={"include_usage": True}).raise_for_status().text
    assert stream.endswith("data: [DONE]\n\n") and '"cached_tokens":4' in stream.replace(" ", "")


@pytest.mark.cluster
def test_requests_at_once_are_spread(client: httpx.Client, gateways: list[Gateway]) -> None:
    for gateway in gateways:
        gateway.seen.clear()
    askers = [threading.Thread(target=ask, args=(client,), kwargs={"stream": True}) for _ in range(8)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert all(gateway.seen for gateway in gateways)


@pytest.mark.cluster
def test_a_full_queue_is_said(client: httpx.Client) -> None:
    reply = ask(client, "busy")
    assert reply.status_code == 429
    assert reply.headers["llm_provider-retry-after"] == "7"


@pytest.mark.cluster
def test_one_gateway_down(client: httpx.Client, gateways: list[Gateway]) -> None:
    """The last test: the first stand-in stays down."""
    time.sleep(config()["router_settings"]["cooldown_time"] + 1)  # from the 429 before
    gateways[0].shutdown()
    gateways[0].server_close()
    for _ in range(6):
        assert ask(client).raise_for_status().json()["choices"][0]["message"]["content"] == str(gateways[1].port)
