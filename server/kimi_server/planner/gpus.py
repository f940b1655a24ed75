"""The machine to plan for: GPUs, probed or named, or a CPU with its memory."""

import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from kimi_server.planner import nvidia, sizes
from vllm_kimi_linear.cache.layout import MIB
from vllm_kimi_linear.config.errors import ConfigError


class Kind(NamedTuple):
    """A GPU as nvidia-smi shows it."""

    name: str  # NVIDIA's
    mib: int
    capability: tuple[int, int]  # of computing: Ampere 8.0 and 8.6, Ada 8.9, Hopper 9.0, Blackwell from 10.0 on


# Short name -> its kind.
GPUS = {
    "A10": Kind("NVIDIA A10", 23028, (8, 6)),
    "A40": Kind("NVIDIA A40", 46068, (8, 6)),
    "A100-40GB": Kind("NVIDIA A100-SXM4-40GB", 40960, (8, 0)),
    "A100-80GB": Kind("NVIDIA A100-SXM4-80GB", 81920, (8, 0)),
    "A6000": Kind("NVIDIA RTX A6000", 49140, (8, 6)),
    "B200": Kind("NVIDIA B200", 183359, (10, 0)),
    "H100-80GB": Kind("NVIDIA H100 80GB HBM3", 81559, (9, 0)),
    "H100-PCIE": Kind("NVIDIA H100 PCIe", 81559, (9, 0)),
    "H100-NVL": Kind("NVIDIA H100 NVL", 95830, (9, 0)),
    "H200": Kind("NVIDIA H200", 143771, (9, 0)),
    "L4": Kind("NVIDIA L4", 23034, (8, 9)),
    "L40": Kind("NVIDIA L40", 46068, (8, 9)),
    "L40S": Kind("NVIDIA L40S", 46068, (8, 9)),
    "RTX-3090": Kind("NVIDIA GeForce RTX 3090", 24576, (8, 6)),
    "RTX-4090": Kind("NVIDIA GeForce RTX 4090", 24564, (8, 9)),
    "RTX-5090": Kind("NVIDIA GeForce RTX 5090", 32607, (12, 0)),
    "RTX-6000-Ada": Kind("NVIDIA RTX 6000 Ada Generation", 49140, (8, 9)),
    "RTX-PRO-6000": Kind("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 97887, (12, 0)),
    "T4": Kind("Tesla T4", 15360, (7, 5)),
    "V100-32GB": Kind("Tesla V100-SXM2-32GB", 32768, (7, 0)),
}
ALIASES = {"H100": "H100-80GB", "H100-SXM": "H100-80GB"}
GPU_SHARE = 0.9  # vLLM's --gpu-memory-utilization
CPU_SHARE = 0.5  # of what is free: the server's processes themselves, and others, need the rest
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
SIZE = re.compile(r"(\d+)\s*([MG])(I?B)?", re.ASCII | re.IGNORECASE)  # in place of a GPU's name
NO_NAMES = ("ALL", "AUTO", "CPU", "NONE")


@dataclass(frozen=True)
class Machine:
    """Equal ranks to place servers on."""

    device: str  # "cuda" or "cpu"
    name: str
    count: int  # GPUs; on a CPU as many as the server has ranks
    total: int  # bytes of one
    usable: int  # bytes that a rank may take of them
    capability: tuple[int, int] | None = None  # of a GPU, where it is known

    @property
    def short(self) -> str:
        """What --gpus calls one of them; 24 GB if any will do that has so much."""
        return next((short for short, kind in GPUS.items() if kind.name == self.name), _short(self.name))

    @property
    def why(self) -> str:
        """Of a CPU, why its ranks may not use all that is free."""
        if self.device != "cpu" or self.usable == self.total:
            return ""
        half = "half" if self.count == 1 else "together half"
        return (
            f" ({half} of the {sizes.gib(self.total * self.count)} that are free; the rest is left to the processes "
            "themselves, and --memory overrides this)"
        )

    def describe(self) -> str:
        if self.device == "cpu":
            ranks = f"{self.count} ranks, " if self.count > 1 else ""
            return f"CPU, {ranks}{sizes.gib(self.usable)} for a rank{self.why}"
        total, usable = sizes.gib(self.total), sizes.gib(self.usable)
        return f"{self.count} x {self.name}, {total} each, of which a rank may use {usable}"


def machine(device: str | None, gpus: str | None, memory: str | None, ranks: int) -> Machine:
    """What --device, --gpus and --memory say, or else what is found here.

    `memory` is that of one GPU or, on a CPU, what one of the `ranks` may use for weights, activations and cache.
    Raises ConfigError.
    """
    size = sizes.memory("--memory", memory) if memory is not None else None
    if size is not None and size < MIB:  # a letter was forgotten
        raise ConfigError(f"--memory is {memory!r}, which means bytes; give a size such as 80G")
    if gpus is not None:
        if device == "cpu":
            raise ConfigError(f"--gpus is {gpus!r} with --device cpu; leave one of the two out")
        return _named(gpus, memory)
    found = [] if device == "cpu" else nvidia.probe()
    if found:
        return _probed(found, None if memory is None else _of_a_gpu("--memory", memory))
    if device == "cuda":
        raise ConfigError("--device is cuda and no GPU was found; name some with --gpus, such as 4xH100-80GB")
    if size is not None:
        return Machine("cpu", "CPU rank", ranks, size, size)
    free = available_memory() // ranks
    return Machine("cpu", "CPU rank", ranks, free, int(free * CPU_SHARE))


def _probed(found: list[nvidia.Gpu], size: int | None) -> Machine:
    """Equal GPUs, each with `size` bytes or what is shown of the least."""
    kinds = sorted({gpu.name for gpu in found})
    if len(kinds) > 1:
        raise ConfigError(
            f"--gpus names no kind and this machine has {', '.join(kinds)}; name those to use, such as 2xH100-80GB"
        )
    name = kinds[0]
    if size is None:
        if unsized := [gpu.shown for gpu in found if gpu.total is None]:
            raise ConfigError(
                f"nvidia-smi shows {unsized[0]} for the memory of {name} ({nvidia.NO_SIZE[unsized[0]]}); give what one "
                f"GPU may use with --memory 100G, or all of it with --gpus {len(found)}x{_short(name)} --memory 100G"
            )
        size = min(gpu.total for gpu in found if gpu.total is not None)
    known = [kind.capability for kind in GPUS.values() if kind.name == name]
    return _gpus(name, len(found), size, known[0] if known else nvidia.capability())


def _named(gpus: str, memory: str | None) -> Machine:
    """4xH100-80GB, H200, NVIDIA's own name, 2x24GB for any kind, or a number alone."""
    found = re.fullmatch(r"(?:(\d+)\s*[xX]\s*)?(.+)", gpus.strip(), re.ASCII)
    name = found[2].strip() if found else ""
    size, kind = None if memory is None else _of_a_gpu("--memory", memory), _kind(name)
    alone = is_number(gpus)
    number = name if alone else (found[1] or "1") if found else ""
    count = int(number) if 0 < len(number) <= 4 else 0
    if count and kind is not None:
        return _gpus(kind.name, count, size or kind.mib * MIB, kind.capability)
    if count and alone:
        return _any(count, "--memory", memory) if memory is not None else _here(count, gpus)
    if count and SIZE.fullmatch(name):
        if memory is not None:
            raise ConfigError(f"--gpus is {gpus!r}, which says their memory; leave --memory out")
        return _any(count, "--gpus", name)
    if not count or not _may_be_a_name(name):
        raise ConfigError(f"--gpus is {gpus!r}; give a number and a name or a size, such as 4xH100-80GB or 2x24GB")
    if size is None:
        likely = [short for short in GPUS if _letters(name) and _letters(short).startswith(_letters(name))]
        names = ", ".join(likely or GPUS)
        raise ConfigError(f"--gpus is {gpus!r}; give one of {names}, or in place of the name a size, such as 2x24GB")
    return _gpus(name, count, size, None)


def is_number(gpus: str) -> bool:
    """Whether --gpus says how many and not which; four digits are a name such as 4090."""
    return re.fullmatch(r"\d{1,3}", gpus.strip(), re.ASCII) is not None


def _here(count: int, gpus: str) -> Machine:
    """So many of the GPUs that this machine has, or would have."""
    if not (found := nvidia.probe()):
        raise ConfigError(
            f"--gpus is {gpus!r}, a number, and this machine has no GPU; give the kind or the memory of each, such as "
            f"{count}xH100-80GB or {count}x24GB"
        )
    return replace(_probed(found, None), count=count)


def _any(count: int, flag: str, text: str) -> Machine:
    """GPUs of any kind with so much memory each."""
    size = _of_a_gpu(flag, text)
    name = f"{size // MIB} MiB"
    if found := SIZE.fullmatch(text.strip()):
        name = f"{int(found[1])} {found[2].upper()}{'B' if (found[3] or '').upper() == 'B' else 'iB'}"
    return _gpus(name, count, size, None)


def _of_a_gpu(flag: str, text: str) -> int:
    """Bytes of a GPU of 24G or 24GiB, or of the least that is sold with 24GB: such have 22.5 to 24 GiB."""
    size = sizes.memory(flag, text)
    if not text.strip().upper().endswith("GB"):
        return size
    most = size * 1024**3 // 1000**3
    return min((kind.mib * MIB for kind in GPUS.values() if size <= kind.mib * MIB <= most), default=size)


def _may_be_a_name(name: str) -> bool:
    """Whether a GPU that is not known can be called so: not 2x, x24, -1xH100, H100x2 or cpu."""
    if not re.fullmatch(r"[A-Z][\w .+()/-]*", name, re.ASCII | re.IGNORECASE) or name.upper() in NO_NAMES:
        return False
    rest = re.sub(r"^x\s*", "", name, flags=re.IGNORECASE)
    if rest != name and not rest[:1].isalpha():
        return False
    before = re.sub(r"\s*x\s*\d+$", "", rest, flags=re.ASCII | re.IGNORECASE)
    numbered = before != rest and before[-1:].isdigit()
    return not numbered and all(_kind(part) is None for part in {rest, before, re.sub(r"x$", "", rest)})


def _kind(name: str) -> Kind | None:
    """Of a short name, an alias or NVIDIA's own name, however it is spaced."""
    known = {_letters(alias): GPUS[short] for alias, short in ALIASES.items()}
    for short, kind in GPUS.items():
        known |= {_letters(short): kind, _letters(kind.name): kind}
    return known.get(_letters(name))


def _letters(name: str) -> str:
    """What tells one GPU from another: RTX-4090, rtx 4090 and NVIDIA GeForce RTX 4090 are 4090."""
    return re.sub(r"NVIDIA|GEFORCE|TESLA|RTX|[\s_-]", "", name.upper())


def _short(name: str) -> str:
    return name if SIZE.fullmatch(name) else name.removeprefix("NVIDIA ").replace(" ", "-")


def of_kind(short: str, count: int) -> Machine:
    """`count` GPUs of a kind of `GPUS`."""
    kind = GPUS[short]
    return _gpus(kind.name, count, kind.mib * MIB, kind.capability)


def _gpus(name: str, count: int, total: int, capability: tuple[int, int] | None) -> Machine:
    return Machine("cuda", name, count, total, int(total * GPU_SHARE), capability)


def available_memory(meminfo: Path = Path("/proc/meminfo"), limit: Path = CGROUP_LIMIT) -> int:
    """Bytes of memory that are free or can be freed, in a container at most its `limit`.

    Raises ConfigError where the system does not say.
    """
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo.read_text(), re.MULTILINE)
    except OSError:
        found = None
    if not found:
        raise ConfigError(f"--memory is unset and {meminfo} does not say what is available; give it, such as 16G")
    return min(int(found[1]) * 1024, container_limit(limit) or sys.maxsize)


def container_limit(limit: Path = CGROUP_LIMIT) -> int | None:
    """Bytes that this container may use; None without such a limit, where the file is not there or says `max`."""
    try:
        return int(limit.read_text())
    except (OSError, ValueError):
        return None
