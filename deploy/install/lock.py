"""`make lock`: the versions that `make install` takes, for each device; ARGS=--upgrade asks for the newest that fit.

A lock names each package that any extra needs, in one version for each Python. `make install` gives it to uv or pip as
constraints, so it holds nothing of where a package comes from.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from deploy.install import pip_settings
from deploy.install.__main__ import ROOT, child_environment
from deploy.install.machine import DEVICES
from deploy.install.packages import LOCKS, NOT_ON_A_CPU, PYTORCH_CPU_INDEX, requirements, uv


def locked_extras(root: Path, device: str) -> list[str]:
    """Every extra of pyproject.toml that can stand beside this device's own."""
    pyproject = tomllib.loads((root / "pyproject.toml").read_text())
    return [extra for extra in pyproject["project"]["optional-dependencies"] if extra not in DEVICES]


def main() -> int:
    """Write both locks; what is given on the command line is handed to `uv pip compile`."""
    python = sys.executable
    settings = subprocess.run(
        [python, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    environment = pip_settings.uv_environment(pip_settings.parse(settings), child_environment())
    oldest = re.sub(r"[^\d.]", "", tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"])
    for device in DEVICES:
        out = f"{LOCKS}/{device}.txt"
        command = [python, "-m", "uv", "pip", "compile", "-", "--quiet", "--universal", "--python-version", oldest]
        command += ["--no-annotate", "--custom-compile-command", "make lock", "--output-file", out, *sys.argv[1:]]
        if device == "cpu":
            command += ["--excludes", NOT_ON_A_CPU]
        else:  # links may lead to a CPU build of torch, the version of which is higher
            environment.pop("UV_FIND_LINKS", None)
        wanted = "\n".join(requirements(ROOT, device, locked_extras(ROOT, device)))
        done = compile_lock(command, wanted, environment)
        if device == "cpu" and uv(python).lacks_version(done.stderr):
            done = compile_lock([*command, "--index", PYTORCH_CPU_INDEX], wanted, environment)
        if done.returncode:
            print(f"make lock: {out} could not be written:\n{done.stderr}", file=sys.stderr)
            return 1
        print(f"{out} is written")
    return 0


def compile_lock(command: list[str], wanted: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run uv on requirements, one a line."""
    return subprocess.run(command, input=wanted, cwd=ROOT, env=environment, capture_output=True, text=True)


if __name__ == "__main__":
    sys.exit(main())
