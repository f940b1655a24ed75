"""`kimi-linear demo` where there is nothing but the package: a random checkpoint answers, and all is checked. The
reference's answers that are kept for the trained one are what the reference says.
"""

import json
from pathlib import Path

import pytest

from kimi_demo import demo, kept_answers
from kimi_demo.reference import HfReference
from kimi_demo.subject import TRAINED, trained
from kimi_server.cli import main


def test_the_demo_without_the_trained_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "TRAINED", tmp_path / "absent")
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--tokens=16"]) == 0
    shown = capsys.readouterr().out
    assert demo.PROMPT in shown and "16 of 16 tokens of the first answer agree" in shown
    assert {path.name for path in (tmp_path / ".demo").iterdir()} == {"model", "server.log"}


# Each takes the reference half a minute; the first tells whether the kept ones are this checkpoint's at all.
@pytest.mark.parametrize(
    "number", [0, *(pytest.param(number, marks=pytest.mark.soak) for number in (1, 2, 3))], ids=lambda n: f"answer-{n}"
)
def test_the_kept_answers_are_the_references(number: int) -> None:
    subject = trained(TRAINED)
    assert subject is not None
    kept = json.loads((TRAINED / kept_answers.NAME).read_text())["answers"]
    assert len(kept) == len(subject.questions) == 4
    question, expected = subject.questions[number]
    assert expected is not None
    prompt, tokens = kept_answers.answer(HfReference(subject.model), subject, question, expected)
    assert kept[number] == {"question": question, "prompt": prompt, "tokens": tokens}
