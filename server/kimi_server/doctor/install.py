"""The installed software: Python, vLLM, and the kernels that would serve."""

import json
import platform
import subprocess
import sys
from importlib import metadata

from kimi_server.doctor.finding import Finding
from vllm_kimi_linear import __version__
from vllm_kimi_linear.supported import install_check

KERNEL_SECONDS = 300.0  # to import torch, on a slow disk
HEAD_DIM = 128  # of the 48B
# In a process of its own: what torch cannot load may end the process.
ASK = """
import json, sys, torch
from kda_kernels import interface
device, dtype = sys.argv[1], getattr(torch, sys.argv[2])
print(json.dumps(interface.describe(device, dtype, int(sys.argv[3]))))
"""


def software() -> list[Finding]:
    """The versions, or every fault that `install_check` finds."""
    ours = f"vllm-kimi-linear {__version__}, Python {platform.python_version()}"
    found = [Finding("ok", "plugin", ours)]
    if problems := install_check.problems():
        return [*found, *(Finding("fault", "vLLM", sentence.rstrip(".")) for sentence in problems)]
    versions = f"vLLM {metadata.version('vllm')}, supported ({install_check.SUPPORTED})"
    return [*found, Finding("ok", "vLLM", f"{versions}; torch {metadata.version('torch')}")]


def kernels(device: str) -> Finding:
    """Which KDA kernels serve on `device`, cpu or cuda, as the server's log would say it."""
    command = [sys.executable, "-c", ASK, device, "bfloat16", str(HEAD_DIM)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=KERNEL_SECONDS)
    except subprocess.TimeoutExpired:
        return Finding("fault", "kernels", f"torch did not load within {KERNEL_SECONDS:g} seconds; try again")
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        return Finding("fault", "kernels", f"they do not load ({reason}): {install_check.REMEDY}")
    name, reason = json.loads(done.stdout.splitlines()[-1])
    if name == "reference":
        return Finding("warning", "kernels", f"slow ones in plain torch, because {reason}")
    return Finding("ok", "kernels", reason)
