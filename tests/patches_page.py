"""`python -m tests.patches_page` prints docs/design/patches.md, from the fields of every patch."""

import inspect
import sys
from importlib import import_module

from vllm_kimi_linear.patches.all import patches
from vllm_kimi_linear.patches.patch import Patch

HEAD = """# Patches of vLLM

What this plugin changes in vLLM while it serves this model, and when each change goes away. Other models of the same
installation are served by vLLM as it is. The command `python -m tests.patches_page` prints this page, and
`python -m tests.newer_vllm` says which of these would not fit another vLLM.
"""


def page() -> str:
    """The page, in markdown."""
    parts = [HEAD]
    for speed, title in ((False, "Faults"), (True, "Speed")):
        parts.append(f"## {title}\n")
        parts += [_section(name, patch) for name, patch in patches().items() if patch.speed is speed]
    return "\n".join(parts)


def _section(name: str, patch: Patch) -> str:
    module = import_module(f"vllm_kimi_linear.{name}")
    title = (inspect.getdoc(module) or "").splitlines()[0].rstrip(".")
    device = {"any": "all machines", "cpu": "CPUs", "cuda": "GPUs"}[patch.device]
    hooks = ", ".join(f"`{hook.target.partition(':')[2]}`" for hook in patch.hooks)
    lines = [
        f"### {title}\n",
        f"`{name.replace('.', '/')}.py`, on {device}, for vLLM {' and '.join(patch.versions)}. Changes {hooks}.\n",
        f"- Symptom: {patch.symptom}",
        f"- Cause: {patch.cause}",
        f"- Upstream: {patch.upstream}",
        f"- Goes away when {patch.remove_when}\n",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(page())
