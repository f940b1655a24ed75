"""What the demo serves and asks: the trained model about its log, or a random one any prompt."""

import json
from dataclasses import dataclass
from pathlib import Path

TRAINED = Path(__file__).parents[1] / "demo_model"


@dataclass(frozen=True)
class Subject:
    """A model, a text that every question follows, and questions, with their answers where there are right ones."""

    model: Path
    text: str
    questions: list[tuple[str, str | None]]


def trained(folder: Path) -> Subject | None:
    """The trained model of `folder` with its log and questions; None where it is not at hand, as in a wheel."""
    if not (folder / "checkpoint" / "config.json").exists():
        return None
    sample = json.loads((folder / "sample.json").read_text())
    asked = [(each["question"], each["answer"]) for each in sample["questions"]]
    return Subject(folder / "checkpoint", sample["log"], asked)
