"""What the Dockerfiles tell pip to install can be had together, and nothing of the base image is replaced.

Asks the package index that is configured here for metadata; nothing is installed.
"""

import re
import subprocess
import sys
from importlib.util import find_spec

import pytest

from deploy.install import packages, pip_settings
from deploy.install.__main__ import child_environment
from tests.support.dockerfiles import ROOT, instructions

PYTHON = "3.12"  # of the base images
NO_INDEX = r"(?i)failed to fetch|error sending request|dns error|connection refused"
pytestmark = pytest.mark.skipif(not find_spec("uv"), reason="uv is not installed: `make install` brings it")


def extras(dockerfile: str) -> list[str]:
    """Those of the one `pip install` in it."""
    [named] = [found for _, argument in instructions(dockerfile) for found in re.findall(r"'\.\[([\w,]+)\]'", argument)]
    return named.split(",")


def resolve(wanted: list[str], *options: str) -> str:
    """One `name==version` a line; fails where there is no such set of versions."""
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    environment = pip_settings.uv_environment(pip_settings.parse(listing.stdout), child_environment())
    command = [sys.executable, "-m", "uv", "pip", "compile", "-", "--quiet", "--no-annotate", "--no-header"]
    command += ["--python-version", PYTHON, "--python-platform", "x86_64-manylinux_2_28", *options]
    done = subprocess.run(
        command, input="\n".join(wanted), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    if done.returncode and re.search(NO_INDEX, done.stderr):
        pytest.skip(f"no package index answers: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_the_cuda_image_keeps_the_vllm_of_its_base() -> None:
    base = dict(instructions("Dockerfile"))["ARG"].rpartition(":v")[2]
    device, *others = extras("Dockerfile")
    wanted = packages.requirements(ROOT, device, others)
    resolved = resolve([*wanted, f"vllm=={base}"])
    assert f"vllm=={base}\n" in resolved
    assert {"ray", "fla-core", "fastapi"} <= set(re.findall(r"^([\w-]+)==", resolved, re.MULTILINE))


def test_the_gateway_image_takes_the_versions_of_the_lock() -> None:
    first, *others = extras("deploy/Dockerfile.gateway")
    resolved = resolve(
        packages.requirements(ROOT, first, others), "--constraint", f"{packages.LOCKS}/cpu.txt"
    ).splitlines()
    locked = (ROOT / packages.LOCKS / "cpu.txt").read_text().splitlines()
    assert {line.partition(" ")[0] for line in resolved} <= {line.partition(" ")[0] for line in locked}
    assert not [line for line in resolved if re.match(r"(torch|vllm|numpy|transformers)==", line)]
