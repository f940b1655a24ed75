"""What the functions of a vLLM take, read from its sources without importing them."""

import ast
import functools
import re
from pathlib import Path


class Sources:
    """The package `vllm` in a folder."""

    def __init__(self, package: Path) -> None:
        self.package = package

    def parameters(self, target: str) -> str | None:
        """Names of the parameters of "module:function" or "module:Class.method", separated by spaces.

        "" for "module:Class", None for what is not there. What a module imports from another of vLLM, and what a class
        inherits from another of vLLM, is followed.
        """
        module, _, path = target.partition(":")
        name, _, method = path.partition(".")
        node = self._find(module, name)
        if node is None or (method and not isinstance(node[1], ast.ClassDef)):
            return None
        if method:
            node = self._method(*node, method)
        if node is None:
            return None
        if isinstance(node[1], ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node[1].args
            return " ".join(a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs))
        return "" if isinstance(node[1], ast.ClassDef) else None

    def _find(self, module: str, name: str) -> tuple[str, ast.stmt] | None:
        """Where a name of a module is defined, and how."""
        for node in self._statements(module):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
                return module, node
            if isinstance(node, ast.ImportFrom):
                origin = ".".join([*module.split(".")[: -node.level], node.module or ""]) if node.level else node.module
                for alias in node.names:
                    if (alias.asname or alias.name) == name and str(origin).startswith("vllm"):
                        return self._find(str(origin), alias.name)
        return None

    def _method(self, module: str, node: ast.stmt, name: str) -> tuple[str, ast.stmt] | None:
        assert isinstance(node, ast.ClassDef)
        for inner in node.body:
            if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef) and inner.name == name:
                return module, inner
        for base in node.bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            found = self._find(module, base.id) if isinstance(base, ast.Name) else None
            if found and isinstance(found[1], ast.ClassDef) and (method := self._method(*found, name)):
                return method
        return None

    @functools.cache  # noqa: B019  a few of them a run
    def _statements(self, module: str) -> list[ast.stmt]:
        path = self.package.joinpath(*module.split(".")[1:])
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if not file.exists():
            return []
        body = ast.parse(file.read_text()).body
        # Definitions behind `if` and `try`, too.
        return [*body, *(inner for node in body if isinstance(node, ast.If | ast.Try) for inner in node.body)]


def fits(expected: str, found: str | None) -> bool:
    """Whether parameters are those that a hook expects (`Hook.parameters`)."""
    if found is None:
        return False
    pattern = r"( \S+)*".join(re.escape("".join(f" {name}" for name in part.split())) for part in expected.split("..."))
    return re.fullmatch(pattern, "".join(f" {name}" for name in found.split())) is not None
