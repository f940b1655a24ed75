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

from tests.support import patience, warm

ROOT = Path(__file__).resolve().parents[2]


def in_own_process(function: Callable[[Any], Any], argument: Any, **environment: str) -> Any:
    """function(argument), both as JSON knows them, of a function at the top level of its file."""
    with tempfile.TemporaryDirectory() as name:
        folder, module = Path(name), "tests.support.own_process"
        (folder / "argument.json").write_text(json.dumps(argument))
        log, arguments = folder / "log", (function.__code__.co_filename, function.__name__, name)
        env = {**os.environ, **environment}
        if warm.can_fork(environment):
            code = warm.fork(module, arguments, log, env).wait(patience.SECONDS)
        else:
            command = [sys.executable, "-m", module, *arguments]
            with log.open("wb") as out:
                code = subprocess.run(
                    command, stdout=out, stderr=out, cwd=ROOT, env=env, timeout=patience.SECONDS
                ).returncode
        assert code == 0, log.read_text()[-4000:]
        return json.loads((folder / "result.json").read_text())


if __name__ == "__main__":
    file, name, target = sys.argv[1:]
    argument = json.loads((Path(target) / "argument.json").read_text())
    (Path(target) / "result.json").write_text(json.dumps(runpy.run_path(file)[name](argument)))
