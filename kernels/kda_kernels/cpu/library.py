"""Finds and loads the C library of the CPU kernels; ImportError says why there is none and how to get it."""

import ctypes
from collections.abc import Mapping
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

# The C code calls an OpenMP runtime that it does not bring along; torch, imported, has loaded the one to share.
import torch  # noqa: F401

FOLDER = Path(__file__).parent
REMEDY = "install gcc, then install this package again to build them"


def load(call_sizes: Mapping[str, int]) -> ctypes.CDLL:
    """The library, if its functions, kda_NAME, take a packed struct of so many bytes each; they return an int64.

    Raises ImportError with a sentence for `interface.describe` otherwise.
    """
    built = [path for suffix in EXTENSION_SUFFIXES if (path := FOLDER / f"_kda{suffix}").is_file()]
    if not built:
        raise ImportError(f"the C kernels were not built; {REMEDY}")
    _share_openmp()
    try:
        library = ctypes.CDLL(str(built[0]))
        library.kda_best_isa.restype = ctypes.c_int64
        sizes = {}
        for name in call_sizes:
            function, size = getattr(library, f"kda_{name}"), getattr(library, f"kda_{name}_call_size")
            function.argtypes, function.restype, size.restype = [ctypes.c_char_p], ctypes.c_int64, ctypes.c_int64
            sizes[name] = size()
    except (OSError, AttributeError) as error:
        raise ImportError(f"the C kernels in {built[0].name} cannot be loaded ({error}); {REMEDY}") from error
    if sizes != call_sizes:
        raise ImportError(f"the C kernels in {built[0].name} are of another version; {REMEDY}")
    return library


def _share_openmp() -> None:
    """Make the OpenMP runtime of this process visible to the library; if there is none, load the system's."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    loaded = {line.split(maxsplit=5)[5].removesuffix(" (deleted)") for line in maps if "libgomp" in line}
    for path in [*sorted(loaded), "libgomp.so.1"]:
        try:
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
            return
        except OSError:
            continue
    raise ImportError("the C kernels need an OpenMP runtime, libgomp.so.1; install gcc or libgomp1")
