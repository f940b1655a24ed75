"""Whether a server's tokens are the reference's: those kept with the checkpoint, or transformers asked again."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kimi_demo import kept_answers

if TYPE_CHECKING:
    from kimi_demo.conversation import Answer
    from kimi_demo.reference import Score


def agrees(model: Path, answers: Sequence["Answer"], tokens: int, exactly: bool, check: bool) -> bool:
    """Whether the reference in fp32 takes the answers' tokens.

    Args:
        model: the checkpoint.
        answers: of a server, each of at most `tokens` tokens.
        exactly: all tokens have to be; else those whose lead over the second best bf16 cannot overturn.
        check: ask transformers, about the first answer, also where the answers are kept.
    """
    kept = {} if check else kept_answers.read(model)
    wanted = [kept.get(kept_answers.name_of(answer.prompt_ids), [])[:tokens] for answer in answers]
    if all(wanted):
        pairs = [(answer.token_ids, right) for answer, right in zip(answers, wanted, strict=True)]
        same = sum(a == b for said, right in pairs for a, b in zip(said, right, strict=False))
        print(
            f"{same} of {sum(map(len, wanted))} tokens agree with the transformers reference, whose answers are kept "
            "with this checkpoint's hash; --check asks it"
        )
        if exactly or all(said == right for said, right in pairs):
            return all(said == right for said, right in pairs)
    return _transformers_agrees(model, answers[0], exactly)


def _transformers_agrees(model: Path, answer: "Answer", exactly: bool) -> bool:
    """The same of one answer by transformers, step by step."""
    print("Asking the transformers reference in fp32 ", end="", flush=True)
    begun = time.monotonic()
    score = _score(model, answer)
    print(f"{time.monotonic() - begun:.1f} s")
    tokens = len(answer.token_ids)
    agreeing = sum(a == b for a, b in zip(score.argmax, score.answer, strict=True))
    print(f"{agreeing} of {tokens} tokens of the first answer agree with the transformers reference")
    if exactly:
        return agreeing == tokens
    wrong = score.clearly_wrong()
    print(f"{wrong} differ where the reference's choice leads by more than {score.clear_lead}, beyond rounding in bf16")
    return not wrong and agreeing > tokens / 2


def _score(model: Path, answer: "Answer") -> "Score":
    """What the reference says of the answer. Importing transformers takes seconds."""
    from kimi_demo.reference import HfReference

    return HfReference(model).score(answer.prompt_ids, answer.token_ids)
