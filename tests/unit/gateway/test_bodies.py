"""What is read out of questions and answers: sizes, sessions, first tokens, usage."""

import json
import random
from typing import Any

import pytest

from kimi_server.gateway.errors import Refusal
from kimi_server.gateway.request import prompt_size
from kimi_server.gateway.request.parsed_request import plain_prompt, read_question
from kimi_server.gateway.request.prompt_size import Estimator, Size, measure
from kimi_server.gateway.routing import REMEMBERED, StoredResponses, rendezvous, session_of
from kimi_server.gateway.upstream.response import Answer

SSE = "text/event-stream; charset=utf-8"
SYSTEM = {"role": "system", "content": "You are brief."}
FIRST = {"role": "user", "content": "Hello"}


@pytest.mark.parametrize(
    ("body", "text", "ids", "prompts"),
    [
        ({"prompt": "abcd"}, 4, 0, 1),
        ({"prompt": "é\\\n😀"}, 8, 0, 1),
        ({"prompt": [1, 2, 3]}, 0, 3, 1),
        ({"prompt": [[1, 2], [3]]}, 0, 3, 2),
        ({"prompt": ["ab", "c"]}, 3, 0, 2),
        ({"prompt": "[1, 2]"}, 6, 0, 1),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 100}]}]}, 127, 0, 1),
        ({"messages": [[{"role": "user"}], [{"role": "user"}, {"role": "b"}]]}, 21, 0, 2),
        ({"system": "abc", "messages": []}, 3, 0, 1),
        ({"state": {"a": "bc"}, "questions": {"q": {"type": "t"}}}, 9, 0, 1),
        ({"model": "m", "user": "somebody", "stop": ["a"]}, 0, 0, 1),
        ({"messages": None, "prompt": True, "tools": [1, 2]}, 0, 0, 1),
    ],
)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_the_size_of_a_prompt(body: dict[str, Any], text: int, ids: int, prompts: int, ascii_only: bool) -> None:
    assert read_question(json.dumps(body, ensure_ascii=ascii_only).encode()).size == Size(text, ids, prompts)


@pytest.mark.parametrize("window", [7, 16, 33, 65536])
def test_a_size_is_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    """Of random values, with strings, escapes and numbers cut anywhere."""
    monkeypatch.setattr(prompt_size, "WINDOW", window)
    choose = random.Random(window)
    letters = ["a", '"', "\\", "\n", "é", "中", "😀", "u", "\\u0041", "[", "{", "}", ",", "7"]

    def value(depth: int = 0) -> Any:
        text = "".join(choose.choices(letters, k=choose.randrange(12)))
        kind = choose.randrange(5 if depth < 4 else 2)
        if kind < 2:
            return text
        few = range(choose.randrange(4))
        return {f"{text}{n}": value(depth + 1) for n in few} if kind == 2 else [value(depth + 1) for _ in few]

    def text_of(found: Any) -> int:
        if isinstance(found, dict):
            return sum(len(name.encode()) + text_of(one) for name, one in found.items())
        return len(found.encode()) if isinstance(found, str) else sum(map(text_of, found))

    for number in range(2000):
        found = value()
        written = json.dumps(found, ensure_ascii=number % 2 == 0).encode()
        assert measure(memoryview(written)).text == text_of(found), written
    ids = list(range(3000))
    assert measure(memoryview(json.dumps(ids).encode())) == Size(0, 3000, 1)
    assert measure(memoryview(json.dumps([ids, ids]).encode())).ids == 6000


def test_the_estimate_follows_the_usage() -> None:
    estimator = Estimator()
    assert estimator.tokens_of(Size(4000)) == 1000
    assert estimator.tokens_of(Size(4000, 7)) == 1007
    assert estimator.tokens_of(Size()) == 1
    for _ in range(50):
        estimator.correct(Size(2000, 10), 1010)
    assert 1950 <= estimator.tokens_of(Size(4000)) <= 2000
    ratio = estimator.ratio
    estimator.correct(Size(0, 10), 10)
    estimator.correct(Size(100, 10), 5)  # nonsense
    assert estimator.ratio == ratio


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "required"),
        (b"\xff\xfe", "byte 0 is not UTF-8"),
        (b'{"a": "\xc3"}', "byte 7 is not UTF-8"),
        (b'{"a": "' + b"x" * 70000 + b'\xc3"}', "byte 70007 is not UTF-8"),
        (b'{"a": ', "not JSON"),
        (b'{"a": 1} {"b": 2}', "not JSON"),
        (b'{"a": "\x01"}', "not JSON"),
        (b"[]", "object, not array"),
        (b'"x"', "object, not str"),
        (b'{"a":' + b"[" * 100_000, "nested too deeply"),
        (b'{"n":' + b"9" * 10_000 + b"}", "too long"),
        (b'{"n":"' + b"9" * 70_000 + b'"}', "n is longer than"),
    ],
)
def test_bodies_that_are_no_questions(body: bytes, words: str) -> None:
    with pytest.raises(Refusal) as refused:
        read_question(body)
    assert refused.value.status == 400
    assert words in refused.value.message


def test_halves_of_surrogate_pairs_are_taken_as_pythons_parser_takes_them() -> None:
    for text in ("a\ud83d", "\ude00b", "\ud83d\ud83d\U0001f600\ude00", "\\\ud83d"):
        question = read_question(json.dumps({"prompt": text, "user": text, "max_tokens": 5}).encode())
        assert question.size.text == len(text.encode(errors="surrogatepass"))
        assert question.answer(CHAT_ANSWER, None) == 5
    assert b"\\" not in plain_prompt(json.dumps({"prompt": "a\ud83d"}).encode())


CHAT_ANSWER = ("max_completion_tokens", "max_tokens")


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        (b'{"max_tokens": 5, "max_completion_tokens": 6}', 6),
        (b'{"max_tokens": 5, "max_completion_tokens": null}', 5),
        (b'{"max_tokens": "1000000"}', 1_000_000),
        (b'{"max_tokens": 1e6}', 1_000_000),
        (b'{"max_tokens": 5.0}', 5),
        (b'{"max_tokens": 1, "max_tokens": 7}', 7),
        (b'{"max\\u005ftokens": 7}', 7),
        (b'\xef\xbb\xbf{"max_tokens": 7}', 7),
        (b"{}", 16),
        # No limit, or what vLLM answers 400.
        (b'{"max_tokens": null}', None),
        (b'{"max_tokens": 0}', None),
        (b'{"max_tokens": -5}', None),
        (b'{"max_tokens": 1.5}', None),
        (b'{"max_tokens": "many"}', None),
        (b'{"max_tokens": {}}', None),
    ],
)
def test_the_longest_answer(body: bytes, answer: int | None) -> None:
    assert read_question(body).answer(CHAT_ANSWER, 16) == answer


@pytest.mark.parametrize(
    ("body", "answers"),
    [
        (b"{}", 1),
        (b'{"n": 3}', 3),
        (b'{"n": "3"}', 3),
        (b'{"n": null}', 1),
        (b'{"n": 0}', 1),
        (b'{"n": 2, "prompt": ["a", "b", "c"]}', 6),
    ],
)
def test_how_many_answers(body: bytes, answers: int) -> None:
    assert read_question(body).answers == answers


def chat(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def session(session_id: str | None, key: str, body: dict[str, Any]) -> str | None:
    return session_of(session_id, key, read_question(json.dumps(body).encode()).opening)


def test_turns_of_a_conversation_are_one_session() -> None:
    first = session(None, "a", chat(SYSTEM, FIRST))
    assert first == session(None, "a", chat(SYSTEM, FIRST, {"role": "assistant", "content": "x"}, FIRST))
    others = [
        session(None, "b", chat(SYSTEM, FIRST)),
        session(None, "a", chat(FIRST)),
        session(None, "a", chat(SYSTEM, {"role": "user", "content": "Hi"})),
        session(None, "a", chat(FIRST, system="You are brief.")),
        session("abc", "a", chat(SYSTEM, FIRST)),
    ]
    assert len({first, *others}) == 6
    assert session("abc", "a", {}) == session("abc", "a", chat(FIRST))
    assert session("abc", "a", {}) != session("abc", "b", {})


def test_a_long_document_after_a_long_system_prompt_is_one_session_for_all_its_turns() -> None:
    for system, document in (("x" * 50_000, "y" * 50_000), ("x" * 80_000, "y")):
        first = chat({"role": "system", "content": system}, {"role": "user", "content": document})
        later = chat(*first["messages"], {"role": "assistant", "content": "z"}, FIRST)
        assert session(None, "a", first) == session(None, "a", later)
    assert session(None, "a", chat(SYSTEM, FIRST)) != session(None, "a", chat(SYSTEM, {"role": "user", "content": "B"}))


def test_prompts_without_messages_are_sessions_by_their_beginning() -> None:
    for long in ("x" * 5000, [7] * 5000, ["x" * 5000]):
        more: Any = [*long, *long] if isinstance(long, list) and len(long) > 1 else long
        assert session(None, "", {"prompt": long}) == session(None, "", {"prompt": more})
        assert session(None, "", {"prompt": long}) != session(None, "", {"prompt": "y"})


@pytest.mark.parametrize(
    "body", [{}, {"messages": []}, {"prompt": ""}, {"messages": 3}, {"messages": [None]}, {"messages": [[], {}]}]
)
def test_sessions_of_odd_bodies(body: dict[str, Any]) -> None:
    session(None, "", body)


def test_rendezvous_moves_only_the_sessions_of_what_went() -> None:
    names = ["a", "b", "c"]
    sessions = [str(number) for number in range(600)]
    before = {session: rendezvous(session, names) for session in sessions}
    firsts = [order[0] for order in before.values()]
    assert all(150 < firsts.count(index) < 250 for index in range(3))
    for session, order in before.items():
        assert sorted(order) == [0, 1, 2]
        left = [index for index in order if index != 2]
        assert rendezvous(session, names[:2]) == left


def test_stored_responses_are_forgotten_in_the_end() -> None:
    stored = StoredResponses()
    stored.remember("bob", "resp_x", 2)
    for number in range(REMEMBERED + 5):
        stored.remember("alice", f"resp_{number}", 1)
    assert stored.replica_of("alice", "resp_0") is None
    assert stored.replica_of("alice", f"resp_{REMEMBERED}") == 1
    assert stored.replica_of("alice", None) is stored.replica_of("alice", []) is None
    assert stored.replica_of("bob", "resp_x") == 2  # not pushed out by another key's
    assert stored.replica_of("bob", f"resp_{REMEMBERED}") is None


def feed(answer: Answer, *chunks: bytes) -> bytes:
    return b"".join(answer.feed(chunk) for chunk in chunks)


def test_comments_are_no_first_token() -> None:
    answer = Answer(SSE)
    assert answer.feed(b": keep-alive\n\n") == b": keep-alive\n\n"
    assert not answer.began
    assert answer.feed(b"data: {") == b""
    assert not answer.began
    assert answer.feed(b"}\n\nda") == b"data: {}\n\n"
    assert answer.began
    assert answer.finish() == b"da"


@pytest.mark.parametrize("kind", ["created", "in_progress", "queued"])
def test_what_the_responses_api_says_before_it_read_the_prompt_is_no_first_token(kind: str) -> None:
    answer = Answer(SSE)
    event = {"type": f"response.{kind}", "response": {"id": "resp_1"}}
    feed(answer, f"event: response.{kind}\ndata: {json.dumps(event)}\n\n".encode())
    assert not answer.began
    assert answer.response_id == "resp_1"
    feed(answer, b'event: response.output_text.delta\ndata: {"delta": "x"}\n\n')
    assert answer.began


def usage_of(answer: Answer) -> tuple[int | None, int | None, int | None]:
    return answer.usage.prompt, answer.usage.cached, answer.usage.completion


OPENAI = {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 2}}
RESPONSES = {"input_tokens": 9, "output_tokens": 4, "input_tokens_details": {"cached_tokens": 2}}


@pytest.mark.parametrize("usage", [OPENAI, RESPONSES])
@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("streams", [True, False])
def test_usage(usage: dict[str, Any], compact: bool, streams: bool) -> None:
    body = json.dumps(
        {"text": '"usage": {"prompt_tokens": 1}', "usage": usage, "z": [{"usage": None}, {}]}, indent=None
    )
    body = body.replace('"z": [{"usage": null}, {}]', '"z": []')
    if compact:
        body = json.dumps(json.loads(body), separators=(",", ":"))
    answer = Answer(SSE if streams else "application/json")
    feed(answer, f"data: {body}\n\n".encode() if streams else body.encode())
    answer.finish()
    assert usage_of(answer) == (9, 2, 4)


def test_usage_of_the_messages_api_comes_in_two_parts() -> None:
    answer = Answer(SSE)
    start = {"type": "message_start", "message": {"usage": {"input_tokens": 9, "cache_read_input_tokens": 2}}}
    end = {"type": "message_delta", "usage": {"output_tokens": 4}}
    feed(answer, *(f"event: x\ndata: {json.dumps(event)}\n\n".encode() for event in (start, end)))
    assert usage_of(answer) == (9, 2, 4)


@pytest.mark.parametrize("text", ['"usage": {', '"usage": 3', '"usage": null', '"usage": {"prompt_tokens": "x"}', ""])
def test_no_usage(text: str) -> None:
    answer = Answer("application/json")
    answer.feed(text.encode())
    answer.finish()
    assert usage_of(answer) == (None, None, None)


def test_a_stream_cut_anywhere_is_the_same_stream() -> None:
    choose = random.Random(1)
    whole = b"".join(b"data: " + json.dumps({"n": n, "t": "\n\n é"}).encode() + b"\n\n" for n in range(50))
    for _ in range(50):
        answer, passed, rest = Answer(SSE), b"", whole
        while rest:
            size = choose.randint(1, 60)
            ready = answer.feed(rest[:size])
            assert not ready or ready.endswith(b"\n\n")
            passed, rest = passed + ready, rest[size:]
        assert passed + answer.finish() == whole


def test_an_endless_event_is_not_held_for_ever() -> None:
    answer = Answer(SSE)
    assert sum(len(answer.feed(b"x" * 65536)) for _ in range(64)) > 2 << 20
