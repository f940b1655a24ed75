"""Does this plugin fit another vLLM? Says what does not, hook by hook and test by test.

    python -m tests.newer_vllm                    the newest that pip finds
    python -m tests.newer_vllm --vllm 0.34.0      a version
    python -m tests.newer_vllm --vllm FOLDER      one that lies unpacked in FOLDER/vllm
    python -m tests.newer_vllm --vllm 0.33.0 --record     also writes tests/unit/plugin/hooks/0.33.json

The wheel is fetched without what it needs, and its Python files are read and, in processes of their own, imported in
place of the installed vLLM: schedulers, managers of the cache and metadata run there, kernels and whole servers do not.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tests.support.vllm_sources import Sources, fits
from vllm_kimi_linear.patches.all import patches
from vllm_kimi_linear.supported import install_check

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "tests" / "unit" / "plugin" / "hooks"
# What runs with no more of a vLLM than its Python files.
TESTS = (
    "unit/plugin/test_patches.py",
    "unit/plugin/test_kda_metadata.py",
    "unit/plugin/test_model_state.py",
    "unit/plugin/test_steady_steps.py",
    "unit/plugin/test_steady_vllm.py",
    "unit/plugin/test_cache_policy.py",
    "unit/plugin/test_cache_check.py",
    "unit/plugin/test_cache_layout.py",
    "e2e/plugin/test_scheduled_states.py",
    "e2e/plugin/test_steady_runner.py",
    "unit/plugin/test_kda_step.py",
    "unit/plugin/test_config.py",
    "unit/plugin/test_config_kinds.py",
    "unit/plugin/test_weights.py",
    "unit/plugin/test_adapters.py",
)


def fetch(version: str, folder: Path) -> None:
    """Unpack the Python files of a wheel from the configured index into `folder`."""
    wanted = "vllm" if version == "newest" else f"vllm=={version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), wanted]
    subprocess.run(command, check=True)
    [wheel] = folder.glob("vllm-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if not name.endswith(".so")])
    wheel.unlink()


def version_of(folder: Path) -> str:
    """Of the distribution that was unpacked there."""
    [info] = folder.glob("vllm-*.dist-info")
    return info.name.removesuffix(".dist-info").split("-")[1]


def misfits(folder: Path, record: bool) -> list[str]:
    """A sentence for each hook that does not fit the sources in `folder`/vllm."""
    sources, found, seen = Sources(folder / "vllm"), [], {}
    for name, patch in patches().items():
        for hook in patch.hooks:
            parameters = seen[hook.target] = sources.parameters(hook.target)
            if not fits(hook.parameters, parameters):
                what = "is not there" if parameters is None else f"takes ({parameters})"
                found.append(f"{name}: {hook.target} {what}, expected ({hook.parameters})")
    if record:
        path = RECORDS / f"{install_check.series(version_of(folder))}.json"
        path.write_text(json.dumps(dict(sorted(seen.items())), indent=2) + "\n")
    return found


def failing_tests(folder: Path) -> list[str]:
    """Those of the plugin's unit tests that fail with the vLLM in `folder`, with their last line."""
    tests = [str(ROOT / "tests" / name) for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-rfE", *tests]
    paths = os.pathsep.join([str(folder), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "VLLM_TARGET_DEVICE": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode and not lines:
        lines = [(done.stdout + done.stderr).strip().splitlines()[-1]]
    return lines


def main() -> int:
    """1 where something does not fit."""
    parser = argparse.ArgumentParser(prog="python -m tests.newer_vllm", description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", default="newest", help="a version, or a folder with one")
    parser.add_argument("--record", action="store_true", help="write down what the hooks' targets take")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.vllm)
        if not (folder / "vllm").is_dir():
            folder = Path(scratch)
            fetch(args.vllm, folder)
        found = [*misfits(folder, args.record), *failing_tests(folder)]
        version = version_of(folder)
    print(f"vLLM {version}:", "all fits" if not found else f"{len(found)} misfits")
    print(*found, sep="\n")
    if not install_check.is_known(version):
        print(f"It is not among the supported: {install_check.SUPPORTED}.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
