"""What a patch of vLLM is: functions that take the places of vLLM's, and why, as data.

The table in docs/design/patches.md is made from these fields, and a test compares each hook with the sources of every
vLLM in `supported.install_check.SERIES`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

from vllm_kimi_linear.patches.when_loaded import when_loaded
from vllm_kimi_linear.supported.install_check import SERIES

Function = Callable[..., Any]

PATCHED = "__kimi_linear__"  # attribute of what stands in vLLM's place: vLLM's own


@dataclass(frozen=True)
class Hook:
    """One function, method or class of vLLM, and what takes its place."""

    target: str  # "module:function", "module:Class.method" or "module:Class"
    parameters: str  # names of its parameters; "..." where any may stand, which are passed on
    replace: Callable[[Any], Any]  # vLLM's own -> what takes its place


@dataclass(frozen=True, kw_only=True)
class Patch:
    """A change of vLLM that goes away again.

    It holds for this architecture alone. One of scope "call" finds out in each call which model it is about. One of
    scope "process" cannot: it calls vLLM's own until the process is known to serve ours (`serve_ours`). Both are put in
    place in every process, for vLLM may look a function up before it tells a plugin anything.
    """

    symptom: str
    cause: str
    upstream: str = "Not reported yet."
    remove_when: str
    hooks: tuple[Hook, ...]
    scope: Literal["call", "process"] = "call"
    device: Literal["cpu", "cuda", "any"] = "any"
    versions: tuple[str, ...] = SERIES
    speed: bool = False  # answers are right without it

    def apply(self) -> None:
        """Put every hook in its place, each as soon as vLLM loads the module. Idempotent."""
        for hook in self.hooks:
            when_loaded(hook.target.partition(":")[0], functools.partial(_put, hook, self.scope == "process"))


_serves_ours = False  # until this process is known to serve this architecture


def serve_ours() -> None:
    """This process serves our model: patches of scope "process" hold from now on. Idempotent."""
    global _serves_ours
    _serves_ours = True


def _where_ours(replacement: Function, original: Function) -> Function:
    def either(*args: Any, **kwargs: Any) -> Any:
        return (replacement if _serves_ours else original)(*args, **kwargs)

    return either


def _put(hook: Hook, where_ours: bool, module: ModuleType) -> None:
    *path, name = hook.target.partition(":")[2].split(".")
    owner: Any = functools.reduce(getattr, path, module)
    found = vars(owner).get(name, getattr(owner, name))  # a classmethod as such, an inherited method as its function
    of_class = isinstance(found, classmethod)
    original = found.__func__ if of_class else found
    if hasattr(original, PATCHED):
        return
    replacement = hook.replace(original)
    if where_ours:
        replacement = _where_ours(replacement, original)
    if not isinstance(original, type):
        functools.update_wrapper(replacement, original)
    setattr(replacement, PATCHED, original)
    setattr(owner, name, classmethod(replacement) if of_class else replacement)
