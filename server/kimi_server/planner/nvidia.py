"""Probes GPUs with nvidia-smi; what cannot be planned for raises ConfigError with one sentence."""

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import tempfile
from dataclasses import dataclass

from vllm_kimi_linear.cache.layout import MIB
from vllm_kimi_linear.config.errors import ConfigError

QUERY = ("--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
CAPABILITY_QUERY = ("--query-gpu=compute_cap", "--format=csv,noheader")
MIG_QUERY = ("--query-gpu=mig.mode.current", "--format=csv,noheader")
PATIENCE = 60.0  # seconds: it loads the driver first, which takes long where there are many GPUs
# What stands in place of a size -> when it does.
NO_SIZE = {
    "[N/A]": "a GPU that shares the machine's memory has no size of its own",
    "[Not Supported]": "a GPU that shares the machine's memory has no size of its own",
    "[Insufficient Permissions]": "as in a container with a slice of a GPU (MIG)",
    "0": "a GPU that shares the machine's memory has no size of its own",
}
REMEDY = "name the GPUs with --gpus, such as 4xH100-80GB, or plan for a CPU with --device cpu"


@dataclass(frozen=True)
class Gpu:
    name: str
    total: int | None  # bytes; None where nvidia-smi shows no size
    shown: str  # for the size


def probe() -> list[Gpu]:
    """Every GPU that CUDA_VISIBLE_DEVICES leaves; [] where it leaves none, or where there is no nvidia-smi.

    Raises ConfigError where nvidia-smi is there and fails, or shows what cannot be understood.
    """
    visible = _visible()
    program = shutil.which("nvidia-smi")
    if program is None or visible == []:
        return []
    chosen = ("-i", ",".join(visible)) if visible else ()
    found = [_read(line) for line in _ask(program, *QUERY, *chosen).splitlines() if line.strip()]
    if not found:
        raise ConfigError(f"nvidia-smi printed nothing; {REMEDY}")
    with contextlib.suppress(_Failed):  # a driver that does not know the question divides no GPU
        if "Enabled" in _ask(program, *MIG_QUERY, *chosen).split():
            raise _slices("nvidia-smi shows a GPU that is divided (MIG)")
    return found


def capability() -> tuple[int, int] | None:
    """The least compute capability of the GPUs that `probe` found; None where nvidia-smi does not say it."""
    program, visible = shutil.which("nvidia-smi"), _visible()
    chosen = ("-i", ",".join(visible)) if visible else ()
    try:
        lines = _ask(program, *CAPABILITY_QUERY, *chosen).split("\n") if program else []
    except _Failed:  # an older driver does not know the question
        return None
    found = [re.fullmatch(r"(\d{1,3})\.(\d{1,3})", line.strip(), re.ASCII) for line in lines]
    return min(((int(one[1]), int(one[2])) for one in found if one), default=None)


class _Failed(ConfigError):
    """nvidia-smi did not answer."""


def _visible() -> list[str] | None:
    """The GPUs that CUDA_VISIBLE_DEVICES names, up to the first that it cannot mean, as CUDA reads it; None: all."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return None
    names = [name.strip() for name in given.split(",")]
    if names[0].startswith("MIG-"):
        raise _slices(f"CUDA_VISIBLE_DEVICES is {given!r}")
    return list(itertools.takewhile(lambda name: re.fullmatch(r"\d+|GPU-[\w-]+", name, re.ASCII), names))


def _slices(why: str) -> ConfigError:
    return ConfigError(f"{why}, and the size of a slice is not known; give it, such as --gpus 1xH100-MIG --memory 20G")


def _ask(program: str, *arguments: str) -> str:
    """What nvidia-smi prints; raises _Failed with what it said instead."""
    called = " ".join(["nvidia-smi", *(one for one in arguments if not one.startswith("--"))])
    # Files and not pipes, a session of its own, and no waiting for its end: one that hangs in the driver cannot be
    # killed, and its children may hold a pipe open.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            process = subprocess.Popen(
                [program, *arguments], stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )
        except OSError as error:
            raise _Failed(f"{called} cannot be run ({error.strerror}); {REMEDY}") from None
        try:
            status = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
            raise _Failed(f"{called} did not end within {PATIENCE:g} seconds; {REMEDY}") from None
        out.seek(0)
        err.seek(0)
        said, complained = (file.read().decode(errors="replace") for file in (out, err))
    if status:
        reason = _short(f"{said} {complained}") or "it printed nothing"
        raise _Failed(f"{called} failed with status {status} ({reason}); {REMEDY}")
    return said


def _read(line: str) -> Gpu:
    """One line of the answer: a name, which may hold commas, and MiB."""
    found = re.fullmatch(r"(.*\S)\s*,\s*(.+)", _short(line, 400))
    size = re.fullmatch(r"(\d{1,9})(?: MiB)?", found[2], re.ASCII) if found else None
    if found and size and int(size[1]):
        return Gpu(found[1], int(size[1]) * MIB, size[0])
    if found and found[2] in NO_SIZE:
        return Gpu(found[1], None, found[2])
    raise ConfigError(f"nvidia-smi printed {_short(line)!r} where a GPU's name and MiB were expected; {REMEDY}")


def _short(text: str, most: int = 200) -> str:
    """One printable line of it."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in " ".join(text.split()))[:most]
