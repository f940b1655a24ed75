"""The bar of a server's start: one line on a terminal, a line a phase elsewhere."""

import os
from types import SimpleNamespace

import pytest

from kimi_demo import start_bar
from kimi_demo.start_bar import PHASES, StartBar

MARKS = list(PHASES.values())


@pytest.fixture(autouse=True)
def columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_bar.shutil, "get_terminal_size", lambda *_: os.terminal_size((40, 24)))


def run(terminal: bool, capsys: pytest.CaptureFixture[str]) -> str:
    server = SimpleNamespace(log="")
    bar = StartBar(lambda: server.log, terminal)
    for second in range(12):
        if second % 2 == 0:
            server.log += MARKS[second // 2] + "\n"
        bar(second)
    bar.ready(12.0)
    return capsys.readouterr().out


def test_without_a_terminal_each_phase_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(False, capsys).splitlines()
    assert len(lines) == len(PHASES) + 2 and "\r" not in "".join(lines)
    for number, (line, phase) in enumerate(zip(lines, PHASES, strict=False)):
        assert line.endswith(f"] {phase}, from second {2 * number}")
    assert lines[0].startswith("[....") and lines[-2] == f"[{'#' * start_bar.WIDTH}] ready, 12 s"
    assert lines[-1].endswith("imports, API server 2, imports, engine 2, imports, worker 2, weights 2, "
                              "cache and warm-up 2, HTTP 2")  # fmt: skip


def test_on_a_terminal_it_is_one_line_with_the_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    shown = run(True, capsys)
    bar, rest = shown.split("\n", 1)
    drawn = bar.split("\r\033[K")[1:]
    assert len(drawn) == 12 + 1 and all(len(line) < 40 for line in drawn)
    assert drawn[0].endswith("imports, API") and "weights, 7 s" in bar and rest.count("\n") == 1


def test_a_mark_that_a_later_vllm_no_longer_prints_is_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    bar = StartBar(lambda: MARKS[3], False)
    bar(2.0)
    bar.ready(3.0)
    shown = capsys.readouterr().out
    assert "] weights, from second 2\n" in shown and shown.endswith(": imports, API server 2, weights 1\n")
