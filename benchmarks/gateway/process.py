"""A gateway in front of servers, as a process of its own."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from kimi_demo.server import free_port


@contextlib.contextmanager
def gateway(
    urls: list[str], admission: dict[str, int], logs: Path, prefill: Sequence[dict[str, Any]] = ()
) -> Iterator[str]:
    """A gateway in front of these replicas and servers that read prompts for them; its URL."""
    port = free_port()
    config = logs / "gateway.yaml"
    replicas = [{"url": url} for url in urls]
    settings = {"port": port, "metrics_port": free_port(), "replicas": replicas, "admission": admission}
    settings["prefill"] = list(prefill)
    config.write_text(json.dumps(settings))
    with (logs / "gateway.log").open("ab") as log:
        command = [sys.executable, "-m", "kimi_server.cli", "gateway", "--config", str(config)]
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
