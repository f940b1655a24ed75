"""The reference's answers that the tests of this folder compare a server's with."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from kimi_demo.reference import HfReference
from kimi_demo.server import Server
from tests.conftest import FLAGS
from tests.support.completions import Completions
from tests.support.prompts import Case, Stream, draw_cases, draw_growing, sizes


@pytest.fixture(scope="session")
def reference(demo_model: Path) -> HfReference:
    # On few cores one thread: those of the reference and of a server that wait for each other cost more.
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // 8))
    return HfReference(demo_model)


@pytest.fixture(scope="session")
def vocab(reference: HfReference) -> int:
    return reference.model.config.vocab_size


@pytest.fixture
def server(servers: Callable[..., Server], demo_model: Path) -> Completions:
    """The server of the default test flags."""
    return Completions(servers(demo_model, *FLAGS))


@pytest.fixture(scope="session")
def cases(reference: HfReference, vocab: int, servers: Callable[..., Server], demo_model: Path) -> list[Case]:
    """24 prompts of 1 to 2,000 tokens with the reference's greedy answers of up to 300."""
    server = Completions(servers(demo_model, *FLAGS))
    stream = Stream(vocab, seed=1)
    wanted = [(partial(stream.prompt, length), tokens) for length, tokens in sizes()]
    return draw_cases(reference, wanted, server.at_once)


@pytest.fixture(scope="session")
def growing(reference: HfReference, vocab: int, servers: Callable[..., Server], demo_model: Path) -> list[Case]:
    return draw_growing(reference, vocab, Completions(servers(demo_model, *FLAGS)).at_once)
