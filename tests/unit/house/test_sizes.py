"""A file has one noun, and the plugin is small enough to be read."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FOLDERS = ("vllm_kimi_linear", "kernels", "server", "examples", "deploy", "benchmarks", "tests")


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_file_has_one_noun(folder: str) -> None:
    files = [*(ROOT / folder).rglob("*.py")]
    assert files
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert not {name: lines for name, lines in long.items() if lines > 300}


def code(text: str) -> Iterator[str]:
    """Lines of a module that are neither blank nor a comment nor of a docstring."""
    documents = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    described = [node for node in ast.walk(ast.parse(text)) if isinstance(node, documents)]
    first = [node.body[0] for node in described if ast.get_docstring(node) is not None]
    spoken = {line for node in first for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    for number, line in enumerate(text.splitlines(), 1):
        if number not in spoken and line.strip() and not line.strip().startswith("#"):
            yield line


def test_lines_of_code_are_counted() -> None:
    text = '"""A\nb."""\n\n# c\nx = 1  # d\n\n\ndef f():\n    """E."""\n    # g\n    return """\n    h"""\n'
    assert list(code(text)) == ["x = 1  # d", "def f():", '    return """', '    h"""']


def test_the_plugin_can_be_read_in_an_afternoon() -> None:
    """From `register()` to the layers, with its cache; what stands aside one reads when one meets it."""
    plugin = ROOT / "vllm_kimi_linear"
    folders = ("patches", "quantized", "adapters", "supported")
    # Without these every step is right.
    speed_up = ("steady_steps.py", "next_inputs.py", "partial_sums.py", "greedy_sampler.py")
    aside = {plugin / name for name in (*folders, *speed_up)}
    files = [path for path in plugin.rglob("*.py") if aside.isdisjoint([path, *path.parents])]
    assert files
    assert sum(len([*code(path.read_text())]) for path in files) < 3000
