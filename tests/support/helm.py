"""Renders charts by the program `helm` or, without it, by the package helm-python-sdk, which holds Helm's own code."""

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

PROGRAM = shutil.which("helm")
NEEDS_HELM = pytest.mark.skipif(
    not PROGRAM and not importlib.util.find_spec("helm_python"),
    reason="neither helm nor helm-python-sdk is installed (pip install helm-python-sdk)",
)


class HelmError(Exception):
    """What Helm said."""


def render(chart: Path, name: str, values: dict[str, Any]) -> list[dict[str, Any]]:
    """The documents of a release; raises HelmError, also where the values do not fit the chart's schema."""
    if PROGRAM:
        command = [PROGRAM, "template", name, str(chart), "--values", "-"]
        done = subprocess.run(command, input=json.dumps(values), capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise HelmError(done.stderr)
        texts = [done.stdout]
    else:
        import helm_python

        try:
            with helm_python.Chart.load(chart) as loaded:
                loaded.validate_schema(values)
                rendered = loaded.render(values, name=name)
        except helm_python.HelmError as error:
            raise HelmError(str(error)) from error
        texts = [text for path, text in rendered.items() if path.endswith(".yaml")]
    return [document for text in texts for document in yaml.safe_load_all(text) if document]
