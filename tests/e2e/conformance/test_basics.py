"""Chat and completions: what is asked for comes, whole and streamed alike."""

import math
from collections.abc import Callable

import openai
import pytest

from tests.support.replies import CHAT, GREEDY, PROMPT, streamed, text_of

row = pytest.mark.conformance

# Characters of two, three and four bytes that the demo tokenizer never saw, so each takes several tokens.
UNICODE = "naïve \U0001f732\U0001f733 नमस्ते — ﷺ 今天"


@row("models", "`models.list()`: the model, and how long its context is")
def test_models(client: openai.OpenAI, model: str) -> None:
    [found] = [entry for entry in client.models.list() if entry.id == model]
    assert found.object == "model"
    assert found.model_extra is not None
    assert found.model_extra["max_model_len"] > 1000


@row("chat", "`chat.completions.create(messages=...)`")
def test_chat(chat: Callable) -> None:
    reply = chat()
    [choice] = reply.choices
    assert reply.object == "chat.completion"
    assert choice.message.role == "assistant"
    assert choice.message.content.strip()
    assert choice.finish_reason in ("stop", "length")


@row("chat", "`stream=True`: the pieces make the same text, the role comes first, one finish reason last")
def test_chat_stream(chat: Callable) -> None:
    whole = chat().choices[0]
    chunks = list(chat(stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert streamed(chunks) == whole.message.content
    reasons = [c.choices[0].finish_reason for c in chunks]
    assert reasons[-1] == whole.finish_reason
    assert set(reasons[:-1]) == {None}
    assert len(chunks) > 2, "the answer came in one lump"  # a busy server may put several tokens in one piece


@row("completions", "`completions.create(prompt=...)`, whole and streamed: the same text")
def test_completion(complete: Callable) -> None:
    whole = complete().choices[0]
    chunks = list(complete(stream=True))
    assert whole.text.strip()
    assert streamed(chunks) == whole.text
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason


@row("completions", "`prompt` as token ids, and as a list of prompts")
def test_prompt_forms(complete: Callable) -> None:
    ids = [72, 101, 108, 108, 111]
    by_id = complete(prompt=ids)
    assert by_id.usage.prompt_tokens == len(ids)
    several = complete(prompt=[PROMPT, "The river"])
    assert [c.index for c in several.choices] == [0, 1]
    assert several.choices[0].text == complete().choices[0].text
    assert several.choices[1].text == complete(prompt="The river").choices[0].text


@row("completions", "`echo=True`: the prompt stands before the answer")
def test_echo(complete: Callable) -> None:
    assert complete(echo=True).choices[0].text == PROMPT + complete().choices[0].text


@row("system prompt", "a `system` message: the answer to the same conversation written out as text")
def test_system_prompt(chat: Callable, complete: Callable) -> None:
    system = {"role": "system", "content": "Answer in one word."}
    written = (
        "<|im_system|>system<|im_middle|>Answer in one word.<|im_end|>"
        "<|im_user|>user<|im_middle|>Hello, who are you?<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>"
    )
    with_system = chat(messages=[system, *CHAT])
    spelled_out = complete(prompt=written)
    assert with_system.choices[0].message.content == spelled_out.choices[0].text
    assert with_system.usage.prompt_tokens == spelled_out.usage.prompt_tokens
    assert with_system.choices[0].message.content != chat().choices[0].message.content


@row("chat", "several turns, and content in parts: the answer to the same conversation written out as text")
def test_turns_and_parts(chat: Callable, complete: Callable) -> None:
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        {"role": "assistant", "content": "You are welcome."},
        {"role": "user", "content": "Who are you?"},
    ]
    written = (
        "<|im_user|>user<|im_middle|>Hello<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>You are welcome.<|im_end|>"
        "<|im_user|>user<|im_middle|>Who are you?<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>"
    )
    assert chat(messages=turns).choices[0].message.content == complete(prompt=written).choices[0].text


@row("n", "`n=3` at temperature 1: three answers, and their tokens counted")
def test_n(ask: Callable) -> None:
    reply = ask(n=3, temperature=1, seed=5, extra_body={"ignore_eos": True})
    assert [c.index for c in reply.choices] == [0, 1, 2]
    assert len({text_of(c) for c in reply.choices}) == 3
    assert reply.usage.completion_tokens == 3 * GREEDY["max_tokens"]


@row("n", "`n=2` in a stream: each piece says whose it is")
def test_n_stream(ask: Callable) -> None:
    asked = {"n": 2, "temperature": 1, "seed": 5}
    whole = ask(**asked).choices
    chunks = list(ask(**asked, stream=True))
    assert [streamed(chunks, index) for index in (0, 1)] == [text_of(c) for c in whole]


@row("stop", "a string out of the answer: the text ends before it, also in a stream")
def test_stop(ask: Callable) -> None:
    full = text_of(ask(max_tokens=48).choices[0])
    stop = full[len(full) // 2 :][:5]
    expected = full[: full.index(stop)]
    assert expected, "the demo answer repeats itself: choose another prompt"
    choice = ask(max_tokens=48, stop=[stop, "\x00never"]).choices[0]
    assert text_of(choice) == expected
    assert choice.finish_reason == "stop"
    chunks = list(ask(max_tokens=48, stop=[stop], stream=True))
    assert streamed(chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "stop"


@row("seed", "temperature 1: the same seed the same text, another seed another text")
def test_seed(ask: Callable) -> None:
    first, again, other = (text_of(ask(temperature=1, seed=s).choices[0]) for s in (7, 7, 8))
    assert first == again
    assert first != other


@row("sampling", "`top_p` near 0 and `temperature=1`: the greedy text; `logit_bias` forces a token")
def test_sampling(ask: Callable) -> None:
    greedy = text_of(ask().choices[0])
    assert text_of(ask(temperature=1, top_p=1e-6).choices[0]) == greedy
    assert text_of(ask(temperature=1, seed=1).choices[0]) != greedy
    assert text_of(ask(logit_bias={"65": 100}, max_tokens=5).choices[0]) == "AAAAA"


@row("max_tokens", "exactly so many tokens, finish reason `length`")
def test_max_tokens(ask: Callable) -> None:
    for limit in (1, 7):
        reply = ask(max_tokens=limit)
        assert reply.usage.completion_tokens == limit
        assert reply.choices[0].finish_reason == "length"


@row("max_tokens", "`max_completion_tokens` in chat does the same")
def test_max_completion_tokens(chat: Callable) -> None:
    assert chat(max_tokens=None, max_completion_tokens=5).usage.completion_tokens == 5


@row("logprobs", "chat, `top_logprobs=5`: greedy takes the likeliest; the tokens' bytes make the text")
def test_chat_logprobs(chat: Callable) -> None:
    reply = chat(logprobs=True, top_logprobs=5)
    entries = reply.choices[0].logprobs.content
    assert len(entries) == reply.usage.completion_tokens
    for entry in entries:
        top = [other.logprob for other in entry.top_logprobs]
        assert len(top) == 5
        assert top == sorted(top, reverse=True)
        assert entry.logprob == top[0] <= 0
        assert sum(map(math.exp, top)) <= 1 + 1e-5
    written = b"".join(bytes(entry.bytes) for entry in entries).decode()
    # A special token among them is left out of the text, but for a space.
    content = reply.choices[0].message.content.replace("\ufffd", "")
    assert written.replace(" ", "") == content.replace(" ", "")
    pieces = [c.choices[0] for c in chat(logprobs=True, top_logprobs=5, stream=True)]
    stream = [e for piece in pieces if piece.logprobs for e in piece.logprobs.content]
    assert [e.token for e in stream] == [e.token for e in entries]
    assert [e.logprob for e in stream] == pytest.approx([e.logprob for e in entries], abs=1e-4)


@row("logprobs", "completions, `logprobs=3`, whole and streamed")
def test_completion_logprobs(complete: Callable) -> None:
    asked = {"logprobs": 3, "extra_body": {"return_tokens_as_token_ids": True}}
    reply = complete(**asked)
    found = reply.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == reply.usage.completion_tokens
    for logprob, top in zip(found.token_logprobs, found.top_logprobs, strict=True):
        assert len(top) == 3
        assert logprob == max(top.values()) <= 0
    pieces = [c.choices[0].logprobs for c in complete(**asked, stream=True)]
    assert [t for p in pieces if p for t in p.tokens] == found.tokens


@row("usage", "prompt, completion and total add up")
def test_usage(ask: Callable) -> None:
    usage = ask(max_tokens=9).usage
    assert usage.completion_tokens == 9
    assert usage.prompt_tokens > 5
    assert usage.total_tokens == usage.prompt_tokens + 9


@row("usage", "in a stream: with `include_usage` in the last chunk, the same as whole; else nowhere")
def test_stream_usage(ask: Callable) -> None:
    whole = ask().usage
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(chunks[-1].usage, name) == getattr(whole, name)
    assert all(chunk.usage is None for chunk in ask(stream=True))


@row("Unicode", "characters of several tokens each: the stream never shows half of one")
def test_unicode(ask: Callable) -> None:
    only = {"structured_outputs": {"choice": [UNICODE]}}
    whole = ask(max_tokens=200, extra_body=only)
    assert text_of(whole.choices[0]) == UNICODE
    assert whole.usage.completion_tokens > len(UNICODE), "no character was split: this test shows nothing"
    chunks = list(ask(max_tokens=200, extra_body=only, stream=True))
    assert streamed(chunks) == UNICODE
    pieces = [streamed([chunk]) for chunk in chunks]
    assert not any("\ufffd" in piece for piece in pieces)


@row("Unicode", "free text at temperature 1: the pieces are the whole text, broken characters included")
def test_unicode_free(ask: Callable) -> None:
    broken = 0
    for seed in range(4):
        asked = {"temperature": 1.5, "seed": seed, "max_tokens": 60}
        whole = text_of(ask(**asked).choices[0])
        chunks = list(ask(**asked, stream=True))
        assert streamed(chunks) == whole
        broken += "\ufffd" in whole
    assert broken, "no text had a broken character: this test shows nothing"
