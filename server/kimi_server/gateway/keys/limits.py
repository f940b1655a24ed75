"""The limits of a key: requests and tokens a minute, concurrency, context length."""

import contextlib
import time
from collections.abc import Iterator

from kimi_server.gateway.errors import GatewayError
from kimi_server.gateway.keys.keys_file import Key


class TokenBucket:
    """An allowance a minute that refills steadily. It may be overdrawn, and then has to refill first."""

    def __init__(self) -> None:
        self.used = 0.0
        self.updated_at = time.monotonic()

    def wait(self, per_minute: int) -> float:
        """Seconds until at least one unit is left; 0 if there is one now. Refills."""
        now = time.monotonic()
        self.used = max(0.0, self.used - (now - self.updated_at) * per_minute / 60)
        self.updated_at = now
        return max(0.0, self.used + 1 - per_minute) * 60 / per_minute

    def take(self, amount: float) -> None:
        self.used += amount


class KeyLimiter:
    """Enforces the limits of one key; `key` is replaced when the file is reloaded."""

    def __init__(self, key: Key) -> None:
        self.key = key
        self.requests, self.tokens = TokenBucket(), TokenBucket()
        self.running = 0

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Count one request, from its header to its end. Raises GatewayError 429 where a limit is reached."""
        key = self.key
        if key.concurrency is not None and self.running >= key.concurrency:
            message = f"Key {key.id!r} has {self.running} requests running, its limit: wait for one to end."
            raise GatewayError(429, "concurrency", message, 1)
        if key.requests_per_minute is not None:
            if wait := self.requests.wait(key.requests_per_minute):
                message = f"Key {key.id!r} may send {key.requests_per_minute} requests a minute: slow down."
                raise GatewayError(429, "requests_per_minute", message, wait)
            self.requests.take(1)
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    @property
    def tokens_left(self) -> float | None:
        """Tokens left of tokens_per_minute, negative when overdrawn; None without that limit."""
        per_minute = self.key.tokens_per_minute
        if per_minute is None:
            return None
        self.tokens.wait(per_minute)  # refills
        return per_minute - self.tokens.used

    def output_limit(self, prompt: int, output: int | None, completions: int, requested: bool) -> int | None:
        """The max_tokens to set in a request so that it stays within longest_context; None where none is needed.

        `prompt` is in tokens. `output` is the length of one of the `completions` that the replica would allow, None for
        the rest of the context; `requested` if the client itself gave it. Raises GatewayError 400 where there is no
        room for any output, or not for what was requested.
        """
        key = self.key
        if key.longest_context is None:
            return None
        room = (key.longest_context - prompt) // completions
        if room < (output if output and requested else 1):
            asked = f"{output * completions} of answer" if output and requested else "an answer"
            raise GatewayError(
                400,
                "longest_context",
                f"Key {key.id!r} may use a context of {key.longest_context} tokens, and this request asks for about "
                f"{prompt} of prompt and {asked}: shorten it.",
            )
        return room if output is None or output > room else None

    def charge(self, prompt: int) -> "TokenCharge":
        """Take a prompt's tokens off tokens_per_minute; raises GatewayError 429 where nothing is left."""
        key = self.key
        if key.tokens_per_minute is None:
            return TokenCharge(None, 0)
        if wait := self.tokens.wait(key.tokens_per_minute):
            message = f"Key {key.id!r} may use {key.tokens_per_minute} tokens a minute: slow down."
            raise GatewayError(429, "tokens_per_minute", message, wait)
        self.tokens.take(prompt)
        return TokenCharge(self.tokens, prompt)


class TokenCharge:
    """What a request was charged by estimate, until its usage is known."""

    def __init__(self, bucket: TokenBucket | None, tokens: int) -> None:
        self.bucket, self.tokens = bucket, tokens

    def settle(self, used: int) -> None:
        """Replace the estimate, once, by the tokens used, prompt and completion."""
        if self.bucket is not None:
            self.bucket.take(used - self.tokens)
            self.bucket = None
