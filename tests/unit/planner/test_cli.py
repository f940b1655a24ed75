"""The command starts without the libraries that only some of its subcommands need."""

import subprocess
import sys
from pathlib import Path

import pytest

# Every import of these fails, as where they are not installed.
BLOCKED = """
import sys
for name in ("torch", "vllm", "fastapi", "uvicorn", "httpx", "openai", "transformers", "triton", "yaml"):
    sys.modules[name] = None
from kimi_server.cli import main
sys.exit(main(sys.argv[1:]))
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", BLOCKED, *arguments], capture_output=True, text=True)


CONFIG = str(Path(__file__).parents[3] / "benchmarks" / "config_48b.json")


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["demo", "--help"], ["serve", "--help"], ["plan", CONFIG, "--gpus", "8xH200"]],
)
def test_starts_with_the_standard_library_alone(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_help_lists_the_subcommands() -> None:
    from kimi_server.cli import COMMANDS

    text = run("--help").stdout
    assert all(f"    {name}" in text for name in COMMANDS)


@pytest.mark.parametrize("arguments", [[], ["nothing"]])
def test_no_subcommand_is_said(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert "command" in done.stderr.splitlines()[-1]
