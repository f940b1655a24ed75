"""Imports point downwards: from server and demo to the plugin, from the plugin to the kernels, and never round."""

import ast
import functools
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = {
    "kda_kernels": ROOT / "kernels",
    "decode_kernels": ROOT / "kernels",
    "bench": ROOT / "kernels",
    "vllm_kimi_linear": ROOT,
    "kimi_server": ROOT / "server",
    "kimi_demo": ROOT / "examples",
}
# Of ours, what each may import. The command `kimi-linear` starts the demo, which is imported when it is asked for.
ALLOWED = {
    "kda_kernels": set[str](),
    "decode_kernels": {"kda_kernels"},
    "bench": {"decode_kernels", "kda_kernels"},
    "vllm_kimi_linear": {"decode_kernels", "kda_kernels"},
    "kimi_server": {"kda_kernels", "vllm_kimi_linear"},
    "kimi_demo": {"kda_kernels", "vllm_kimi_linear", "kimi_server"},
}


@functools.cache
def modules(package: str) -> dict[str, ast.Module]:
    """Name and syntax tree of every module of a package."""
    root, found = PACKAGES[package], {}
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return found


def imported(statements: list[ast.stmt], known: set[str]) -> Iterator[str]:
    """Modules among `known` that statements outside of functions import."""
    for node in statements:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in known else node.module for name in inner if {name, node.module} & known)
        elif isinstance(node, ast.If | ast.Try | ast.With):
            if ast.unparse(node).startswith("if TYPE_CHECKING:"):  # never run
                continue
            yield from imported(node.body, known)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_those_below_it(package: str) -> None:
    known = {name for each in PACKAGES for name in modules(each)}
    for name, tree in modules(package).items():
        for found in imported(tree.body, known):
            assert found.split(".")[0] in {package, *ALLOWED[package]}, f"{name} imports {found}"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_imports_one_that_imports_it(package: str) -> None:
    trees = dict(modules(package))
    graph = {
        name: {found for found in imported(tree.body, set(trees)) if found != name} for name, tree in trees.items()
    }
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the modules


OURS = {*PACKAGES, "benchmarks", "tests"}


@pytest.mark.parametrize(
    "folder", ["benchmarks", "deploy", "examples", "kernels", "server", "tests", "vllm_kimi_linear"]
)
def test_what_is_imported_from_us_is_there(folder: str) -> None:
    """mypy does not tell: it ignores modules that it does not find, for which are installed depends on the machine."""
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in names:
                top, *_ = parts = name.split(".")
                place = PACKAGES.get(top, ROOT).joinpath(*parts)
                found = top not in OURS or place.is_dir() or place.with_suffix(".py").exists()
                assert found, f"{path.relative_to(ROOT)}: {name}"
