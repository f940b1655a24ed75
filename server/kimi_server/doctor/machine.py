"""The machine: processor, memory, GPUs, compiler, and a library that vLLM loads on a CPU."""

import ctypes
import os
import platform
import shutil
import subprocess
from pathlib import Path

from kimi_server.doctor.finding import Finding
from kimi_server.planner import nvidia
from kimi_server.planner.gpus import CGROUP_LIMIT, available_memory, container_limit
from kimi_server.planner.plan import LEAST_CAPABILITY
from kimi_server.planner.sizes import gib
from vllm_kimi_linear.config.errors import ConfigError

# What kernels, ours and oneDNN's, choose by.
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
CPUINFO = Path("/proc/cpuinfo")


def processor(cpuinfo: Path = CPUINFO, machine: str = platform.machine()) -> Finding:
    """Cores that this process may use, and the instruction sets that matter."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    words = {word for line in lines if line.lower().startswith(("flags", "features")) for word in line.split()}
    flags = [flag for flag in CPU_FLAGS if flag in words]
    shown = f"{machine}, {len(os.sched_getaffinity(0))} cores, {' '.join(flags) or 'no vector instructions'}"
    if machine == "x86_64" and "avx2" not in flags:
        return Finding("fault", "processor", f"{shown}: vLLM's CPU build needs AVX2; take another machine, or a GPU")
    return Finding("ok", "processor", shown)


def memory(limit: Path = CGROUP_LIMIT) -> Finding:
    """What is free; in a container, not more than it may use."""
    try:
        free = gib(available_memory(limit=limit))
    except ConfigError as error:
        return Finding("warning", "memory", str(error))
    most = container_limit(limit)
    return Finding("ok", "memory", f"{free} free" + (f", of at most {gib(most)} in this container" if most else ""))


def gpus() -> tuple[Finding, bool]:
    """The GPUs, and whether there are any to serve on."""
    try:
        found = nvidia.probe()
    except ConfigError as error:
        return Finding("fault", "GPUs", str(error)), True
    if not found:
        return Finding("ok", "GPUs", "none"), False
    kinds = [(gpu.name, gpu.shown if gpu.total is None else gib(gpu.total)) for gpu in found]
    shown = ", ".join(f"{kinds.count(kind)} x {' with '.join(kind)}" for kind in dict.fromkeys(kinds))
    least = nvidia.capability()
    if least is not None and least < LEAST_CAPABILITY:
        number, needed = ("{}.{}".format(*one) for one in (least, LEAST_CAPABILITY))
        text = f"{shown}: compute capability {number} has no bfloat16; take GPUs of {needed} or higher"
        return Finding("fault", "GPUs", text), True
    return Finding("ok", "GPUs", shown), True


def compiler(on_gpu: bool) -> Finding:
    """The C compiler: Triton calls it at every start on a GPU, the install once for the CPU kernels."""
    program = next(
        (path for name in (os.environ.get("CC"), "gcc", "cc") if name and (path := shutil.which(name))), None
    )
    if program is None:
        why = "Triton compiles with one at the start" if on_gpu else "the CPU kernels are built with one at the install"
        remedy = "install gcc (Debian: apt install gcc), or name another with CC"
        return Finding("fault" if on_gpu else "warning", "compiler", f"there is none, and {why}: {remedy}")
    try:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, errors="replace", timeout=60)
        version = said.stdout.partition("\n")[0]
    except (OSError, subprocess.TimeoutExpired):
        version = "which does not say its version"
    return Finding("ok", "compiler", f"{program}: {version}")


def libnuma() -> Finding:
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        text = "libnuma.so.1 is missing, which vLLM's CPU build loads: install it (Debian: apt install libnuma1)"
        return Finding("fault", "libnuma", text)
    return Finding("ok", "libnuma", "loads")
