"""The machine to plan for: GPUs, probed or named, or a CPU with its memory."""

import re
from dataclasses import dataclass
from pathlib import Path

from kimi_server.planner import nvidia, sizes
from vllm_kimi_linear.cache.layout import MIB
from vllm_kimi_linear.config.errors import ConfigError

# Short name -> NVIDIA's name and the MiB that nvidia-smi shows for it.
GPUS = {
    "A10": ("NVIDIA A10", 23028),
    "A100-40GB": ("NVIDIA A100-SXM4-40GB", 40960),
    "A100-80GB": ("NVIDIA A100-SXM4-80GB", 81920),
    "A6000": ("NVIDIA RTX A6000", 49140),
    "B200": ("NVIDIA B200", 183359),
    "H100-80GB": ("NVIDIA H100 80GB HBM3", 81559),
    "H100-PCIE": ("NVIDIA H100 PCIe", 81559),
    "H100-NVL": ("NVIDIA H100 NVL", 95830),
    "H200": ("NVIDIA H200", 143771),
    "L4": ("NVIDIA L4", 23034),
    "L40S": ("NVIDIA L40S", 46068),
    "RTX-3090": ("NVIDIA GeForce RTX 3090", 24576),
    "RTX-4090": ("NVIDIA GeForce RTX 4090", 24564),
    "RTX-5090": ("NVIDIA GeForce RTX 5090", 32607),
}
GPU_SHARE = 0.9  # vLLM's --gpu-memory-utilization
CPU_SHARE = 0.5  # of what is free: the server's processes themselves, and others, need the rest


@dataclass(frozen=True)
class Machine:
    """Equal ranks to place servers on."""

    device: str  # "cuda" or "cpu"
    name: str
    count: int  # GPUs; on a CPU as many as the server has ranks
    total: int  # bytes of one
    usable: int  # bytes that a rank may take of them

    def describe(self) -> str:
        return f"{self.count} x {self.name}, {sizes.gib(self.total)} each, {sizes.gib(self.usable)} of it for a rank"


def machine(device: str | None, gpus: str | None, memory: str | None, ranks: int) -> Machine:
    """What --device, --gpus and --memory say, or else what is found here.

    `memory` is that of one GPU or, on a CPU, what one of the `ranks` may use for weights, activations and cache.
    Raises ConfigError.
    """
    size = sizes.parse("--memory", memory, "80G") if memory is not None else None
    if gpus is not None:
        if device == "cpu":
            raise ConfigError(f"--gpus is {gpus!r} with --device cpu; leave one of the two out")
        return _named(gpus, size)
    found = [] if device == "cpu" else nvidia.probe()
    if found:
        return _probed(found, size)
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
            f"--gpus is unset and this machine has {', '.join(kinds)}; name those to use, such as 2xH100-80GB"
        )
    name = kinds[0]
    if size is None:
        if unsized := [gpu.shown for gpu in found if gpu.total is None]:
            short = name.removeprefix("NVIDIA ").replace(" ", "-")
            raise ConfigError(
                f"nvidia-smi shows {unsized[0]} for the memory of {name} ({nvidia.NO_SIZE[unsized[0]]}); give what one "
                f"GPU may use with --memory 100G, or all of it with --gpus {len(found)}x{short} --memory 100G"
            )
        size = min(gpu.total for gpu in found if gpu.total is not None)
    return _gpus(name, len(found), size)


def _named(gpus: str, size: int | None) -> Machine:
    """4xH100-80GB, H200, or NVIDIA's own name."""
    found = re.fullmatch(r"(?:(\d+)\s*[xX]\s*)?(.+)", gpus.strip(), re.ASCII)
    count = int(found[1] or 1) if found and len(found[1] or "") <= 4 else 0
    if not found or not count:
        raise ConfigError(f"--gpus is {gpus!r}; give a number and a name, such as 4xH100-80GB")
    known = {short.upper(): row for short, row in GPUS.items()} | {row[0].upper(): row for row in GPUS.values()}
    row = known.get(found[2].strip().upper())
    if row is None and size is None:
        raise ConfigError(f"--gpus is {gpus!r}; give one of {', '.join(GPUS)}, or what one GPU has with --memory 80G")
    name, mib = row or (found[2].strip(), 0)
    return _gpus(name, count, size or mib * MIB)


def _gpus(name: str, count: int, total: int) -> Machine:
    return Machine("cuda", name, count, total, int(total * GPU_SHARE))


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes of memory that are free or can be freed; raises ConfigError where the system does not say."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo.read_text(), re.MULTILINE)
    except OSError:
        found = None
    if not found:
        raise ConfigError(f"--memory is unset and {meminfo} does not say what is available; give it, such as 16G")
    return int(found[1]) * 1024
