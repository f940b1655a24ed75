"""Act on a module as soon as it is loaded, so that nothing depends on what was imported before what."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

Action = Callable[[ModuleType], None]

_waiting: dict[str, list[Action]] = {}


def when_loaded(name: str, action: Action) -> None:
    """Call `action` with the module of this name: now, or when somebody imports it. It may be one that never is."""
    module = sys.modules.get(name)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        return action(module)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    _waiting.setdefault(name, []).append(action)


class _Finder(MetaPathFinder):
    """Finds what the other finders find, and has its loader call the actions."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _waiting:
            return None
        actions = _waiting.pop(name)  # before the search, which asks this finder, too
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            _waiting[name] = actions
            return spec
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            for action in actions:
                action(module)

        vars(spec.loader)["exec_module"] = exec_module
        return spec
