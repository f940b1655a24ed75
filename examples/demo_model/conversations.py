"""Made-up logs and questions about them: what the small model is trained on and asked.

A log has records, `The code of Anna Weber is 4827.`, and other lines, `The upper gate is open at dawn.`. A name may
come again with another code; what counts is the latest. Names come from 29,392 pairs, so a log has no more than
MOST_RECORDS of them and is filled up with other lines.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from examples.demo_model.words import CONDITIONS, FIRST_NAMES, LAST_NAMES, QUALITIES, THINGS, TIMES

MOST_RECORDS = 4096
RECORD_TOKENS = 13
LINE_TOKENS = 11
KINDS = ("find", "latest", "several", "absent", "repeat")


@dataclass(frozen=True)
class Question:
    """`depth` is where in the log the answer stands, from 0 at its start to 1 at its end."""

    kind: str
    text: str
    answer: str
    depth: float = 1.0


@dataclass(frozen=True)
class Log:
    """Lines, and the positions of each name's records among them."""

    lines: list[str]
    records: dict[str, list[tuple[int, str]]]  # name -> (line, code), oldest first

    @property
    def text(self) -> str:
        return "\n".join(self.lines) + "\n"

    def latest(self, name: str) -> tuple[int, str]:
        return self.records[name][-1]


def record(name: str, code: str) -> str:
    return f"The code of {name} is {code}."


def make_log(rng: random.Random, tokens: int) -> Log:
    """A log of about `tokens` tokens. From all records to few, and up to three codes for a name."""
    share = rng.choice((1.0, 0.9, 0.5))
    count = min(MOST_RECORDS, max(2, int(tokens * share / RECORD_TOKENS)))
    others = max(0, (tokens - count * RECORD_TOKENS) // LINE_TOKENS)
    again = int(count * rng.choice((0.0, 0.1, 0.3)))
    names = make_names(rng, count - again)
    owners = names + rng.choices(names, k=again) + [""] * others
    rng.shuffle(owners)
    lines: list[str] = []
    records: dict[str, list[tuple[int, str]]] = {}
    for at, owner in enumerate(owners):
        if not owner or len(records.get(owner, ())) == 3:
            lines.append(make_line(rng))
            continue
        code = f"{rng.randrange(10_000):04}"
        records.setdefault(owner, []).append((at, code))
        lines.append(record(owner, code))
    return Log(lines, records)


def make_names(rng: random.Random, count: int) -> list[str]:
    """Different names, first and last ones in all combinations."""
    pairs = rng.sample(range(len(FIRST_NAMES) * len(LAST_NAMES)), count)
    return [f"{FIRST_NAMES[n // len(LAST_NAMES)]} {LAST_NAMES[n % len(LAST_NAMES)]}" for n in pairs]


def make_line(rng: random.Random) -> str:
    quality, thing, condition, time = (rng.choice(words) for words in (QUALITIES, THINGS, CONDITIONS, TIMES))
    return f"The {quality} {thing} is {condition} at {time}."


class Asker:
    """Questions about one log, each kind by its method."""

    def __init__(self, log: Log, rng: random.Random) -> None:
        self.log, self.rng = log, rng
        self.once = [name for name, codes in log.records.items() if len(codes) == 1]
        self.often = [name for name, codes in log.records.items() if len(codes) > 1]

    def ask(self, kind: str) -> Question:
        """A question of the kind; `find` in place of `latest` where no name has several codes, and the other way."""
        makers: dict[str, Callable[[], Question]] = {
            "find": lambda: self._known(self.once or self.often),
            "latest": lambda: self._known(self.often or self.once),
            "several": self._several,
            "absent": lambda: self._one("absent", self._stranger()),
            "repeat": self._repeat,
        }
        return makers[kind]()

    def at_depth(self, depth: float) -> Question:
        """`find` for the record nearest to `depth` of the log."""
        name = min(self.once, key=lambda name: abs(self._depth(name) - depth))
        return self._one("find", name)

    def _known(self, names: list[str]) -> Question:
        name = self.rng.choice(names)
        return self._one("latest" if len(self.log.records[name]) > 1 else "find", name)

    def _one(self, kind: str, name: str) -> Question:
        form = self.rng.choice(("What is the code of {}?", "Tell me the code of {}.", "Do you know the code of {}?"))
        return Question(kind, form.format(name), self._answer(name), self._depth(name))

    def _several(self) -> Question:
        known = [*self.log.records]
        names = self.rng.sample(known, min(len(known), self.rng.choice((2, 3))))
        if self.rng.random() < 0.2:
            names[-1] = self._stranger()
        listed = ", ".join(names[:-1]) + " and " + names[-1]
        form = self.rng.choice(("What are the codes of {}?", "Tell me the codes of {}."))
        return Question("several", form.format(listed), " ".join(map(self._answer, names)))

    def _repeat(self) -> Question:
        line = make_line(self.rng)
        return Question("repeat", f"Repeat this line: {line}", line)

    def _answer(self, name: str) -> str:
        return record(name, self.log.latest(name)[1] if name in self.log.records else "unknown")

    def _depth(self, name: str) -> float:
        return self.log.latest(name)[0] / len(self.log.lines) if name in self.log.records else 1.0

    def _stranger(self) -> str:
        """A name that is not in the log; half of the time both of its parts are."""
        while True:
            (name,) = make_names(self.rng, 1)
            if self.rng.random() < 0.5:
                first, last = (self.rng.choice([*self.log.records]).split()[part] for part in (0, 1))
                name = f"{first} {last}"
            if name not in self.log.records:
                return name
