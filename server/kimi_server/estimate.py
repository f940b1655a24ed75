"""How many prompt tokens a body holds, before any tokenizer sees it: bytes of text over a learned ratio."""

from typing import Any

# What the engine reads of a body; the rest are parameters.
PROMPT_FIELDS = ("messages", "prompt", "input", "system", "instructions", "tools", "suffix", "documents")
MEMORY = 0.98  # of what was learned, at each new observation
FIRST_RATIO, FIRST_WEIGHT = 4.0, 256  # bytes a token, and the tokens that this guess counts for


def measure(body: dict[str, Any]) -> tuple[int, int]:
    """(bytes of text, token ids given as such) in the prompt fields of a request, at any depth."""
    text = ids = 0
    stack = [body[name] for name in PROMPT_FIELDS if name in body]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            # A lone surrogate has no UTF-8 of its own; it is counted, not refused.
            text += len(value) if value.isascii() else len(value.encode(errors="surrogatepass"))
        elif isinstance(value, dict):
            stack.extend(value.keys())
            stack.extend(value.values())
        elif isinstance(value, list) and value and isinstance(value[0], int):
            ids += len(value)  # not looked at one by one: there may be a million
        elif isinstance(value, list):
            stack.extend(value)
    return text, ids


class Estimator:
    """Bytes of text a token, corrected by the `usage` that replicas report."""

    def __init__(self) -> None:
        self.text = FIRST_RATIO * FIRST_WEIGHT
        self.tokens = float(FIRST_WEIGHT)

    @property
    def ratio(self) -> float:
        return self.text / self.tokens

    def tokens_of(self, text: int, ids: int) -> int:
        return max(1, round(text / self.ratio) + ids)

    def correct(self, text: int, ids: int, tokens: int) -> None:
        """Learn that a prompt of this much text had `tokens` tokens."""
        if text > 0 and tokens > ids:
            self.text = MEMORY * self.text + text
            self.tokens = MEMORY * self.tokens + tokens - ids
