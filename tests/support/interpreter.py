"""Triton's interpreter, faster.

Each call of a device function looks through all of `triton.language` for what it has to replace, although the kernel
that calls it has replaced most: a third of the time of our kernels.
"""

import functools
import inspect
from typing import Any

from triton.language import core
from triton.runtime import interpreter


@functools.cache
def builtins(package: Any) -> tuple[str, ...]:
    """Their names, found when the package is first seen: nothing of it is replaced then."""
    return tuple(name for name, member in inspect.getmembers(package) if core.is_builtin(member))


def look_up_builtins_once() -> None:
    def patch(package: Any, builder: Any, scope: Any) -> None:
        for name in builtins(package):
            if core.is_builtin(member := getattr(package, name)):
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch
