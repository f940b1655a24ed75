"""Prompts whose greedy answer is well defined in fp32, with the reference's answers to them."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from kimi_demo.reference import HfReference, Score
from tests.support.completions import Answer

# Two right fp32 implementations differ a little: here by up to 3e-5 in a logprob, and in the distance of two router
# scores by 2e-6 as a rule, 5e-6 at most (`test_answers.py` measures them). Where the reference's own choice hangs on
# less than these bounds, several times as much, either choice is right and the prompt decides nothing.
MARGIN = 2e-4
ROUTER_GAP = 1e-5
LOGPROB_TOLERANCE = 1e-4

# Lengths around the kernel size of the convolution, the kernels' tiles, the cache's blocks and the token budget.
LENGTHS = (1, 2, 3, 4, 5, 15, 16, 17, 33, 63, 64, 65, 127, 128, 129, 191, 256, 257, 511, 640, 1023, 1025, 1500, 2000)
LONG_ANSWERS = {1: 300, 17: 300, 127: 300, 511: 300, 2000: 150}  # tokens asked for, by length of the prompt
SHORT_ANSWERS = (24, 33, 48, 65)


@dataclass(frozen=True)
class Case:
    """A prompt and what greedy decoding of the reference answers."""

    prompt: list[int]
    score: Score

    @property
    def asked(self) -> tuple[list[int], int]:
        return self.prompt, len(self.score.answer)


class Stream:
    """Random token ids; the same seed gives the same ids."""

    def __init__(self, vocab: int, seed: int) -> None:
        self.vocab = vocab
        self.random = random.Random(seed)

    def prompt(self, length: int) -> list[int]:
        return [self.random.randrange(self.vocab) for _ in range(length)]


def sizes() -> Iterator[tuple[int, int]]:
    """(length of the prompt, tokens to ask for)"""
    for index, length in enumerate(LENGTHS):
        yield length, LONG_ANSWERS.get(length, SHORT_ANSWERS[index % len(SHORT_ANSWERS)])


def is_well_posed(score: Score) -> bool:
    return score.margin > MARGIN and score.router_gap > ROUTER_GAP


def greedy(reference: HfReference, prompt: Sequence[int], guess: Sequence[int]) -> Score:
    """The reference's own greedy answer of len(guess) tokens.

    One pass over prompt and guess settles it if the guess is that answer: the reference then takes each of its
    tokens after those before it. A wrong guess costs the time to decode from the first wrong token on.
    """
    score = reference.score(prompt, guess)
    if score.agrees:
        return score
    right = next(i for i, (a, b) in enumerate(zip(score.argmax, guess, strict=True)) if a != b)
    known = [*guess[:right], score.argmax[right]]
    rest = len(guess) - len(known)
    answer = known + (reference.greedy([*prompt, *known], rest) if rest else [])
    return reference.score(prompt, answer)


def draw_cases(
    reference: HfReference,
    wanted: Sequence[tuple[Callable[[], list[int]], int]],
    guess: Callable[[list[tuple[list[int], int]]], list[Answer]],
) -> list[Case]:
    """One well-posed case for each (draws a prompt, tokens to ask for); an ill-posed prompt is drawn again.

    `guess` answers (prompt, tokens) pairs, rightly or not: see `greedy`. Fails if too many are ill-posed.
    """
    cases: dict[int, Case] = {}
    replaced = 0
    while missing := [i for i in range(len(wanted)) if i not in cases]:
        asked = [(wanted[i][0](), wanted[i][1]) for i in missing]
        for i, (prompt, _), guessed in zip(missing, asked, guess(asked), strict=True):
            score = greedy(reference, prompt, guessed.tokens)
            if is_well_posed(score):
                cases[i] = Case(prompt, score)
            else:
                replaced += 1
        assert replaced <= 3 * len(wanted), f"{replaced} ill-posed prompts: the bounds do not fit this checkpoint"
    return [cases[i] for i in range(len(wanted))]


def draw_growing(
    reference: HfReference, vocab: int, guess: Callable[[list[tuple[list[int], int]]], list[Answer]]
) -> list[Case]:
    """24 prompts of 100 tokens with answers of 60.

    A server with few blocks admits as many as fit with their prompts, and no schedule lets them all have their answers.
    """
    stream = Stream(vocab, seed=12)
    return draw_cases(reference, [(partial(stream.prompt, 100), 60)] * 24, guess)


def check(cases: Sequence[Case], answers: Sequence[Answer]) -> None:
    """Every token equal to the reference's, every logprob within the tolerance; says all that differ."""
    faults = [fault for case, answer in zip(cases, answers, strict=True) if (fault := difference(case, answer))]
    assert not faults, f"{len(faults)} of {len(cases)} answers differ:\n" + "\n".join(faults)


def difference(case: Case, answer: Answer) -> str | None:
    """What is wrong with an answer, in one line; it may be cut short, as a cancelled one is."""
    score = case.score
    where = f"prompt of {len(case.prompt)} tokens"
    for i, token in enumerate(answer.tokens):
        if token != score.answer[i]:
            return f"{where}: token {i} is {token}, the reference's {score.answer[i]}"
    errors = [abs(a - b) for a, b in zip(answer.logprobs, score.logprobs, strict=False)]
    worst = max(errors, default=0.0)
    # Written so that NaN is a difference, too.
    if not worst <= LOGPROB_TOLERANCE:
        return f"{where}: logprob of token {errors.index(worst)} is off by {worst:.1e}"
    return None
