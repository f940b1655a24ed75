"""What the tests of the demo package share: its checkpoints, and the HF reference of the first."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kimi_demo.checkpoint import write_checkpoint
from kimi_demo.reference import HfReference


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The matrices are tiny: more threads only wait for each other, for long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def remote_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint with a tokenizer and model classes of its own, for --trust-remote-code."""
    path = tmp_path_factory.mktemp("remote")
    write_checkpoint(path, remote_code=True)
    return path


@pytest.fixture(scope="session")
def reference(demo_model: Path) -> HfReference:
    return HfReference(demo_model)


@pytest.fixture(scope="session")
def ids() -> list[int]:
    """160 random tokens: more than two chunks of the reference's chunk form."""
    return random.Random(0).choices(range(1024), k=160)


@pytest.fixture(scope="session")
def right(reference: HfReference, ids: list[int]) -> torch.Tensor:
    """The reference's logits [160, 1024] of `ids`."""
    return reference.logits(ids)
