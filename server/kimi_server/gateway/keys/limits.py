"""What one key has used of what it may use."""

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kimi_server.gateway.errors import Refusal

if TYPE_CHECKING:
    from kimi_server.gateway.keys.keyring import Key


class Bucket:
    """An allowance per minute that refills steadily; it may be overdrawn, and is then refilled first."""

    def __init__(self) -> None:
        self.used = 0.0
        self.at = time.monotonic()

    def wait(self, per_minute: int) -> float:
        """Seconds until something is left; 0 if there is now."""
        now = time.monotonic()
        self.used = max(0.0, self.used - (now - self.at) * per_minute / 60)
        self.at = now
        return max(0.0, self.used + 1 - per_minute) * 60 / per_minute

    def take(self, amount: float) -> None:
        self.used += amount


class Account:
    """What one key has used; it outlives a reload of the file."""

    def __init__(self, key: "Key") -> None:
        self.key = key
        self.requests, self.tokens = Bucket(), Bucket()
        self.running = 0

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """One request of this key, from its header to its end. Raises Refusal where a limit is reached."""
        key = self.key
        if key.concurrency is not None and self.running >= key.concurrency:
            message = f"Key {key.id!r} has {self.running} requests running, its limit: wait for one to end."
            raise Refusal(429, "concurrency", message, 1)
        if key.requests_per_minute is not None:
            if wait := self.requests.wait(key.requests_per_minute):
                message = f"Key {key.id!r} may send {key.requests_per_minute} requests a minute: slow down."
                raise Refusal(429, "requests_per_minute", message, wait)
            self.requests.take(1)
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    @property
    def tokens_left(self) -> float | None:
        """Of the allowance a minute; None where there is no limit."""
        per_minute = self.key.tokens_per_minute
        if per_minute is None:
            return None
        self.tokens.wait(per_minute)  # refills
        return per_minute - self.tokens.used

    def answer_limit(self, prompt: int, answer: int | None, answers: int, given: bool) -> int | None:
        """The most tokens that each of so many answers may have, where the replica has to be told; else None.

        `answer` is what the replica would do, None for all that the context leaves; `given` if the client said so.
        Raises Refusal where there is no room for an answer, or not for the one that the client wants.
        """
        key = self.key
        if key.longest_context is None:
            return None
        room = (key.longest_context - prompt) // answers
        if room < (answer if answer and given else 1):
            asked = f"{answer * answers} of answer" if answer and given else "an answer"
            raise Refusal(
                400,
                "longest_context",
                f"Key {key.id!r} may use a context of {key.longest_context} tokens, and this request asks for about "
                f"{prompt} of prompt and {asked}: shorten it.",
            )
        return room if answer is None or answer > room else None

    def charge(self, prompt: int) -> "Charge":
        """Take a prompt off the allowance. Raises Refusal."""
        key = self.key
        if key.tokens_per_minute is None:
            return Charge(None, 0)
        if wait := self.tokens.wait(key.tokens_per_minute):
            message = f"Key {key.id!r} may use {key.tokens_per_minute} tokens a minute: slow down."
            raise Refusal(429, "tokens_per_minute", message, wait)
        self.tokens.take(prompt)
        return Charge(self.tokens, prompt)


class Charge:
    """What a request was charged, until it is known what it used."""

    def __init__(self, bucket: Bucket | None, tokens: int) -> None:
        self.bucket, self.tokens = bucket, tokens

    def settle(self, used: int) -> None:
        """Correct it, once, by what was used, prompt and completion."""
        if self.bucket is not None:
            self.bucket.take(used - self.tokens)
            self.bucket = None
