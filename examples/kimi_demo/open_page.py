"""The gateway with its page, in front of the demo's server, until Ctrl-C."""

import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from kimi_demo.server import Server, free_port
from kimi_demo.subject import Subject

COMMAND = (sys.executable, "-m", "kimi_server.cli", "gateway")
PATIENCE = 60.0  # seconds until the gateway has found the server
PAUSE = 0.3  # seconds


class PageError(RuntimeError):
    """The gateway or the server ended, or was never ready; the message says where it says why."""


class Page:
    """A gateway in front of `server`, its files in `folder`. A context manager that ends it."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server = server
        self.log = folder / "gateway.log"
        self.config = folder / "gateway.yaml"
        self.port = free_port()
        self.process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def __enter__(self) -> "Page":
        """Returns when the gateway is ready; raises PageError where it is not."""
        model_config = str(Path(self.server.model).resolve() / "config.json")
        settings = {"replicas": [{"url": self.server.url}], "port": self.port, "metrics_port": None}
        self.config.write_text(json.dumps({**settings, "model_config": model_config}) + "\n")
        with self.log.open("wb") as log:
            # A session of its own: Ctrl-C is for the demo, which ends it.
            self.process = subprocess.Popen(
                [*COMMAND, "--config", str(self.config)], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            end = time.monotonic() + PATIENCE
            while not self._is_ready():
                self.check()
                if time.monotonic() > end:
                    raise PageError(f"The gateway was not ready after {PATIENCE:.0f} s; {self.log} says why.")
                time.sleep(PAUSE)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def check(self) -> None:
        """Raises PageError where the gateway or the server has ended."""
        for what, process, log in (
            ("gateway", self.process, self.log),
            ("server", self.server.process, self.server.log_path),
        ):
            if process is not None and process.poll() is not None:
                raise PageError(f"The {what} ended with status {process.returncode}; {log} says why.")

    def stop(self) -> None:
        """End the gateway at once: the only one who asks it is leaving."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}readyz", timeout=5) as response:
                return response.status == 200
        except OSError:
            return False


def keep_open(server: Server, subject: Subject, folder: Path) -> None:
    """Show where the page is and wait: KeyboardInterrupt ends it. Raises PageError where something else does."""
    print("\nStarting the gateway with its page ...", flush=True)
    with Page(server, folder) as page:
        print(f"\nThe server and the page stay open: {page.url}")
        if subject.text:
            text = (folder / "log.txt").resolve()
            text.write_text(subject.text)
            print(f"Drop {text} there and ask: {subject.questions[0][0]}")
        print("Ctrl-C ends it.", flush=True)
        while True:
            page.check()
            time.sleep(PAUSE)
