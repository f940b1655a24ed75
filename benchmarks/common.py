"""What several benchmarks need: the 48B's config, sizes, and what the machine is."""

import importlib.metadata
import platform
import re
import subprocess
from collections import Counter
from pathlib import Path

CONFIG = Path(__file__).with_name("config_48b.json")
MILLION = 1_048_000  # tokens; with an answer they fit the model's context
K, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
BANDWIDTHS = {"H200": 4.8e12, "H100": 3.35e12}  # bytes a second, by the data sheets


def processor() -> str:
    """The CPU by its own name, or the kind of machine where it does not tell."""
    found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return found.group(1) if found else platform.machine()


def gpus() -> str:
    """How many GPUs of which kind, with their driver."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return "no GPU"
    return ", ".join(f"{count} x {name}" for name, count in Counter(found).items())


def versions(*names: str) -> str:
    """Each distribution with its version."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
