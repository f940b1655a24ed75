"""The answer to a question of a plan: its first line, what it says alone, and all of it as JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from kimi_server.planner import refusal
from kimi_server.planner.plan import Choice
from kimi_server.planner.remedies import Remedy
from kimi_server.planner.serve_config import settings
from kimi_server.planner.sizes import documents
from kimi_server.planner.stored import GUIDE


def yes(choice: Choice, commands: Sequence[str] = (), checkpoint: str | None = None) -> str:
    """Yes: 27 documents of 128K at once. Run: ... `checkpoint` is the kind that this takes in MODEL's place."""
    best, machine = choice.best, choice.machine
    where = f", on {best.ranks} of the {machine.count} GPUs" if best.ranks < machine.count else ""
    where += f", by {best.describe()}" if best.servers > 1 else ""
    where += f", with an {checkpoint} checkpoint ({GUIDE})" if checkpoint else ""
    line = f"Yes: {documents(best.sequences(choice.request.context), choice.request.context)} at once{where}."
    if len(commands) == 1:
        return f"{line} Run: {commands[0]}"
    return "\n".join([f"{line} Run:", *(f"  {each}" for each in commands)]) if commands else line


def as_json(
    choice: Choice,
    found: Sequence[Remedy],
    commands: Sequence[str],
    contexts: Sequence[int],
    shorter: Choice | None = None,
) -> dict[str, Any]:
    """Memory in bytes of a rank; sequences by tokens."""
    held, best, request = choice.best.forecast, choice.best, choice.request
    count = choice.per_server
    common = {
        "fits": choice.fits,
        "answer": yes(choice).splitlines()[0] if choice.fits else refusal.answer(choice, found, shorter),
        "machine": asdict(choice.machine),
        "context": request.context,
        "concurrency": request.concurrency,
        "servers": best.servers,
        "tensor_parallel": best.tensor_parallel,
        "memory": {
            "weights": held.weights,
            "activations": held.activations,
            "runtime": held.runtime,
            "cache": held.cache_bytes(count, request.context),
            "short": held.shortage(count, request.context),
            "in_all": held.memory,
        },
        "sequences": _sequences(choice, contexts),
    }
    if choice.fits:
        return common | {"commands": list(commands), "flags": {each.flag: each.value for each in settings(choice)}}
    return common | {
        "changes": refusal.changes(choice),
        "shorter": shorter
        and {"context": (fits := shorter.request.context), "sequences": shorter.best.sequences(fits)},
        "remedies": [
            {"weights": each.weights, "machine": each.name, "sequences": _sequences(each.choice, contexts)}
            for each in found
        ],
    }


def _sequences(choice: Choice, contexts: Sequence[int]) -> dict[str, int]:
    return {str(context): choice.best.sequences(context) for context in contexts}
