"""The reference's answers that are kept: of this checkpoint and these questions, and taken for no others."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kimi_demo import agreement, kept_answers
from kimi_demo.subject import TRAINED, trained

PROMPT = [1, 2, 3]


def test_the_file_is_of_this_checkpoint_and_these_questions() -> None:
    subject = trained(TRAINED)
    assert subject is not None
    kept = json.loads((TRAINED / kept_answers.NAME).read_text())
    assert kept["sha256"] == kept_answers.hashes(subject.model) and set(kept["sha256"]) == set(kept_answers.HASHED)
    assert [each["question"] for each in kept["answers"]] == [question for question, _ in subject.questions]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint with an answer of four tokens to PROMPT."""
    model = tmp_path / "checkpoint"
    model.mkdir()
    for name in kept_answers.HASHED:
        (model / name).write_text(name)
    answers = [{"question": "?", "prompt": kept_answers.name_of(PROMPT), "tokens": [5, 6, 7, 8]}]
    (tmp_path / kept_answers.NAME).write_text(json.dumps({"sha256": kept_answers.hashes(model), "answers": answers}))
    return model


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The answers of which transformers was asked; it agrees with each."""
    seen: list[list[int]] = []

    def score(model: Path, answer: Any) -> SimpleNamespace:
        seen.append(answer.token_ids)
        return SimpleNamespace(
            argmax=answer.token_ids, answer=answer.token_ids, clearly_wrong=lambda: 0, clear_lead=6.5
        )

    monkeypatch.setattr(agreement, "_score", score)
    return seen


def agrees(model: Path, said: list[int], prompt: list[int] = PROMPT, tokens: int = 64, **more: bool) -> bool:
    answer: Any = SimpleNamespace(prompt_ids=prompt, token_ids=said)
    return agreement.agrees(model, [answer], tokens, **{"exactly": True, "check": False, **more})


@pytest.mark.parametrize(
    ("said", "tokens", "right"),
    [
        ([5, 6, 7, 8], 64, True),
        ([5, 6], 2, True),
        ([5, 6], 64, False),
        ([5, 6, 7, 9], 64, False),
        ([5, 6, 7, 8, 9], 64, False),
        ([], 64, False),
    ],
)
def test_the_tokens_have_to_be_those_kept(
    model: Path, asked: list, said: list[int], tokens: int, right: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert agrees(model, said, tokens=tokens) is right and asked == []
    [line] = capsys.readouterr().out.splitlines()
    assert "tokens agree with the transformers reference, whose answers are kept" in line and "--check" in line


def test_transformers_is_asked_where_nothing_is_kept(model: Path, asked: list) -> None:
    assert agrees(model, [5, 6, 7, 8], check=True) and len(asked) == 1
    assert agrees(model, [5, 6, 7, 8], prompt=[9]) and len(asked) == 2
    assert agrees(model, [5, 6, 7, 9], exactly=False) and len(asked) == 3
    (model / "model.safetensors").write_text("other weights")
    assert agrees(model, [1, 1, 1, 1]) and len(asked) == 4
    assert agrees(model / "elsewhere", [1]) and len(asked) == 5


def test_transformers_is_not_imported_without_need(model: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from types import SimpleNamespace\n"
        "from kimi_demo import agreement, demo\n"
        f"answer = SimpleNamespace(prompt_ids={PROMPT}, token_ids=[5, 6, 7, 8])\n"
        f"assert agreement.agrees(Path({str(model)!r}), [answer], 64, exactly=True, check=False)\n"
        "from kimi_demo import conversation\n"
        "assert not {'transformers', 'torch', 'vllm'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_answers_that_the_model_does_not_give_are_not_kept(tmp_path: Path) -> None:
    shutil.copytree(TRAINED / "checkpoint", tmp_path / "checkpoint")
    shutil.copy(TRAINED / "sample.json", tmp_path)
    subject = trained(tmp_path)
    assert subject is not None
    reference: Any = SimpleNamespace(score=lambda prompt, tokens: SimpleNamespace(agrees=False))
    with pytest.raises(ValueError, match=r"^to 'x' the reference does not answer 'The code': take other questions$"):
        kept_answers.answer(reference, subject, "x", "The code")
