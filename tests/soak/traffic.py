"""What the soak asks: drawn from a seed, so that the same seed asks the same in the same order."""

import math
import random
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from examples.demo_model.conversations import make_log
from kimi_demo.demo import TRAINED

LONGEST = 9000  # tokens of a prompt
TOKENS = 48  # of a greedy answer
DOCUMENTS = 4  # whose beginnings prompts share; a new one takes the place of the oldest
CASES = 32  # that are asked again; as with documents
COLORS = ["red", "green", "blue"]


@dataclass(frozen=True)
class Case:
    """A prompt with its own cold answer: the tokens, and by how much each one's logprob leads the second best."""

    prompt: list[int]
    tokens: list[int]
    leads: list[float]


@dataclass(frozen=True)
class Asked:
    """A request, and what is right as an answer to it."""

    body: dict[str, Any]
    case: Case | None = None  # greedy: its tokens are those of the cold answer, as far as they are well-posed
    leaves_after: int | None = None  # tokens after which the client leaves; 0: at some moment before
    leaves_at: float = 0.0  # seconds, where it leaves before the first token
    refused: bool = False  # with a 4xx
    pause: float = 0.0  # seconds before it is sent


@dataclass
class Traffic:
    """Documents and prompts that share their beginnings; `model`, `context` (tokens) and `drafts` are the server's."""

    model: str
    context: int
    seed: int
    drafts: bool
    choose: random.Random = field(init=False)
    documents: list[list[int]] = field(default_factory=list)
    cases: list[Case] = field(default_factory=list)

    def __post_init__(self) -> None:
        from transformers import AutoTokenizer

        self.choose = random.Random(self.seed)
        self.tokenizer = AutoTokenizer.from_pretrained(TRAINED / "checkpoint")
        self.vocab = len(self.tokenizer)

    def open_round(self) -> None:
        """New documents, which push out older ones: text that the model knows, and random tokens, of any length."""
        self.documents.append(self.text(self.choose.randint(LONGEST // 3, LONGEST)))
        self.documents.append(self.noise(self.length()))
        del self.documents[:-DOCUMENTS], self.cases[:-CASES]

    def length(self) -> int:
        """From 1 to LONGEST, each order of magnitude as often as another."""
        return round(math.exp(self.choose.uniform(0, math.log(LONGEST))))

    def text(self, length: int) -> list[int]:
        return self.tokenizer.encode(make_log(self.choose, length + 50).text, add_special_tokens=False)[:length]

    def noise(self, length: int) -> list[int]:
        """Random tokens that repeat themselves here and there, so that some drafts are right and some are not."""
        words = [[self.choose.randrange(self.vocab) for _ in range(self.choose.randrange(2, 9))] for _ in range(6)]
        found: list[int] = []
        while len(found) < length:
            if self.choose.random() < 0.5:
                found += self.choose.choice(words)
            else:
                found.append(self.choose.randrange(self.vocab))
        return found[:length]

    def prompt(self) -> list[int]:
        """A document or its beginning, cut anywhere, or an earlier conversation; then tokens of its own."""
        if self.cases and self.choose.random() < 0.25:
            earlier = self.choose.choice(self.cases)
            shared = earlier.prompt + earlier.tokens[: self.choose.randrange(len(earlier.tokens) + 1)]
        else:
            document = self.choose.choice(self.documents)
            whole = self.choose.random() < 0.3
            shared = document if whole else document[: self.choose.randrange(len(document) + 1)]
        own = self.noise(self.choose.randrange(1, 200))
        return (shared[: LONGEST - len(own)] + own)[-LONGEST:]

    def body(self, prompt: list[int], tokens: int, **more: Any) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            **more,
        }

    def cold(self, prompt: list[int]) -> dict[str, Any]:
        """The request whose answer is the measure: nothing cached fits its salt."""
        return self.body(prompt, TOKENS, logprobs=2, cache_salt=uuid.uuid4().hex)

    def storm(self, count: int) -> Iterator[Asked]:
        """A mix of everything, in bursts."""
        kinds = {self.greedy: 9, self.sampled: 7, self.structured: 1, self.several: 2, self.refused: 1}
        pause = 0.0
        for kind in self.choose.choices(list(kinds), list(kinds.values()), k=count):
            if self.choose.random() < 0.1:
                pause += self.choose.uniform(0, 2)
            asked = kind(pause)
            leaves = not asked.refused and self.choose.random() < 0.2
            yield self.leaving(asked) if leaves else asked

    def greedy(self, pause: float) -> Asked:
        case = self.choose.choice(self.cases)
        more: dict[str, Any] = {"stream": self.choose.random() < 0.5}
        if self.choose.random() < 0.1:
            more = {"prompt_logprobs": self.choose.randrange(3)}
        body = self.body(case.prompt, self.choose.randrange(1, TOKENS + 1), logprobs=self.choose.randrange(3), **more)
        return Asked(body, case, pause=pause)

    def sampled(self, pause: float, **more: Any) -> Asked:
        choose = self.choose
        prompt = choose.choice(self.cases).prompt if choose.random() < 0.5 else self.prompt()
        more = {"temperature": choose.choice([0.2, 1.0, 1.7]), "stream": choose.random() < 0.5, **more}
        settings: dict[str, list[Any]] = {
            "seed": [choose.randrange(1 << 31)],
            "top_k": [1, 5, 50],
            "top_p": [0.1, 0.9],
            **({} if self.drafts else {"min_p": [0.05]}),  # vLLM takes it without drafts alone
            "presence_penalty": [0.5],
            "repetition_penalty": [1.2],
        }
        for name, values in settings.items():
            if choose.random() < 0.3:
                more[name] = choose.choice(values)
        return Asked(self.body(prompt, choose.randrange(1, 100), **more), pause=pause)

    def several(self, pause: float) -> Asked:
        return self.sampled(pause, n=self.choose.choice([2, 3]), temperature=1.0)

    def structured(self, pause: float) -> Asked:
        prompt = self.text(self.choose.randrange(1, 300))
        form = {"structured_outputs": {"choice": COLORS}, "ignore_eos": False}
        return Asked(self.body(prompt, 24, **form, temperature=self.choose.choice([0, 1.0])), pause=pause)

    def refused(self, pause: float) -> Asked:
        wrong: list[dict[str, Any]] = [
            {"prompt": [1] * (self.context + 1)},
            {"n": 0},
            {"temperature": -1},
            {"prompt": [self.vocab + 9999]},
            *([{"min_p": 0.05, "temperature": 1.0}] if self.drafts else []),
        ]
        return Asked({**self.body([1, 2, 3], 4), **self.choose.choice(wrong)}, refused=True, pause=pause)

    def leaving(self, asked: Asked) -> Asked:
        """The same, streamed, from a client that leaves."""
        after = self.choose.randrange(asked.body["max_tokens"])
        body = {**asked.body, "stream": True}
        body.pop("prompt_logprobs", None)  # vLLM streams none
        return Asked(body, asked.case, after, self.choose.uniform(0, 0.5), pause=asked.pause)
