"""A gateway in this process, in front of stand-ins for vLLM."""

import contextlib
import dataclasses
import io
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx

from kimi_server.gateway.config.settings import AdmissionSettings, LimitSettings, ReplicaSettings, Settings
from kimi_server.gateway.gateway import Gateway
from kimi_server.gateway.server import Server
from tests.support import patience
from tests.support.upstream import Background, Upstream, serving


class Running:
    """A gateway that answers, and what is to be known of it."""

    def __init__(self, server: Server, url: str, log: io.StringIO) -> None:
        self.gateway, self.url, self.log = server.gateway, url, log
        self.metrics_url = f"http://127.0.0.1:{server.metrics_port}/metrics"

    def client(self, **more: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=patience.SECONDS, trust_env=False, **more)

    def ask_and_leave(self, path: str, body: dict[str, Any], when: Callable[[], bool], **headers: str) -> None:
        """Send a request, and close the connection without its answer once `when` is true."""
        content = json.dumps(body).encode()
        headers |= {"host": "x", "content-type": "application/json", "content-length": str(len(content))}
        lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        with socket.create_connection(("127.0.0.1", int(self.url.rsplit(":", 1)[1]))) as connection:
            connection.sendall("\r\n".join(lines).encode() + content)
            self.until(when, "what the client leaves after")

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The log."""
        return [json.loads(line) for line in self.log.getvalue().splitlines()]

    def until(self, true: Callable[[], bool], what: str, seconds: float = 60) -> None:
        """Wait for something that must come."""
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, f"it did not happen: {what}"
            time.sleep(0.005)

    def until_idle(self) -> None:
        self.until(lambda: self.gateway.active_requests == 0, "no request left")
        assert self.outstanding == 0
        assert all(replica.running == 0 for replica in self.gateway.replicas.all)
        assert not any(self.gateway.admission.queues.values())
        assert self.gateway.body_budget.reserved == 0
        assert all(limiter.running == 0 for limiter in self.gateway.keyring.limiters.values())

    @property
    def outstanding(self) -> int:
        return sum(sum(lanes.values()) for lanes in self.gateway.admission.outstanding)

    def metric(self, name: str, **labels: str) -> float:
        """The value of one sample; 0 while there is none."""
        return self.gateway.metrics.registry.get_sample_value(f"kimi_gateway_{name}", labels) or 0.0


Start = Callable[..., Running]


@contextlib.contextmanager
def starting() -> Iterator[Start]:
    """Gives `start`, see the fixture of that name; the gateways stop at the end."""
    with contextlib.ExitStack() as stack:
        backgrounds: list[Background] = []

        def start(
            *upstreams: Upstream,
            admission: dict | None = None,
            limits: dict | None = None,
            wait: bool = True,
            **more: Any,
        ) -> Running:
            backgrounds.extend(served := stack.enter_context(serving(*upstreams)))
            replicas = tuple(ReplicaSettings(one.url) for one in served)
            settings = Settings(
                admission=AdmissionSettings(**(admission or {})),
                limits=dataclasses.replace(LimitSettings(replica_seconds=20), **(limits or {})),
                **{"replicas": replicas, "metrics_port": 0, **more},
            )
            log = io.StringIO()
            gateway = Gateway(settings, log)
            server = Server(gateway)
            backgrounds.append(background := stack.enter_context(Background(server)))
            running = Running(server, background.url, log)
            if wait:
                running.until(lambda: all(one.up for one in gateway.replicas.all), "every replica up")
            return running

        yield start
        for background in backgrounds:  # all at once: uvicorn takes a while to notice
            background.server.should_exit = True


CHAT = {"model": "fake", "messages": [{"role": "user", "content": "Hello"}]}


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer sk-{name}"}
