"""A function of a test file, run in a process of its own: what vLLM leaves behind in one would reach other tests."""

import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support import patience

ROOT = Path(__file__).resolve().parents[2]


def in_own_process(function: Callable[[Any], Any], argument: Any, **environment: str) -> Any:
    """function(argument), both as JSON knows them, of a function at the top level of its file."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "argument.json").write_text(json.dumps(argument))
        process = subprocess.run(
            [
                sys.executable,
                "-m",
                "tests.support.own_process",
                function.__code__.co_filename,
                function.__name__,
                folder,
            ],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, **environment},
            timeout=patience.SECONDS,
        )
        assert process.returncode == 0, process.stderr[-4000:]
        return json.loads((Path(folder) / "result.json").read_text())


if __name__ == "__main__":
    file, name, target = sys.argv[1:]
    argument = json.loads((Path(target) / "argument.json").read_text())
    (Path(target) / "result.json").write_text(json.dumps(runpy.run_path(file)[name](argument)))
