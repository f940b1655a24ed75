"""setup.py: the C files of the kernels are compiled side by side, and one that fails fails the build as before."""

import importlib.util
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import setuptools
from setuptools import Distribution
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    """setup.py's build_ext, which only compiles, on a machine of two cores."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **more: given.update(more))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    spec = importlib.util.spec_from_file_location("kimi_linear_setup", ROOT / "setup.py")
    assert spec and spec.loader
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    kind = given["cmdclass"]["build_ext"]
    monkeypatch.setattr(kind.__bases__[0], "build_extension", lambda self, extension: extension(self.compiler))
    return kind(Distribution())


def test_two_at_once_and_in_order(command: Any) -> None:
    both = threading.Barrier(2, timeout=30)

    def compile(sources: list[str], **options: object) -> list[str]:
        both.wait()
        assert options == {"debug": 1}
        return [source.replace(".c", ".o") for source in sources]

    command.compiler = SimpleNamespace(compile=compile)
    made: list[str] = []
    command.build_extension(lambda compiler: made.extend(compiler.compile(["b.c", "a.c"], debug=1)))
    assert made == ["b.o", "a.o"]


def test_a_file_that_fails_is_told(command: Any) -> None:
    def compile(sources: list[str], **options: object) -> list[str]:
        if sources == ["a.c"]:
            raise CompileError("a.c")
        return sources

    command.compiler = SimpleNamespace(compile=compile)
    with pytest.raises(CompileError):
        command.build_extension(lambda compiler: compiler.compile(["b.c", "a.c"]))
