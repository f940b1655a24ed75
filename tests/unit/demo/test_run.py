"""`kimi-linear demo` as a process, in a terminal and without, its server a fake: how it ends and what it leaves."""

import contextlib
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from kimi_demo import demo, kept_answers
from kimi_demo.subject import TRAINED
from vllm_kimi_linear.cache import layout
from vllm_kimi_linear.config.model import ModelSizes

FAKE = Path(__file__).parents[2] / "support" / "fake_vllm.py"
# The demo, with another vLLM and another trained model.
PROGRAM = """
import sys
from pathlib import Path
from kimi_demo import demo, server
from kimi_server import cli
demo.TRAINED = Path(sys.argv[1])
demo._has_gpu = lambda: False
server.vllm_program = lambda: [sys.executable, sys.argv[2]]
sys.exit(cli.main(["demo", *sys.argv[3:]]))
"""
LOG = "The code of Anna Weber is 4827.\nThe upper gate is open at dawn.\n"
QUESTION, ANSWER = "What is the code of Anna Weber?", "The code of Anna Weber is 4827."
PROMPT_IDS, TOKENS = [1, 2, 3], [4, 5, 6]
ENDS = 60.0  # seconds


class Demo:
    """What `kimi-linear demo` is run with, and `says`, which its server says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        model = folder / "trained" / "checkpoint"
        shutil.copytree(TRAINED / "checkpoint", model)
        sample = {"log": LOG, "questions": [{"question": QUESTION, "answer": ANSWER}]}
        (model.parent / "sample.json").write_text(json.dumps(sample))
        kept = [{"question": QUESTION, "prompt": kept_answers.name_of(PROMPT_IDS), "tokens": TOKENS}]
        file = {"sha256": kept_answers.hashes(model), "answers": kept}
        (model.parent / kept_answers.NAME).write_text(json.dumps(file))
        sizes = ModelSizes.from_config(json.loads((model / "config.json").read_text()))
        blocks = layout.cache_layout(sizes, activation_dtype="float32", kv_bytes=demo.KV_BYTES).num_blocks
        self.says = {"answers": {QUESTION: [ANSWER, TOKENS]}, "prompt_ids": PROMPT_IDS, "blocks": blocks}

    @property
    def command(self) -> list[str]:
        (self.folder / "says.json").write_text(json.dumps(self.says))
        return [sys.executable, "-c", PROGRAM, str(self.folder / "trained"), str(FAKE), "--dir", str(self.folder / "d")]

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"FAKE_VLLM": str(self.folder / "says.json")}

    def left(self) -> list[str]:
        """Command lines of processes that belong to this run."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if str(self.folder) in line:
                    found.append(line)
        return found


@pytest.fixture
def run(tmp_path: Path) -> Demo:
    return Demo(tmp_path)


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            os.execvpe(command[0], command, environment)
        self.shown = ""

    def read_to(self, text: str) -> None:
        """Read until `text` is shown; with an empty one, to the end."""
        end = time.monotonic() + ENDS
        while not text or text not in self.shown:
            assert time.monotonic() < end, self.shown
            if not select.select([self.descriptor], [], [], 1)[0]:
                continue
            try:
                piece = os.read(self.descriptor, 4096)
            except OSError:  # how a terminal ends
                piece = b""
            if not piece:
                assert not text, self.shown
                return
            self.shown += piece.decode(errors="replace")

    def type(self, keys: bytes) -> None:
        os.write(self.descriptor, keys)

    def status(self) -> int:
        self.read_to("")
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def terminal(run: Demo) -> Iterator:
    """Runs the demo in a terminal with further arguments."""
    opened: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        opened.append(Terminal([*run.command, *arguments], run.environment))
        return opened[-1]

    yield start
    for each in opened:
        with contextlib.suppress(ProcessLookupError):
            os.kill(each.pid, signal.SIGKILL)
        os.close(each.descriptor)


@pytest.mark.parametrize("ended", ["ctrl-c", "SIGTERM"])
def test_on_a_terminal_server_and_page_stay_open(run: Demo, terminal, ended: str) -> None:
    demo = terminal()
    demo.read_to("Ctrl-C ends it.")
    assert "right, 3 tokens of prompt" in demo.shown and "3 of 3 tokens agree" in demo.shown
    url = re.search(r"stay open: (http://127\.0\.0\.1:\d+/)", demo.shown)
    assert url
    with urllib.request.urlopen(url[1], timeout=10) as page:
        assert b"<html" in page.read()
    with urllib.request.urlopen(f"{url[1]}v1/kimi/context", timeout=10) as context:
        assert context.status == 200
    assert f"Drop {run.folder / 'd' / 'log.txt'} there and ask: {QUESTION}" in demo.shown
    assert (run.folder / "d" / "log.txt").read_text() == LOG
    if ended == "ctrl-c":
        demo.type(b"\x03")
    else:
        os.kill(demo.pid, signal.SIGTERM)
    assert demo.status() == 0 and "Traceback" not in demo.shown
    assert run.left() == []


def test_a_page_whose_server_ends_is_not_left_open(run: Demo, terminal) -> None:
    demo = terminal()
    demo.read_to("Ctrl-C ends it.")
    [server] = [path.parent for path in Path("/proc").glob("[0-9]*/cmdline") if _is_fake(path, run)]
    os.kill(int(server.name), signal.SIGKILL)
    assert demo.status() == 1 and "The server ended with status -9; " in demo.shown and "Traceback" not in demo.shown
    assert run.left() == []


def _is_fake(path: Path, run: Demo) -> bool:
    with contextlib.suppress(OSError):
        line = path.read_bytes()
        return str(FAKE).encode() + b"\0serve" in line and str(run.folder).encode() in line
    return False


def test_ctrl_c_while_the_server_starts(run: Demo, terminal) -> None:
    run.says["never_ready"] = True
    demo = terminal()
    demo.read_to("cache and warm-up, ")
    demo.type(b"\x03")
    assert demo.status() == 130 and demo.shown.rstrip().endswith("Stopped before all was checked.")
    assert "Traceback" not in demo.shown and run.left() == []


def test_once_on_a_terminal(run: Demo, terminal) -> None:
    demo = terminal("--once")
    assert demo.status() == 0 and "3 of 3 tokens agree" in demo.shown
    assert "Ctrl-C" not in demo.shown and run.left() == []


def test_what_is_wrong_is_not_left_open(run: Demo, terminal) -> None:
    run.says["answers"] = {QUESTION: ["The code of Anna Weber is 1111.", TOKENS]}
    demo = terminal()
    assert demo.status() == 1 and f"WRONG, it is: {ANSWER}" in demo.shown and "Ctrl-C" not in demo.shown


@pytest.mark.parametrize(
    ("wrong", "status"),
    [
        ({}, 0),
        ({"answers": {QUESTION: ["The code of Anna Weber is 1111.", TOKENS]}}, 1),
        ({"answers": {QUESTION: [ANSWER, [4, 5, 7]]}}, 1),
        ({"blocks": 1}, 1),
    ],
)
def test_without_a_terminal_it_ends_with_what_it_found(run: Demo, wrong: dict, status: int) -> None:
    run.says |= wrong
    done = subprocess.run(
        run.command,
        env=run.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=ENDS,
        start_new_session=True,
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert "\r" not in done.stdout and "Ctrl-C" not in done.stdout and "] ready, " in done.stdout
    assert run.left() == []
