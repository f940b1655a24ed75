"""Finds and loads the C library of the CPU kernels; ImportError says why there is none and how to get it."""

import ctypes
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

# The C code calls an OpenMP runtime that it does not bring along; torch, imported, has loaded the one to share.
import torch  # noqa: F401

FOLDER = Path(__file__).parent
REMEDY = "install gcc, then install this package again to build them"


def load(call_size: int) -> ctypes.CDLL:
    """The library, its functions typed, if its struct kda_call has `call_size` bytes.

    Raises ImportError with a sentence for `ops.describe` otherwise.
    """
    built = [path for suffix in EXTENSION_SUFFIXES if (path := FOLDER / f"_kda{suffix}").is_file()]
    if not built:
        raise ImportError(f"the C kernels were not built; {REMEDY}")
    _share_openmp()
    try:
        library = ctypes.CDLL(str(built[0]))
        library.kda_run.argtypes = [ctypes.c_char_p]
        for function in (library.kda_run, library.kda_call_size, library.kda_best_isa):
            function.restype = ctypes.c_int64
    except (OSError, AttributeError) as error:
        raise ImportError(f"the C kernels in {built[0].name} cannot be loaded ({error}); {REMEDY}") from error
    if library.kda_call_size() != call_size:
        raise ImportError(f"the C kernels in {built[0].name} are of another version; {REMEDY}")
    return library


def _share_openmp() -> None:
    """Make the OpenMP runtime of this process visible to the library; if there is none, load the system's."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    loaded = {line.split()[-1] for line in maps if "libgomp" in line}
    for path in [*sorted(loaded), "libgomp.so.1"]:
        try:
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
            return
        except OSError:
            continue
    raise ImportError("the C kernels need an OpenMP runtime, libgomp.so.1; install gcc or libgomp1")
