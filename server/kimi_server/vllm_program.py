"""Which program serves a model."""

import sys
from pathlib import Path


def vllm_program() -> list[str]:
    """The `vllm` command of this environment, to which its arguments are added."""
    script = Path(sys.executable).with_name("vllm")  # missing where packages lie beside an interpreter
    return [str(script)] if script.exists() else [sys.executable, "-m", "vllm.entrypoints.cli.main"]
