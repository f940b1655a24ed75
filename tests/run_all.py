"""`make test-all`: run every tier of the tests whose tool is present, and print what ran.

Each tier is a pytest marker; tests without one are the tier `always`. The table names what was skipped and why.
Exits 1 if anything failed.
"""

import datetime
import importlib.util
import platform
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NO_TESTS_COLLECTED = 5  # pytest's exit code


@dataclass(frozen=True)
class Row:
    """One line of the report."""

    name: str
    outcome: str
    counts: str = ""


def _answers(*command: str) -> bool:
    """Whether a program is there and exits with 0."""
    if not shutil.which(command[0]):
        return False
    try:
        return subprocess.run(command, capture_output=True, timeout=60).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def chromium() -> str:
    """The path of a Chromium, or ""."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((path for name in names if (path := shutil.which(name))), "")


def _lacks_browser() -> str:
    if not importlib.util.find_spec("playwright"):
        return "playwright is not installed"
    return "" if chromium() else "no Chromium is on the path (Debian: apt install chromium)"


def _lacks_container() -> str:
    if _answers("docker", "info") or _answers("buildah", "info"):
        return ""
    return "no container engine answers `docker info` or `buildah info`"


def _lacks_cluster() -> str:
    if _answers("kubectl", "cluster-info") or importlib.util.find_spec("ray"):
        return ""
    return "no cluster answers `kubectl cluster-info`, and ray is not installed"


def _lacks_gpu() -> str:
    return "" if _answers("nvidia-smi") else "no GPU answers `nvidia-smi`"


def _lacks_nixl() -> str:
    return "" if importlib.util.find_spec("nixl") else "nixl is not installed"


# Marker -> why it cannot run here, or "".
TIERS: dict[str, Callable[[], str]] = {
    "soak": lambda: "",
    "browser": _lacks_browser,
    "container": _lacks_container,
    "cluster": _lacks_cluster,
    "gpu": _lacks_gpu,
    "nixl": _lacks_nixl,
}


def selection(tier: str) -> str:
    """The pytest -m expression of a tier; a test with several marks runs in the last of them."""
    marks = list(TIERS)
    if tier == "always":
        return " and ".join(f"not {mark}" for mark in marks)
    later = marks[marks.index(tier) + 1 :]
    return " and ".join([tier, *(f"not {mark}" for mark in later)])


def counts(junit: Path) -> str:
    """`12 passed, 1 skipped` of a pytest JUnit file."""
    suites = ElementTree.parse(junit).getroot().iter("testsuite")
    total = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in suites:
        for key in total:
            total[key] += int(suite.get(key, 0))
    bad = total["failures"] + total["errors"]
    parts = {"passed": total["tests"] - bad - total["skipped"], "failed": bad, "skipped": total["skipped"]}
    return ", ".join(f"{number} {word}" for word, number in parts.items() if number) or "no tests"


def run_check(name: str, command: list[str]) -> Row:
    """ruff or mypy."""
    print(f"== {name}", flush=True)
    return Row(name, "failed" if subprocess.run(command, cwd=ROOT).returncode else "passed")


def run_tier(tier: str) -> Row:
    """One tier, or the reason why it cannot run."""
    if reason := TIERS.get(tier, lambda: "")():
        print(f"== {tier}: skipped, {reason}", flush=True)
        return Row(tier, f"skipped: {reason}")
    print(f"== {tier}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-m", selection(tier), f"--junitxml={junit}"]
        code = subprocess.run(command, cwd=ROOT).returncode
        if code == NO_TESTS_COLLECTED:
            return Row(tier, "no tests yet")
        return Row(tier, "failed" if code else "passed", counts(junit) if junit.exists() else "")


def report(rows: list[Row], commit: str, now: datetime.datetime) -> str:
    """Date, commit, machine and a table of the tiers, in Markdown: to be pasted where it is asked for."""
    lines = [
        f"- Date: {now:%Y-%m-%d %H:%M} UTC",
        f"- Commit: {commit}",
        f"- Python {platform.python_version()} on {platform.system()} {platform.machine()}",
        "",
        "| tier | outcome | tests |",
        "| --- | --- | --- |",
        *(f"| {row.name} | {row.outcome} | {row.counts} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def commit_name() -> str:
    """The commit of the tree, and whether there are changes beside it."""
    if not _answers("git", "-C", str(ROOT), "rev-parse", "HEAD"):
        return "unknown: the tree is no git clone, or git is missing"

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain")
    return git("rev-parse", "--short=12", "HEAD") + (", with uncommitted changes" if changed else "")


def main() -> int:
    """Run everything and print the report."""
    commit = commit_name()
    scripts = Path(sys.executable).parent
    rows = [run_check("ruff", [f"{scripts}/ruff", "check", "."]), run_check("mypy", [f"{scripts}/mypy"])]
    rows += [run_tier(tier) for tier in ("always", *TIERS)]
    print(report(rows, commit, datetime.datetime.now(datetime.UTC)), end="")
    return 1 if any(row.outcome == "failed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
