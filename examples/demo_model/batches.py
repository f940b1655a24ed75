"""Conversations as token rows for training, made in other processes while the GPU computes."""

import random
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy
from numpy.typing import NDArray
from tokenizers import Tokenizer

from examples.demo_model import words
from examples.demo_model.conversations import KINDS, Asker, make_log
from kimi_demo.tokenizer import fast_tokenizer

ODDS = {"find": 40, "latest": 25, "several": 12, "absent": 15, "repeat": 8}
TURN_TOKENS = 36
USER = "<|im_user|>user<|im_middle|>"
ASSISTANT = "<|im_end|><|im_assistant|>assistant<|im_middle|>"


@dataclass(frozen=True)
class Batch:
    """ids [B, T]; of the answers' N tokens: where they are predicted, flat in B * T, and whose they are."""

    length: int
    ids: NDArray[numpy.int64]
    predicted_at: NDArray[numpy.int64]  # [N], the position before the token
    question: NDArray[numpy.int64]  # [N], index into kinds
    kinds: NDArray[numpy.int64]  # [questions], index into KINDS


@cache
def _tokenizer() -> Tokenizer:
    return fast_tokenizer(words.vocabulary())


def encode(text: str) -> list[int]:
    return _tokenizer().encode(text).ids


def make_batch(length: int, sequences: int, seed: int) -> Batch:
    """`sequences` conversations of exactly `length` tokens, each about a log of its own."""
    rng = random.Random(seed)
    pad = words.vocabulary().special_id("[PAD]")
    ids = numpy.full((sequences, length), pad, dtype=numpy.int64)
    predicted_at: list[int] = []
    question: list[int] = []
    kinds: list[int] = []
    for row in range(sequences):
        tokens, answers = conversation(rng, length)
        ids[row, : len(tokens)] = tokens
        for kind, begin, end in answers:
            predicted_at += range(row * length + begin - 1, row * length + end - 1)
            question += [len(kinds)] * (end - begin)
            kinds.append(KINDS.index(kind))
    arrays = (numpy.array(values, dtype=numpy.int64) for values in (predicted_at, question, kinds))
    return Batch(length, ids, *arrays)


def conversation(rng: random.Random, length: int) -> tuple[list[int], list[tuple[str, int, int]]]:
    """At most `length` tokens by the chat template, and each answer's kind and place in them."""
    turns = min(max(length // 96, 3), 96)
    log = make_log(rng, length - turns * TURN_TOKENS)
    asker = Asker(log, rng)
    tokens: list[int] = []
    answers: list[tuple[str, int, int]] = []
    content = log.text
    while True:
        asked = asker.ask(rng.choices(KINDS, [ODDS[kind] for kind in KINDS])[0])
        before = encode(USER + content + asked.text + ASSISTANT)
        answer = encode(f"{asked.answer}<|im_end|>")
        begin = len(tokens) + len(before)
        if begin + len(answer) > length:
            return (tokens or before[:length]), answers
        tokens += before + answer
        answers.append((asked.kind, begin, len(tokens)))
        content = ""


class Maker:
    """Batches in the order in which they were asked for, `ahead` of them under way."""

    def __init__(self, workers: int, ahead: int) -> None:
        self.pool = ProcessPoolExecutor(workers)
        self.under_way: deque[Future[Batch]] = deque()
        self.ahead = ahead

    def stream(self, requests: Iterator[tuple[int, int, int]]) -> Iterator[Batch]:
        """A batch for each (length, sequences, seed) of `requests`, which is asked as late as it may be."""
        for request in requests:
            self.under_way.append(self.pool.submit(make_batch, *request))
            if len(self.under_way) > self.ahead:
                yield self.under_way.popleft().result()
