"""Run the commands of an install one after another, with a sign of life on each and a log of them all."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path


class Failed(Exception):
    """The install cannot go on; the message is for the user."""


class Steps:
    """Numbered steps. On a terminal the current one is a line that counts its seconds; elsewhere there is a
    new line every ten seconds, so that a log stays short."""

    def __init__(self, log: Path, directory: Path, environment: Mapping[str, str]) -> None:
        self.log = log
        self.directory = directory
        self.environment = environment
        self.pause = 1.0 if sys.stdout.isatty() else 10.0
        self.count = 0

    def run(self, title: str, command: Sequence[str], may_fail: bool = False) -> tuple[int, str]:
        """Run a command and show that it lives; return its exit code and everything it printed.

        Raises:
            Failed: it exits with another code than 0, and may_fail is False.
        """
        self.count += 1
        started = time.monotonic()
        self._show(title, "...")
        process = subprocess.Popen(
            command,
            cwd=self.directory,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        lines: list[str] = []
        reader = threading.Thread(target=lambda: lines.extend(process.stdout or ()), daemon=True)
        reader.start()
        try:
            while True:
                reader.join(self.pause)
                if not reader.is_alive():
                    break
                self._show(title, f"{time.monotonic() - started:.0f} s  {activity(lines)}")
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        output = "".join(line for line in lines if not PROGRESS.match(line))
        # The log lies in the environment, which the first step may make, emptying the folder.
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "a") as log:
            log.write(f"\n$ {' '.join(map(str, command))}\n{output}[exit {code}]\n")
        self._show(title, f"{'done' if code == 0 else 'no'}, {time.monotonic() - started:.0f} s", last=True)
        if code and not may_fail:
            self.fail(f"{title}: failed", output)
        return code, output

    def fail(self, sentence: str, output: str = "") -> None:
        """Raise Failed with the end of what was printed, and where the rest is."""
        tail = "".join(f"  {line}\n" for line in output.splitlines()[-12:])
        raise Failed(f"{sentence}.\n{tail}The whole log is in {self.log}. Then run `make install` again.")

    def _show(self, title: str, state: str, last: bool = False) -> None:
        line = f"[{self.count}] {title}: {state}"
        if sys.stdout.isatty():
            width = os.get_terminal_size().columns
            print(f"\r\033[K{line[: width - 1]}", end="\n" if last else "", flush=True)
        else:
            print(line, flush=True)


PROGRESS = re.compile(r"Progress (\d+) of (\d+)")


def activity(lines: Sequence[str]) -> str:
    """What pip or uv is at, in its own last words; the raw progress lines of a download become a percentage."""
    share = ""
    for line in reversed(lines):
        if found := PROGRESS.match(line):
            share = share or f" {100 * int(found[1]) // max(int(found[2]), 1)}%"
        elif line.strip():
            return line.strip().removeprefix("DEBUG ")[:90] + share
    return share
