"""The tests of the Triton kernels, on the CPU: in processes of their own, with Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[3]


# Two run on every backend; their `backend` is the one for GPUs there.
@pytest.mark.parametrize("selected", ["not soak", pytest.param("soak", marks=pytest.mark.soak)])
@pytest.mark.parametrize(
    "name",
    [
        "test_all_reduce",
        "test_cuda_interpreter",
        "test_decode_step",
        "test_prefill_checkpoints",
        "test_spec_decode",
        "test_stored_weights",
    ],
)
def test_in_the_interpreter(name: str, selected: str) -> None:
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "server"), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    file = ROOT / "tests" / "unit" / "kernels" / f"{name}.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", selected, str(file)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    if selected == "soak" and done.returncode == 5:
        pytest.skip("it has no long form")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
