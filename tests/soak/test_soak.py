"""The soak asks the same again for the same seed, and sees what is wrong: a token, an answer, a sentence."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from tests.soak.asking import Tally, ask
from tests.soak.traffic import TOKENS, Asked, Case, Traffic

CASE = Case([1, 2, 3], [4, 5, 6], [1.0, 0.01, 1.0])
BODY = {"prompt": [1, 2, 3], "max_tokens": 3, "ignore_eos": True}


def storms(seed: int, drafts: bool = False) -> list[Asked]:
    traffic = Traffic("model", 10_000, seed, drafts)
    found: list[Asked] = []
    for _ in range(3):
        traffic.open_round()
        traffic.cases += [Case(traffic.prompt(), [7] * TOKENS, [1.0] * TOKENS) for _ in range(5)]
        found += traffic.storm(100)
    return found


def test_the_same_seed_asks_the_same() -> None:
    first, again, other = storms(1), storms(1), storms(2)
    assert first == again != other
    lengths = [len(asked.body["prompt"]) for asked in first if not asked.refused]
    assert 1 <= min(lengths) < 100 and 5000 < max(lengths) <= 9000
    for kind in ("seed", "top_k", "top_p", "min_p", "n", "structured_outputs", "prompt_logprobs", "stream"):
        assert any(kind in asked.body for asked in first), kind
    assert all(asked.refused for asked in storms(1, drafts=True) if "min_p" in asked.body)  # as vLLM does
    assert any(asked.leaves_after is not None for asked in first) and any(asked.refused for asked in first)


def reply(tokens: list[int], **more: Any) -> httpx.Response:
    choice = {"index": 0, "token_ids": tokens, "text": "", "finish_reason": "length", **more}
    return httpx.Response(200, json={"choices": [{"logprobs": {"token_logprobs": [-1.0] * len(tokens)}, **choice}]})


def tally_of(answer: httpx.Response, asked: Asked, may_refuse: bool = False) -> Tally:
    async def run() -> Tally:
        tally = Tally(level=0.05)
        async with httpx.AsyncClient(
            transport=httpx.MockTransport(lambda request: answer), base_url="http://server"
        ) as client:
            await ask(client, asked, tally, may_refuse)
        return tally

    return asyncio.run(run())


def test_tokens_are_compared_as_far_as_they_are_well_posed() -> None:
    right, wrong, level = (tally_of(reply(tokens), Asked(BODY, CASE)) for tokens in ([4, 5, 6], [9, 5, 6], [4, 9, 9]))
    assert (right.compared, right.wrong, right.level_ends) == (3, [], 0)
    assert (wrong.compared, len(wrong.wrong), wrong.level_ends) == (0, 1, 0)
    assert (level.compared, level.wrong, level.level_ends) == (1, [], 1)
    assert not (right.faults or wrong.faults or level.faults)


SENTENCE = {"error": {"message": "The prompt is too long.", "code": 400}}
DONE = "data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("answer", "asked", "fault"),
    [
        (reply([4, 5]), Asked(BODY), "2 tokens, asked for 3"),
        (reply([4, 5, 6, 7]), Asked(BODY), "4 tokens, asked for 3"),
        (reply([4, 5, 6], finish_reason=None), Asked(BODY), "without its end"),
        (reply([4, 5, 6], logprobs={"token_logprobs": [-1.0, 0.5, -1.0]}), Asked(BODY), "logprobs that are none"),
        (
            reply([4], text="purple"),
            Asked({**BODY, "ignore_eos": False, "structured_outputs": {}}),
            "was to be chosen",
        ),
        (httpx.Response(400, json=SENTENCE), Asked(BODY), "400 to 3 tokens"),
        (httpx.Response(400, json=SENTENCE), Asked(BODY, refused=True), None),
        (httpx.Response(500, json=SENTENCE), Asked(BODY, refused=True), "500 to 3 tokens"),
        (httpx.Response(400, text="Bad"), Asked(BODY, refused=True), "400 to 3 tokens"),
        (reply([4, 5, 6]), Asked(BODY, refused=True), "not refused"),
        (httpx.Response(200, text=DONE), Asked({**BODY, "stream": True}), "without its end"),
        (
            httpx.Response(200, text=f"data: {json.dumps(SENTENCE)}\n\n"),
            Asked({**BODY, "stream": True}),
            "an error in the answer",
        ),
    ],
)
def test_faults_are_seen(answer: httpx.Response, asked: Asked, fault: str | None) -> None:
    faults = tally_of(answer, asked).faults
    assert len(faults) == (fault is not None)
    assert fault is None or fault in faults[0]


def test_a_gateway_may_refuse_in_a_sentence() -> None:
    assert not tally_of(httpx.Response(503, json=SENTENCE), Asked(BODY), may_refuse=True).faults
    assert tally_of(httpx.Response(503, text="busy"), Asked(BODY), may_refuse=True).faults
