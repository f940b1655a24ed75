"""Bring the environment to what the tree asks for: nothing, more extras, this project again, all of it, or all anew."""

import argparse
import fcntl
import os
import subprocess
import sys
from pathlib import Path

from deploy.install import stamp
from deploy.install.machine import choose_device, missing_tools
from deploy.install.packages import (
    Tool,
    by_the_first_that_can,
    install_dependencies,
    install_project,
    pip,
    requirements,
    tools,
    uv,
)
from deploy.install.steps import Failed, Steps

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = "server,test"  # of pyproject.toml, beside the device's own
# What would make pip or uv install elsewhere, ask, or import another tree.
DROPPED = (
    *("PYTHONPATH", "PYTHONHOME", "PIP_USER", "PIP_TARGET", "PIP_PREFIX"),
    *("UV_PYTHON", "UV_SYSTEM_PYTHON", "UV_PROJECT", "UV_WORKING_DIR", "UV_NO_EDITABLE"),
)


def check_place(venv: Path) -> None:
    """Raises Failed where something stands that no install made: an environment made anew replaces all of it."""
    marks = ("pyvenv.cfg", "install.log", stamp.NAME)
    if venv.exists() and not (venv.is_dir() and (any((venv / mark).exists() for mark in marks) or _is_empty(venv))):
        raise Failed(f"--venv is {str(venv)!r}, no virtual environment, and would be deleted: name another folder.")


def _is_empty(folder: Path) -> bool:
    return next(folder.iterdir(), None) is None


def child_environment() -> dict[str, str]:
    """The caller's environment without what is DROPPED."""
    kept = {name: value for name, value in os.environ.items() if name not in DROPPED}
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


def install(root: Path, venv: Path, device: str, todo: stamp.Todo, extras: str = EXTRAS) -> None:
    """Carry out what `decide` said; the stamp is the caller's."""
    wanted = requirements(root, device, [extra for extra in extras.split(",") if extra])
    steps = Steps(venv / "install.log", root, child_environment())
    python = str(venv / "bin" / "python")
    if todo == "anew":
        if venv.exists():
            steps.run(f"removing {venv.name}, unfinished or for another device", ["rm", "-rf", str(venv)])
        # From inside an environment, perhaps this very one, the Python that it was made from.
        base = getattr(sys, "_base_executable", sys.executable)
        steps.run(f"a new environment in {venv.name}", [base, "-m", "venv", str(venv)])

    def with_dependencies(tool: Tool) -> None:
        install_dependencies(steps, tool, root, device, wanted)
        if todo != "extras":
            install_project(steps, tool, root, device)

    if todo == "project":
        has_uv = (venv / "bin" / "uv").exists()
        present = [uv(python), pip(python)] if has_uv else [pip(python)]
        by_the_first_that_can(present, lambda tool: install_project(steps, tool, root, device))
    else:
        by_the_first_that_can(tools(steps, python), with_dependencies)
    steps.run("checking", [python, "-m", "vllm_kimi_linear.supported.install_check"])


def main() -> int:
    """Bring the environment to what the tree asks for; 0 when it is there."""
    parser = argparse.ArgumentParser(prog="make install", description=__doc__)
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
                print("Waiting for another install in this folder to finish.", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            found = stamp.read(venv)
            device = choose_device(arguments.device, (found or {}).get("device", ""))
            wanted = stamp.fingerprint(ROOT, device, arguments.extras)
            todo = stamp.decide(found, wanted, python_works(venv / "bin" / "python"))
            if todo == "nothing":
                return 0
            if todo == "anew":
                check_place(venv)
            if missing := missing_tools(device):
                raise Failed("\n".join(missing))
            if found and todo != "anew":
                wanted = stamp.with_extras_of(found, wanted)
            stamp.remove(venv)
            install(ROOT, venv, device, todo, wanted["extras"])
            stamp.write(venv, wanted)
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
