"""Before a message is sent, what it costs; while it is read, how far; afterwards, cold beside warm."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.e2e.playground.asking import DONE, ask, attach, forecast, module, until
from tests.e2e.playground.fake_gateway import FakeGateway, Reply

pytestmark = pytest.mark.browser

LONG = b"word " * 60_000
COLD = {"prompt_tokens": 70_020, "completion_tokens": 10, "prompt_tokens_details": {"cached_tokens": 0}}
WARM = {"prompt_tokens": 70_060, "completion_tokens": 10, "prompt_tokens_details": {"cached_tokens": 70_000}}


def learn(page: Page, *prompts: dict[str, Any], prefixes: dict[str, Any] | None = None) -> None:
    """Let the browser have measured these prompts, in an earlier visit."""
    record = {"key": "kimi-linear", "prompts": prompts, "prefixes": prefixes or {}}
    module(page, "store/database.js", "(await m.openDatabase()).put('measures', a)", record)
    page.reload()
    expect(page.locator("#model option")).to_have_count(1)


def test_a_short_message_needs_no_figures(page: Page) -> None:
    page.fill("#question", "What?")
    expect(page.locator("#forecast")).to_be_hidden()


def test_a_long_document_is_counted_by_the_server_once(page: Page, gateway: FakeGateway) -> None:
    attach(page, "long.txt", LONG)
    expect(page.locator("#attached .size")).to_have_text("293 KiB, 70,000 tokens")
    forecast(page, "About 70,000 tokens of 1,048,576: fits.")
    page.get_by_role("button", name="Remove long.txt").click()
    expect(page.locator("#forecast")).to_be_hidden()
    attach(page, "again.txt", LONG)
    expect(page.locator("#attached .size")).to_have_text("293 KiB, 70,000 tokens")
    assert gateway.counted == [LONG.decode()]


def test_a_server_that_does_not_count(page: Page, gateway: FakeGateway) -> None:
    gateway.counts = None
    attach(page, "long.txt", LONG)
    expect(page.locator("#attached .size")).to_have_text("293 KiB")
    forecast(page, "About 75,000 tokens of 1,048,576 by an estimate; whether it fits is not known.")
    gateway.counts = 70_000
    page.click("text=Settings")
    page.click("#settings >> text=API key")
    page.press("#key", "Enter")  # connects again
    forecast(page, "About 70,000 tokens of 1,048,576: fits.")


def test_a_document_that_does_not_fit(page: Page, gateway: FakeGateway) -> None:
    gateway.counts = 1_200_000
    attach(page, "long.txt", LONG)
    why = (
        "the prompt has about 1,200,000 tokens, and at most 1,048,576 fit: remove the document, "
        "or keep the first 996,000 of about 1,200,000 tokens."
    )
    forecast(page, f"T{why[1:]}")
    expect(page.locator("#forecast")).to_have_class(re.compile("alarm"))
    page.fill("#question", "What?")
    page.press("#question", "Enter")
    notice = page.locator("#notice")
    expect(notice).to_have_text(f"Not sent, as {why}")
    expect(page.locator("#forecast")).to_be_hidden()  # it would say the same
    expect(page.locator("#question")).to_have_value("What?")
    expect(page.locator("#attached .chip")).to_have_count(1)
    assert gateway.bodies == []
    page.get_by_role("button", name="Remove long.txt").click()
    expect(notice).to_be_hidden()
    ask(page, "What?")
    assert len(gateway.bodies) == 1


def test_a_document_is_counted_for_the_model_that_is_chosen(visit: Callable[..., Page], gateway: FakeGateway) -> None:
    gateway.models = ["one", "two"]
    page = visit()
    attach(page, "long.txt", LONG)
    forecast(page, "About 70,000 tokens of 1,048,576: fits.")
    gateway.counts = 90_000
    page.select_option("#model", "two")
    forecast(page, "About 90,000 tokens of 1,048,576: fits.")


def test_what_should_be_cached(page: Page, gateway: FakeGateway) -> None:
    gateway.reply = Reply(usage=COLD)
    attach(page, "long.txt", LONG)
    ask(page, "One?")
    page.fill("#question", "Two?")
    forecast(page, "About 70,000 tokens of 1,048,576: fits, about 70,000 should be cached.")
    page.click("#new")
    attach(page, "long.txt", LONG)
    page.fill("#question", "Another?")
    forecast(page, "About 70,000 tokens of 1,048,576: fits, about 70,000 should be cached.*")
    page.click("text=Settings")
    page.fill("#system", "Be brief.")  # stands before the document: nothing of the prefix is left
    page.keyboard.press("Escape")
    expect(page.locator("#forecast")).not_to_contain_text("cached")


def test_how_long_the_first_token_will_take(page: Page, gateway: FakeGateway) -> None:
    learn(page, {"tokens": 35_000, "cached": 0, "bytes": 140_000, "seconds": 20})
    attach(page, "long.txt", LONG)
    forecast(page, "About 70,000 tokens of 1,048,576: fits, first token in about 40 s.")


def test_how_far_a_long_prompt_is_read(page: Page, gateway: FakeGateway) -> None:
    learn(page, {"tokens": 35_000, "cached": 0, "bytes": 140_000, "seconds": 5})
    gateway.reply = Reply(hold_after=0)
    attach(page, "long.txt", LONG)
    expect(page.locator("#attached .size")).to_contain_text("tokens")
    page.fill("#question", "One?")
    page.press("#question", "Enter")
    words = page.locator(".waiting .words")
    expect(words).to_have_text(
        re.compile(r"Reading: about [\d,]+ of 70,000 tokens, about \d+ s left \(estimated from earlier prompts\)")
    )
    bar = page.get_by_role("progressbar")
    expect(bar).to_be_visible()
    until(page, "document.querySelector('.waiting .bar').getAttribute('aria-valuenow') > 15")
    gateway.release()
    page.wait_for_selector(DONE)
    expect(page.locator(".waiting")).to_be_hidden()


def test_a_first_long_prompt_says_that_its_speed_is_not_known(page: Page, gateway: FakeGateway) -> None:
    gateway.reply = Reply(hold_after=0)
    attach(page, "long.txt", LONG)
    expect(page.locator("#attached .size")).to_contain_text("tokens")
    page.fill("#question", "One?")
    page.press("#question", "Enter")
    expect(page.locator(".waiting .words")).to_have_text(
        re.compile(r"Reading about 70,000 tokens(, \d+ s)?; how fast this model reads is not known yet")
    )
    expect(page.get_by_role("progressbar")).to_be_hidden()


@pytest.mark.parametrize(
    ("elapsed", "tokens", "text", "share"),
    [
        (1, 70, "Waiting for the first token", None),
        (3, 390, "Waiting for the first token, 3 s", None),
        (10, 4_000, "Reading: about 1,000 of 4,000 tokens, about 30 s left (estimated from earlier prompts)", 0.25),
        (
            50,
            4_000,
            "Reading about 4,000 tokens takes longer than estimated, 50 s so far",
            0.99,
        ),
    ],
)
def test_how_far_is_an_estimate(page: Page, elapsed: float, tokens: int, text: str, share: float | None) -> None:
    """A hundred tokens a second; nothing is cached."""
    reading = "(await import('/playground/store/speed.js')).Speed.fit([{ tokens: 1000, cached: 0, seconds: 10 }])"
    argument = {"elapsed": elapsed, "expected": {"tokens": tokens, "cached": 0}}
    found = module(page, "chat/progress.js", f"m.progress({{ ...a, speed: {reading} }})", argument)
    assert found == {"text": text, "share": share}


def test_speed_is_fitted_to_what_was_measured(page: Page) -> None:
    """Points of a quadratic give it back; one gives a line; answers to short prompts say nothing of reading."""
    fit = "(({ fitted, one, none }) => [fitted, one, none])({ fitted: m.Speed.fit(a[0]), one: m.Speed.fit(a[1]), "
    fit += "none: m.Speed.fit(a[2]) })"
    points = [{"tokens": n, "cached": 0, "seconds": n * 2e-5 + n * n * 1e-10} for n in (8_000, 130_000, 1_000_000)]
    short = [{"tokens": 30, "cached": 0, "seconds": 0.2}, {"tokens": 900, "cached": 890, "seconds": 0.3}]
    fitted, one, none = module(page, "store/speed.js", fit, [points, points[:1], short])
    assert (fitted["each"], fitted["growth"]) == pytest.approx((2e-5, 1e-4))
    assert one == {"each": pytest.approx(points[0]["seconds"] / 8_000), "growth": 0}
    assert none is None
    half = "m.Speed.fit(a[0]).read(m.Speed.fit(a[0]).seconds(400000, 100000), 1000000, 100000)"
    assert module(page, "store/speed.js", half, [points]) == pytest.approx(400_000, rel=1e-3)


def test_cold_beside_warm(page: Page, gateway: FakeGateway) -> None:
    gateway.reply = Reply(usage=COLD, gateway_headers=False, hold_after=0)
    attach(page, "long.txt", LONG)
    page.fill("#question", "One?")
    page.press("#question", "Enter")
    page.wait_for_timeout(1200)
    gateway.release()
    page.wait_for_selector(DONE)
    warmth = page.locator("#warmth")
    expect(warmth).to_contain_text(re.compile(r"Document not in the cache\s*1\.\d s"))
    expect(warmth).to_contain_text("not yet")
    gateway.reply = Reply(usage=WARM, gateway_headers=False)
    ask(page, "Two?")
    expect(warmth).to_contain_text(re.compile(r"Document in the cache\s*0\.\d\d s"))
    expect(warmth).to_contain_text(re.compile(r"\d+ times sooner with the document in the cache\."))
    expect(page.locator(".turn:last-child .figures")).to_contain_text(
        re.compile(r"First.token.0\.\d\d.s,.cold.1\.\d.s")
    )
    page.reload()
    expect(warmth).to_contain_text("times sooner")
    page.click("#new")
    expect(warmth).to_be_hidden()
