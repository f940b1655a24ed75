"""What this machine has: a GPU, and the tools that the install needs."""

import ctypes
import glob
import importlib.util
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable

from deploy.install.steps import Failed

DEVICES = ("cpu", "cuda")


def nvidia_gpu_present() -> bool:
    """Whether the NVIDIA driver reports a GPU on this machine."""
    if glob.glob("/proc/driver/nvidia/gpus/*"):
        return True
    if not shutil.which("nvidia-smi"):
        return False
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, errors="replace", timeout=60)
        said = " ".join((listed.stdout + listed.stderr).split())[:200] or "nothing"
        if listed.returncode == 0 and "GPU" in listed.stdout:
            return True
    except (OSError, subprocess.TimeoutExpired) as error:
        said = str(error)
    print(f"nvidia-smi shows no GPU ({said}): installing for a CPU. DEVICE=cuda installs for a GPU.", flush=True)
    return False


def choose_device(asked: str, installed: str, gpu_present: Callable[[], bool] = nvidia_gpu_present) -> str:
    """`cpu` or `cuda`: what was asked for, else what is installed already, else what the machine has.

    Raises:
        Failed: asked is neither empty nor a device.
    """
    if asked and asked not in DEVICES:
        raise Failed(f"DEVICE={asked} is not a device: use DEVICE=cpu or DEVICE=cuda, or leave it out.")
    return asked or installed or ("cuda" if gpu_present() else "cpu")


def compiler() -> str:
    """The program that CC names, which may be followed by another and by options; gcc where it names none."""
    given = os.environ.get("CC", "")
    try:
        words = shlex.split(given)
    except ValueError:  # a quote without its end
        words = given.split()
    return words[0] if words else "gcc"


def missing_tools(
    device: str,
    find_module: Callable[[str], object] = importlib.util.find_spec,
    find_program: Callable[[str], object] = shutil.which,
    load_library: Callable[[str], object] = ctypes.CDLL,
) -> list[str]:
    """One sentence for each thing that the install needs and this machine lacks."""
    missing = []
    if not (find_module("venv") and find_module("ensurepip")):
        missing.append("Python's venv module is missing (Debian: apt install python3-venv).")
    if not find_program(compiler()):
        missing.append("A C compiler is missing (Debian: apt install gcc); set CC to use another than gcc.")
    if device == "cpu":
        try:
            load_library("libnuma.so.1")
        except OSError:
            missing.append("libnuma, which vLLM needs on a CPU, is missing (Debian: apt install libnuma1).")
    return missing
