"""A request that goes on from an earlier response counts what came before, which the replica reads again."""

import json
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support.gateway import Running, bearer
from tests.support.upstream import Upstream

BEFORE = 1300  # tokens of the first response's prompt and answer
LONG = "x" * 4000  # about as many tokens as its usage says


@dataclass
class Conversing(Upstream):
    """Answers /v1/responses with an id of its own and the usage of a prompt that the earlier turns are part of."""

    asked: int = 0

    async def answer(self, body: bytes, send) -> None:
        request: dict[str, Any] = json.loads(body) if body else {}
        self.asked += bool(body)
        usage = {"input_tokens": 1000, "output_tokens": 300} if self.usage else None
        found: dict[str, Any] = {"id": f"resp_{self.asked}", "status": "completed", "output": [], "usage": usage}
        begun = found | {"status": "queued", "usage": None}
        if not request.get("stream"):
            return await self.reply(send, 200, json.dumps(begun if request.get("background") else found).encode())
        head = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        for kind, said in (("response.created", begun), ("response.completed", found)):
            event = f"event: {kind}\ndata: {json.dumps({'response': said, 'type': kind})}\n\n".encode()
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def post(gateway: Running, **body: Any) -> Any:
    with gateway.client(headers=bearer("alice")) as client:
        return client.post("/v1/responses", json={"input": "x" * 40} | body)


@pytest.mark.parametrize("stream", [False, True])
def test_earlier_turns_count_towards_the_longest_context(start, keys_file, stream: bool) -> None:
    upstream = Conversing(counted=50)
    gateway = start(upstream, keys=keys_file(alice={"longest_context": 1500}))
    assert post(gateway, input=LONG, stream=stream).status_code == 200
    refused = post(gateway, previous_response_id="resp_1", max_output_tokens=151)
    assert refused.status_code == 400
    assert all(word in refused.json()["error"]["message"] for word in ("1500", str(BEFORE + 50), "151"))
    assert upstream.asked == 1
    assert post(gateway, previous_response_id="resp_1", max_output_tokens=150).status_code == 200
    assert post(gateway, previous_response_id="resp_1").status_code == 200
    assert json.loads(upstream.seen[-1].body)["max_output_tokens"] == 150


@pytest.mark.parametrize("stream", [False, True])
def test_earlier_turns_are_admitted_and_charged(start, keys_file, stream: bool) -> None:
    upstream = Conversing()
    gateway = start(upstream, keys=keys_file(alice={}), admission={"short_prompt": BEFORE})
    assert post(gateway, input=LONG, stream=stream).headers["x-kimi-lane"] == "short"
    gateway.until_idle()
    upstream.usage = False  # what is charged stays the estimate
    assert post(gateway, stream=stream, previous_response_id="resp_1").headers["x-kimi-lane"] == "long"
    gateway.until_idle()
    assert gateway.lines[-1]["tokens"] == BEFORE + 10


def test_a_response_made_in_the_background_counts_once_it_was_seen_whole(start, keys_file) -> None:
    gateway = start(Conversing(), keys=keys_file(alice={}), admission={"short_prompt": BEFORE})
    assert post(gateway, background=True).json()["usage"] is None
    with gateway.client(headers=bearer("alice")) as client:
        assert client.get("/v1/responses/resp_1").json()["usage"]["output_tokens"] == 300
    assert post(gateway, previous_response_id="resp_1").headers["x-kimi-lane"] == "long"


def test_the_ratio_is_not_learned_from_a_part_of_the_prompt(start) -> None:
    gateway = start(Conversing())
    estimator = gateway.gateway.token_estimator
    before = estimator.bytes_per_token
    for previous in ("resp_of_before_a_restart", "resp_1"):
        assert post(gateway, previous_response_id=previous).status_code == 200
    gateway.until_idle()
    assert estimator.bytes_per_token == before
    post(gateway, previous_response_id=None)
    gateway.until_idle()
    assert estimator.bytes_per_token != before


def test_a_stored_response_is_asked_for_where_it_is_however_busy_that_is(start, keys_file) -> None:
    upstreams = Conversing(), Conversing()
    gateway = start(*upstreams, keys=keys_file(alice={}), admission={"short_prompt": 50})
    gateway.gateway.stored_responses.remember("alice", "resp_1", 1)
    gateway.gateway.admission.outstanding[1]["long"] += 100  # it reads a long prompt
    assert post(gateway, previous_response_id="resp_1").headers["x-kimi-replica"] == "1"
    gateway.gateway.admission.outstanding[1]["long"] -= 100


def test_what_an_answer_says_is_not_the_id_of_a_response(start, keys_file) -> None:
    """A response asked for again may begin in the middle, with a text that looks like another's id."""

    class Resuming(Conversing):
        async def answer(self, body: bytes, send) -> None:
            if body:
                return await super().answer(body, send)
            await self.reply(send, 200, b'{"type":"response.output_text.done","text":"resp_other"}')

    gateway = start(Resuming(), keys=keys_file(alice={}))
    assert post(gateway, background=True).status_code == 200
    with gateway.client(headers=bearer("alice")) as client:
        assert client.get("/v1/responses/resp_1?stream=true&starting_after=3").status_code == 200
        assert client.get("/v1/responses/resp_other").status_code == 404
