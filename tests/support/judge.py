"""Whether a server's greedy answers in bfloat16 are as near to the fp32 reference as transformers in bfloat16 is."""

import contextlib
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from kimi_demo.reference import HfReference, Score
from tests.support.completions import Answer
from tests.support.prompts import LENGTHS, Stream
from tests.support.rounded_inputs import RoundedInputs

RATIO = 1.2
TOKENS = 64
GROWING = (180,) * 24  # one block of 192 tokens each, until their answers need another: more than a short cache has


def draw(vocab: int) -> list[tuple[list[int], int]]:
    """Prompts of every length, the later half of each a repetition, so that drafts find something to propose."""
    stream = Stream(vocab, seed=5)
    prompts = []
    for length in (*LENGTHS, *GROWING):
        half = stream.prompt(-(-length // 2))
        prompts.append(((half + half)[:length], TOKENS))
    return prompts


@dataclass(frozen=True)
class Seen:
    """Counts of answers' tokens."""

    tokens: int = 0
    others: int = 0  # that are not the reference's choice
    rough_others: int = 0  # where transformers in bf16 takes another than the reference
    clear: int = 0  # where the reference's choice leads by more than bf16 can overturn
    missed: list[tuple[int, int, float]] = field(default_factory=list)  # of these: prompt's length, place, lead

    def __add__(self, other: "Seen") -> "Seen":
        return Seen(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    def __str__(self) -> str:
        return (
            f"{self.others} of {self.tokens} tokens not the reference's, in transformers bf16 {self.rough_others}; "
            f"{self.clear} clear"
        )

    def check(self) -> str:
        """No clear choice missed, and others hardly more often than in bf16 there; says what was seen."""
        assert not self.missed, f"{self}; missed: {self.missed}"
        assert self.others <= RATIO * self.rough_others, self
        return str(self)


class Judge:
    """The reference in fp32, and what bf16 costs it."""

    def __init__(self, model: Path, inputs: tuple[str, int | None] | None = None) -> None:
        """inputs: which weights' products round their inputs to fp8, and how many channels share a scale."""
        # On a GPU, with the servers: on a CPU the scores take longer than all else.
        device = f"cuda:{torch.cuda.device_count() - 1}"
        self.reference, self.rough = (HfReference(model, dtype, device) for dtype in (torch.float32, torch.bfloat16))
        self.rounding = RoundedInputs(self.rough.model, *inputs) if inputs else contextlib.nullcontext()
        self.scores: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[Score, list[int]]] = {}

    def score(self, prompt: list[int], answer: list[int]) -> tuple[Score, list[int]]:
        """And the tokens that transformers in bf16 takes in the same contexts."""
        key = tuple(prompt), tuple(answer)
        if key not in self.scores:
            with self.rounding:
                rough = self.rough.score(prompt, answer).argmax
            self.scores[key] = self.reference.score(prompt, answer), rough
        return self.scores[key]

    def compare(self, asked: list[tuple[list[int], int]], answers: list[Answer]) -> "Seen":
        seen = Seen()
        for (prompt, _), answer in zip(asked, answers, strict=True):
            score, rough = self.score(prompt, answer.tokens)
            choices = list(zip(score.margins, score.argmax, score.answer, strict=True))
            seen += Seen(
                tokens=len(choices),
                others=sum(best != taken for _, best, taken in choices),
                rough_others=sum(a != b for a, b in zip(score.argmax, rough, strict=True)),
                clear=sum(lead > Score.clear_lead for lead in score.margins),
                missed=[
                    (len(prompt), at, lead)
                    for at, (lead, best, taken) in enumerate(choices)
                    if lead > Score.clear_lead and best != taken
                ],
            )
        return seen

    def check(self, asked: list[tuple[list[int], int]], answers: list[Answer]) -> str:
        return self.compare(asked, answers).check()
