"""The commands a newcomer and continuous integration type: make's targets, .ci/run, the tiers of test-all."""

import datetime
import functools
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[3]
TARGETS = {
    "help",
    "install",
    "lock",
    "demo",
    "serve",
    "lint",
    "test",
    "test-unit",
    "test-all",
    "newer-vllm",
    "docs",
    "dist",
    "soak",
    "clean",
}
# As if typed: without what a surrounding make hands down.
TYPED = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}


@functools.cache
def markers() -> list[str]:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return [line.split(":")[0] for line in pyproject["tool"]["pytest"]["ini_options"]["markers"]]


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *arguments], cwd=ROOT, env=TYPED | environment, capture_output=True, text=True)


def test_servers_find_bytecode_whatever_the_environment_says() -> None:
    """Without, each of a server's processes takes twice as long to import vLLM."""
    shown = make('--eval=show:;@echo "[$$PYTHONDONTWRITEBYTECODE]"', "show", PYTHONDONTWRITEBYTECODE="1")
    assert shown.stdout.strip() == "[]"


@pytest.mark.parametrize("arguments", [[], ["help"]])
def test_help_lists_every_target(arguments: list[str]) -> None:
    done = make(*arguments)
    assert done.returncode == 0
    assert set(re.findall(r"^  make (\S+)", done.stdout, re.MULTILINE)) == TARGETS


def test_makes_test_runs_lint_and_ends_with_every_unmarked_test() -> None:
    ruff, mypy, pytest_line = make("-n", "test").stdout.splitlines()[-3:]
    assert ("bin/ruff" in ruff, "bin/mypy" in mypy, "bin/pytest" in pytest_line) == (True, True, True)
    assert re.findall(r"not (\w+)", pytest_line) == markers()


def test_every_command_installs_first() -> None:
    for target in ("lock", "demo", "serve", "test", "test-unit", "test-all", "newer-vllm", "docs", "dist", "soak"):
        assert "-m deploy.install --device" in make("-n", target).stdout, target


def test_the_demo_installs_no_tools_of_the_tests() -> None:
    def extras(*goals: str, **environment: str) -> str:
        [asked] = re.findall(r"--extras '(.*?)'", make("-n", *goals, **environment).stdout)
        return asked

    assert extras("demo") == extras("serve") == "server"
    assert extras("install") == extras("test") == extras("demo", "test") == "server,test"
    assert extras("demo", EXTRAS="docs") == extras("demo", "EXTRAS=docs") == "docs"


def test_serve_hands_on_model_and_arguments() -> None:
    last = make("-n", "serve", "MODEL=some/model", "ARGS=--port 9").stdout.splitlines()[-1]
    assert last.endswith(".venv/bin/vllm serve some/model --port 9")


@pytest.mark.parametrize("python", ["/nonexistent/python3", "false"])
def test_unusable_python_gets_one_sentence(python: str) -> None:
    done = make("install", f"PYTHON={python}")
    assert done.returncode != 0
    sentence, own_word_of_make = done.stderr.splitlines()
    assert sentence == (
        "make install: Python 3.11 or newer is missing: install it "
        "(Debian: apt install python3 python3-venv), or name one with PYTHON=..."
    )
    assert own_word_of_make.startswith("make: ***")


@pytest.mark.parametrize("code", [0, 7])
def test_ci_runs_make_test_and_hides_nothing(tmp_path: Path, code: int) -> None:
    assert os.access(ROOT / ".ci/run", os.X_OK)
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    (tmp_path / "Makefile").write_text(f"test:\n\t@echo '3 passed in 1s'; exit {code}\n")
    done = subprocess.run([tmp_path / ".ci/run"], cwd="/", env=TYPED, capture_output=True, text=True)
    assert (done.returncode != 0) == (code != 0)
    assert done.stdout.splitlines()[-1] == "3 passed in 1s"


@pytest.fixture(scope="module")
def run_all() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kimi_linear_run_all", ROOT / "tests/run_all.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_test_belongs_to_one_tier(run_all: ModuleType) -> None:
    assert list(run_all.TIERS) == markers()
    for size in range(len(markers()) + 1):
        for marks in itertools.combinations(markers(), size):
            names = {mark: mark in marks for mark in markers()}
            tiers = [tier for tier in ("always", *markers()) if eval(run_all.selection(tier), {}, names)]
            assert tiers == [marks[-1] if marks else "always"]


def test_report_has_date_commit_counts_and_reasons(run_all: ModuleType, tmp_path: Path) -> None:
    junit = tmp_path / "junit.xml"
    junit.write_text('<testsuites><testsuite tests="9" failures="1" errors="1" skipped="2"/></testsuites>')
    rows = [run_all.Row("always", "failed", run_all.counts(junit)), run_all.Row("gpu", "skipped: no GPU")]
    text = run_all.report(rows, "abc123", datetime.datetime(2026, 1, 2, 3, 4))
    assert "Date: 2026-01-02 03:04 UTC" in text
    assert "Commit: abc123" in text
    assert "| always | failed | 5 passed, 2 failed, 2 skipped |" in text
    assert "| gpu | skipped: no GPU |" in text


def test_tier_without_its_tool_is_skipped_with_the_reason(run_all: ModuleType, monkeypatch) -> None:
    monkeypatch.setitem(run_all.TIERS, "gpu", lambda: "no GPU answers")
    monkeypatch.setattr(run_all.subprocess, "run", lambda *a, **k: pytest.fail("ran"))
    assert run_all.run_tier("gpu") == run_all.Row("gpu", "skipped: no GPU answers")


def test_buildah_is_a_container_engine_too(run_all: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for engine, reason in (("docker", ""), ("buildah", ""), ("none", "no container engine")):
        monkeypatch.setattr(run_all, "_answers", lambda *command, engine=engine: command[0] == engine)
        assert run_all.TIERS["container"]().startswith(reason) and bool(run_all.TIERS["container"]()) == bool(reason)
