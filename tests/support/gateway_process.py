"""The gateway as a process of its own."""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from kimi_demo.server import free_port

COMMAND = [sys.executable, "-m", "kimi_server.cli", "gateway"]


class GatewayProcess:
    """`kimi-linear gateway` in front of `upstreams`, on free loopback ports; entered, it waits until it is ready.

    `settings` are fields of gateway.yaml, which is written into `folder` with the access log and the errors.
    """

    def __init__(self, folder: Path, upstreams: list[str], **settings: Any) -> None:
        self.port, metrics_port = free_port(), free_port()
        self.metrics_url = f"http://127.0.0.1:{metrics_port}/metrics"
        settings = {"metrics_port": metrics_port, **settings}
        config = folder / "gateway.yaml"
        config.write_text(json.dumps({"replicas": [{"url": url} for url in upstreams], **settings}))
        self.log = folder / "log.jsonl"
        self.errors = folder / "errors"
        with self.log.open("wb") as log, self.errors.open("wb") as errors:
            arguments = [*COMMAND, "--config", str(config), "--port", str(self.port)]
            self.process = subprocess.Popen(arguments, stdout=log, stderr=errors)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> int:
        """The status of a GET; 0 where nobody answers."""
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(self.url + path, trust_env=False).status_code
        return 0

    def __enter__(self) -> "GatewayProcess":
        end = time.monotonic() + 60
        while self.get("/readyz") != 200:
            assert self.process.poll() is None and time.monotonic() < end, self.errors.read_text()
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
