"""Sessions, their replicas, and where stored responses are."""

import json
from typing import Any

import pytest

from kimi_server.gateway.request.parsed_request import parse_request
from kimi_server.gateway.routing import rendezvous, session_hash
from kimi_server.gateway.upstream.stored_responses import MAX_RESPONSES, StoredResponse, StoredResponses

SYSTEM = {"role": "system", "content": "You are brief."}
FIRST = {"role": "user", "content": "Hello"}


def chat(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def session(session_id: str | None, key: str, body: dict[str, Any]) -> str | None:
    return session_hash(session_id, key, parse_request(json.dumps(body).encode()).prefix_hash)


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
    for number in range(MAX_RESPONSES + 5):
        stored.remember("alice", f"resp_{number}", 1)  # as its stream begins
        stored.remember("alice", f"resp_{number}", 1, number)  # and as it ends
        stored.remember("alice", f"resp_{number}", 1)
    known = [number for number in range(MAX_RESPONSES + 5) if stored.find("alice", f"resp_{number}")]
    assert known == list(range(5, MAX_RESPONSES + 5))
    assert stored.find("alice", f"resp_{MAX_RESPONSES}") == StoredResponse(replica=1, tokens=MAX_RESPONSES)
    assert stored.find("alice", None) is stored.find("alice", []) is None
    assert stored.find("bob", "resp_x") == StoredResponse(2, 0)  # not pushed out by another key's
    assert stored.find("bob", f"resp_{MAX_RESPONSES}") is None
