"""Fixtures that start gateways and write files of keys."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kimi_server.gateway.keys import limits
from tests.support.gateway import Start, starting


@pytest.fixture
def start() -> Iterator[Start]:
    """`start(upstream, ..., admission={}, limits={}, **settings)`: a gateway in front of these, with all of them up.

    `wait=False` does not wait until they are; `replicas=...` are those of the settings, in place of the stand-ins'.
    """
    with starting() as start:
        yield start


@pytest.fixture(scope="module")
def start_module() -> Iterator[Start]:
    """The same for all tests of a file."""
    with starting() as start:
        yield start


@pytest.fixture
def keys_file(tmp_path: Path) -> Callable[..., Path]:
    """`keys_file(alice={...limits}, ...)` writes a file in which the key of each is `sk-` and the name."""
    from kimi_server.gateway.keys.keys_file import digest

    def write(**people: dict[str, Any]) -> Path:
        path = tmp_path / "keys.yaml"
        keys = [{"id": name, "sha256": digest(f"sk-{name}"), **limits} for name, limits in people.items()]
        path.write_text(json.dumps({"keys": keys}))  # JSON is YAML
        return path

    return write


@pytest.fixture
def time_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the keys' limits, which refill by the clock: what is left must not depend on how long a request took."""
    now = time.monotonic()
    monkeypatch.setattr(limits, "time", SimpleNamespace(monotonic=lambda: now))
