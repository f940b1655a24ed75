"""Questions for a server, whose answers are written to the terminal as they come."""

import time
from dataclasses import dataclass

from openai import OpenAI

from kimi_demo.server import Server
from kimi_demo.subject import Subject


@dataclass(frozen=True)
class Answer:
    text: str
    prompt_ids: list[int]
    token_ids: list[int]
    cached_tokens: int
    seconds_to_first: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Decoding rate: the tokens after the first over the time after the first."""
        return (len(self.token_ids) - 1) / max(self.seconds - self.seconds_to_first, 1e-9)


def converse(server: Server, subject: Subject, tokens: int) -> tuple[list[Answer], bool]:
    """Ask all questions, each in a conversation of its own; returns the answers, and whether all are right."""
    if subject.text:
        lines = subject.text.splitlines()
        print(f"\nBefore each question comes this log of {len(lines)} lines:\n")
        print("\n".join(f"    {line}" for line in (*lines[:3], "...", lines[-1])))
    answers, right = [], True
    for question, expected in subject.questions:
        print(f"\nQuestion: {question}\nAnswer:   ", end="", flush=True)
        answer = ask(server, subject.text + question, tokens, to_the_end=expected is None)
        verdict = "" if expected is None else "right, " if answer.text == expected else f"WRONG, it is: {expected}, "
        right = right and expected in (None, answer.text)
        computed = len(answer.prompt_ids) - answer.cached_tokens
        read = f"{len(answer.prompt_ids):,} tokens of prompt, {computed:,} of them computed"
        speed = f"first token after {answer.seconds_to_first:.2f} s, then {answer.tokens_per_second:.0f} tokens/s"
        print(f"\n          {verdict}{read}, {speed}")
        answers.append(answer)
    return answers, right


def ask(server: Server, prompt: str, tokens: int, to_the_end: bool) -> Answer:
    """Stream one chat answer to the terminal; `to_the_end` of `tokens`, whatever the model says."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    begun = time.monotonic()
    first = None
    text, cached = "", 0
    prompt_ids: list[int] = []
    token_ids: list[int] = []
    stream = client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        max_tokens=tokens,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"return_token_ids": True, "ignore_eos": to_the_end},
    )
    for chunk in stream:
        if chunk.usage and chunk.usage.prompt_tokens_details:
            cached = chunk.usage.prompt_tokens_details.cached_tokens or 0
        for choice in chunk.choices:
            extra = {**(chunk.model_extra or {}), **(choice.model_extra or {})}
            prompt_ids = extra.get("prompt_token_ids") or prompt_ids
            token_ids += extra.get("token_ids") or []
            if choice.delta.content:
                first = first or time.monotonic()
                text += choice.delta.content
                print(choice.delta.content, end="", flush=True)
    ended = time.monotonic()
    return Answer(text, prompt_ids, token_ids, cached, (first or ended) - begun, ended - begun)
