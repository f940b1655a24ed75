"""The measurements of one server, a row of the table each."""

import statistics
import time
from collections.abc import Callable
from itertools import pairwise

from benchmarks.common import MILLION, K
from benchmarks.h200.runs import FILLED, START_LIMIT
from benchmarks.load import Load, late_tpot, percentile, steady_tpot

TIMES = 5  # that a row of decode is measured
ROW_LIMIT, MILLION_LIMIT = 240, 420  # seconds


def tokens_of(size: str) -> int:
    return MILLION if size == "1M" else int(size.removesuffix("K")) * K


class Rows:
    """The rows' measurements; `scale` divides all lengths, for a trial on a small machine."""

    def __init__(self, load: Load, scale: int) -> None:
        self.load, self.scale = load, scale

    def warm_up(self) -> None:
        """What the first prompts and the first graphs cost is nobody's figure."""
        self.load.limit = START_LIMIT
        self.load.at_once([self.prompt(8 * K)] * 2, 4)

    def measure(self, row: str) -> dict[str, float]:
        self.load.limit = MILLION_LIMIT if row == "million" else ROW_LIMIT
        self.load.random.seed(row)  # the same prompts and arrivals for every server, whatever rows it had before
        kind, *rest = row.split()
        measures: dict[str, Callable[..., dict[str, float]]] = {
            "ttft": self.ttft,
            "tpot": self.tpot,
            "poisson": self.poisson,
            "million": self.million,
        }
        return measures[kind](*rest)

    def prompt(self, length: int) -> list[int]:
        return self.load.prompt(max(length // self.scale, 1))

    def ttft(self, size: str) -> dict[str, float]:
        """Seconds to the first token of one prompt; of a short one the median of three."""
        prompts = [self.prompt(tokens_of(size)) for _ in range(3 if tokens_of(size) < 256 * K else 1)]
        return {"ttft": statistics.median(self.load.at_once([prompt], 1)[0].ttft for prompt in prompts)}

    def tpot(self, sequences: str, size: str, filled: str = "") -> dict[str, float]:
        """Seconds a token while all sequences decode, and of one alone, unless it was filled, also to the first.

        Medians of several times, for a step of few sequences moves with whatever else the host does; the least and the
        most of them, too.
        """
        self.load.extra = FILLED if filled else {}
        times = 1 if filled or tokens_of(size) * int(sequences) > 256 * K else TIMES
        runs = [
            self.load.at_once([self.prompt(tokens_of(size)) for _ in range(int(sequences))], 128) for _ in range(times)
        ]
        self.load.extra = {}
        tpots = [steady_tpot(replies) for replies in runs]
        gaps = [b - a for replies in runs for reply in replies for a, b in pairwise(reply.times)]
        found = {"tpot": statistics.median(tpots), "least tpot": min(tpots), "most tpot": max(tpots)}
        if int(sequences) == 1 and not filled:
            found["ttft"] = statistics.median(replies[0].ttft for replies in runs)
        return found | {"p50 gap": statistics.median(gaps), "most gap": max(gaps)}

    def poisson(self) -> dict[str, float]:
        """256 requests of 2K tokens in and 256 out, arriving at random, 16 a second: prefill and decode overlap."""
        prompts = [self.prompt(2 * K) for _ in range(max(256 // self.scale, 8))]
        begun = time.perf_counter()
        replies = self.load.poisson(prompts, 256, rate=16)
        seconds = time.perf_counter() - begun
        return {
            "tokens a second": sum(len(reply.tokens) for reply in replies) / seconds,
            "p99 tpot": percentile([reply.tpot for reply in replies], 0.99),
            "p50 tpot": percentile([reply.tpot for reply in replies], 0.5),
            "p50 ttft": percentile([reply.ttft for reply in replies], 0.5),
        }

    def million(self) -> dict[str, float]:
        """One prompt of 1,048,000 tokens, 256 tokens of answer, and a second question on the same document."""
        document = self.prompt(MILLION)
        (first,) = self.load.at_once([document], 256)
        (second,) = self.load.at_once([document[:-16] + self.load.prompt(64)], 8)
        return {
            "ttft": first.ttft,
            "tpot": late_tpot(first),
            "second ttft": second.ttft,
            "second cached": second.cached,
            "prompt": len(document),
        }
