"""What the conformance suite asks for unless a case says otherwise, and the texts of replies."""

from typing import Any

CHAT: list[Any] = [{"role": "user", "content": "Hello, who are you?"}]
PROMPT = "Once upon a time there was a lighthouse"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}


def text_of(choice) -> str:
    return choice.message.content if hasattr(choice, "message") else choice.text


def streamed(chunks, index: int = 0) -> str:
    """The text of choice `index` of a stream of either kind."""
    parts = []
    for chunk in chunks:
        for choice in chunk.choices:
            if choice.index == index:
                parts.append((choice.delta.content if hasattr(choice, "delta") else choice.text) or "")
    return "".join(parts)
