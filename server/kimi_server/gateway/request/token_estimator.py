"""An estimate of a prompt's tokens that needs no tokenizer."""

from kimi_server.gateway.request.prompt_size import PromptSize

DECAY = 0.98  # of earlier observations, at each new one
INITIAL_RATIO, INITIAL_TOKENS = 4.0, 256  # bytes a token, and the tokens that this guess weighs as


class TokenEstimator:
    """Estimates a prompt's tokens by the ratio of bytes to tokens in the usage that replicas report.

    Numerator and denominator are exponential moving sums.
    """

    def __init__(self) -> None:
        self.text_bytes = INITIAL_RATIO * INITIAL_TOKENS
        self.tokens = float(INITIAL_TOKENS)

    @property
    def bytes_per_token(self) -> float:
        return self.text_bytes / self.tokens

    def estimate(self, size: PromptSize) -> int:
        """Tokens of a prompt, at least 1."""
        return max(1, round(size.text_bytes / self.bytes_per_token) + size.token_ids)

    def observe(self, size: PromptSize, tokens: int) -> None:
        """Learn from a prompt whose tokens a replica has counted."""
        if size.text_bytes > 0 and tokens > size.token_ids:
            self.text_bytes = DECAY * self.text_bytes + size.text_bytes
            self.tokens = DECAY * self.tokens + tokens - size.token_ids
