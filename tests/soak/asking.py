"""Sends requests, judges what comes, and counts it."""

import asyncio
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.soak.traffic import COLORS, Asked, Case


@dataclass
class Tally:
    """What came of all requests; `faults` says of each wrong answer, and of each missing one, what it was."""

    level: float  # a lead of a logprob below which either of two tokens is right
    ended: Counter[str] = field(default_factory=Counter)
    compared: int = 0  # tokens equal to those of the cold answer
    level_ends: int = 0  # comparisons that ended where the two best were level
    wrong: list[str] = field(default_factory=list)
    wrong_answers: list[dict[str, Any]] = field(default_factory=list)  # what to look at, of each in `wrong`
    faults: list[str] = field(default_factory=list)
    told: int = 0  # of both

    def news(self) -> list[str]:
        """What went wrong since this was last called, the first few of it."""
        said = self.told
        self.told = len(self.wrong) + len(self.faults)
        return [*self.wrong, *self.faults][-(self.told - said) :][:5] if self.told > said else []

    def compare(self, asked: Asked, choice: "Choice") -> None:
        case, tokens = asked.case, choice.tokens
        assert case
        for at, (ours, cold, lead) in enumerate(zip(tokens, case.tokens, case.leads, strict=False)):
            if ours == cold:
                self.compared += 1
                continue
            if lead >= self.level:
                self.wrong.append(
                    f"prompt of {len(case.prompt)} tokens, {choice.cached} of them cached: token {at} is {ours}, cold "
                    f"{cold}, which leads by {lead:.3f}; {short(asked.body)}"
                )
                self.wrong_answers.append({"body": asked.body, "tokens": tokens, "cold": case.tokens})
            else:
                self.level_ends += 1
            return


@dataclass
class Choice:
    """One choice of an answer, as far as it has come."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    ended: bool = False
    cached: int | None = None  # tokens of the prompt, of the first choice alone

    def add(self, event: dict[str, Any]) -> None:
        self.tokens += event["token_ids"] or []
        self.logprobs += (event.get("logprobs") or {}).get("token_logprobs") or []
        self.text += event["text"]
        self.ended = self.ended or event["finish_reason"] is not None


async def cold(client: httpx.AsyncClient, body: dict[str, Any]) -> Case:
    """The answer that others are measured by; raises AssertionError where there is none."""
    reply = await client.post("/v1/completions", json=body)
    assert reply.status_code == 200, f"a cold prompt got {reply.status_code}: {reply.text[:300]}"
    [choice] = reply.json()["choices"]
    leads = []
    for found in choice["logprobs"]["top_logprobs"]:
        first, second = sorted(found.values(), reverse=True)[:2]
        leads.append(first - second)
    return Case(body["prompt"], choice["token_ids"], leads)


async def ask(client: httpx.AsyncClient, asked: Asked, tally: Tally, may_refuse: bool = False) -> None:
    """Send a request and put what came into the tally. `may_refuse`: any refusal in a sentence is right, too."""
    await asyncio.sleep(asked.pause)
    prompt, what = asked.body["prompt"], f"{len(asked.body['prompt'])} tokens, {short(asked.body)}"
    choices = [Choice() for _ in range(asked.body.get("n") or 1)]
    try:
        async with asyncio.timeout(asked.leaves_at if asked.leaves_after == 0 else None):
            status, said = await receive(client, asked, choices)
    except TimeoutError:
        tally.ended["left"] += 1
        return
    except httpx.HTTPError as error:
        tally.faults.append(f"no answer to {what}: {error!r}")
        return
    if status != 200:
        refused = (asked.refused and 400 <= status < 500) or may_refuse
        sentence = sentence_of(said)
        if not (refused and sentence):
            tally.faults.append(f"{status} to {what}: {said[:300]}")
        tally.ended["refused"] += 1
        return
    if said:
        if not (may_refuse and sentence_of(said)):
            tally.faults.append(f"an error in the answer to {what}: {said[:300]}")
        tally.ended["broken off, said so"] += 1
        return
    if asked.refused:
        tally.faults.append(f"answered, not refused: {what}")
    left = asked.leaves_after is not None
    tally.ended["left" if left else "answered"] += 1
    if asked.case:
        tally.compare(asked, choices[0])
    for choice in choices:
        if fault := judge(asked, choice, left):
            tally.faults.append(f"{fault}, of {what}; prompt begins {prompt[:5]}")


async def receive(client: httpx.AsyncClient, asked: Asked, choices: list[Choice]) -> tuple[int, str]:
    """The status, and the error if there is one; fills the choices. Leaves where the client is to leave."""
    async with client.stream("POST", "/v1/completions", json=asked.body) as reply:
        if reply.status_code != 200 or not asked.body.get("stream"):
            text = (await reply.aread()).decode(errors="replace")
            if reply.status_code == 200:
                for event in json.loads(text)["choices"]:
                    choices[event["index"]].add(event)
                choices[0].cached = cached_tokens(json.loads(text))
                return 200, ""
            return reply.status_code, text
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                return 200, json.dumps(event)
            for choice in event["choices"]:
                choices[choice["index"]].add(choice)
            choices[0].cached = choices[0].cached or cached_tokens(event)
            if asked.leaves_after is not None and sum(len(choice.tokens) for choice in choices) >= asked.leaves_after:
                return 200, ""
    return 200, ""


def cached_tokens(event: dict[str, Any]) -> int | None:
    return ((event.get("usage") or {}).get("prompt_tokens_details") or {}).get("cached_tokens")


def judge(asked: Asked, choice: Choice, left: bool) -> str | None:
    """What is wrong with an answer, whatever its tokens are."""
    most = asked.body["max_tokens"]
    if len(choice.tokens) > most:
        return f"{len(choice.tokens)} tokens, asked for {most}"
    if not all(value <= 0 for value in choice.logprobs):  # NaN included
        return f"logprobs that are none: {choice.logprobs}"
    if left:
        return None
    if not choice.ended:
        return "an answer without its end"
    if asked.body["ignore_eos"] and len(choice.tokens) != most:
        return f"{len(choice.tokens)} tokens, asked for {most}"
    if "structured_outputs" in asked.body and choice.text.strip() not in COLORS:
        return f"{choice.text!r}, where one of {COLORS} was to be chosen"
    return None


def sentence_of(said: str) -> str | None:
    """The message of an error in the API's form."""
    try:
        message = json.loads(said)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        return None
    return message if isinstance(message, str) and " " in message else None


def short(body: dict[str, Any]) -> str:
    usual = ("model", "prompt", "ignore_eos", "return_token_ids", "return_tokens_as_token_ids", "logprobs")
    return json.dumps({name: value for name, value in body.items() if name not in usual})
