"""Whether a server's greedy answers in bfloat16 are as near to the fp32 reference as transformers in bfloat16 is."""

import contextlib
import math
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

    def check(self, asked: list[tuple[list[int], int]], answers: list[Answer]) -> str:
        """No clear choice missed, and others hardly more often than in bf16 there; says what was seen."""
        tokens, others, rough_others, clear = 0, 0, 0, 0
        missed = []  # (length of the prompt, place in the answer, lead of the reference's choice)
        for (prompt, _), answer in zip(asked, answers, strict=True):
            score, rough = self.score(prompt, answer.tokens)
            choices = list(zip(score.margins, score.argmax, score.answer, strict=True))
            missed += [
                (len(prompt), at, lead)
                for at, (lead, best, taken) in enumerate(choices)
                if lead > Score.clear_lead and best != taken
            ]
            tokens += len(choices)
            clear += sum(lead > Score.clear_lead for lead in score.margins)
            others += sum(best != taken for _, best, taken in choices)
            rough_others += sum(a != b for a, b in zip(score.argmax, rough, strict=True))
        seen = f"{others} of {tokens} tokens not the reference's, in transformers bf16 {rough_others}; {clear} clear"
        assert not missed, f"{seen}; missed: {missed}"
        assert others <= RATIO * rough_others + 2 * math.sqrt(rough_others), seen  # which of two near ones is chance
        return seen
