"""The figures in a browser: context used, what was cached, state against KV, and those of each answer."""

from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.e2e.playground.asking import DONE, ask, start
from tests.e2e.playground.fake_gateway import CONTEXT, USAGE, FakeGateway, Reply

pytestmark = pytest.mark.browser


def shown(page: Page) -> dict[str, str]:
    """Each figure of the side by its name."""
    return page.evaluate("""() => Object.fromEntries(
        [...document.querySelectorAll("#context [data-show]")].map((e) => [e.dataset.show, e.textContent.trim()]))""")


def widths(page: Page, bar: str) -> list[float]:
    """The share that each part has of its bar."""
    return page.evaluate(
        """(bar) => {
            const whole = document.querySelector(`[data-show="${bar}"]`).getBoundingClientRect().width;
            const parts = document.querySelectorAll(`[data-show="${bar}"] i`);
            return [...parts].map((part) => part.getBoundingClientRect().width / whole);
        }""",
        bar,
    )


def picture(page: Page) -> tuple[float, float]:
    """Where the mark of the present stands, as shares of the picture's axes."""
    across, up = (float(page.locator('[data-show="now"]').get_attribute(name) or "") for name in ("cx", "cy"))
    return across / 300, (120 - up) / 120


def test_before_the_first_question(page: Page) -> None:
    figures = shown(page)
    assert figures["used"] == "0 of 1,048,576 tokens, 0%"
    assert (figures["cached"], figures["fresh"], figures["answered"]) == ("0", "0", "0")
    assert (figures["state"], figures["kv"]) == ("41.4 MiB", "0 B")
    assert widths(page, "bar") == [0, 0, 0]


def test_after_an_answer(page: Page, gateway: FakeGateway) -> None:
    ask(page, "One?")
    figures = shown(page)
    assert figures["used"] == "131,284 of 1,048,576 tokens, 12.5%"
    assert figures["fresh-name"] == "Prompt, computed"
    assert (figures["cached"], figures["fresh"], figures["answered"]) == ("98,304", "32,768", "212")
    assert figures["free"] == "917,292"
    most = CONTEXT["max_model_len"]
    cached, fresh, answered = widths(page, "bar")
    assert (cached, fresh) == pytest.approx((98_304 / most, 32_768 / most), rel=0.05)
    assert 0 < answered < 0.02  # 212 of a million are seen nevertheless
    meter = page.get_by_role("meter", name="Context used")
    expect(meter).to_have_attribute("aria-valuenow", "131284")
    expect(meter).to_have_attribute("aria-valuemax", "1048576")
    expect(meter).to_have_attribute("aria-valuetext", figures["used"])
    page.click("#new")
    assert shown(page)["used"] == "0 of 1,048,576 tokens, 0%"


def test_state_is_constant_and_kv_grows(page: Page, gateway: FakeGateway) -> None:
    each, state, most = (CONTEXT[field] for field in ("mla_bytes_per_token", "kda_state_bytes", "max_model_len"))
    seen = []
    for tokens, kv in ((1_000, "7.7 MiB"), (10_000, "76.9 MiB"), (1_000_000, "7.5 GiB")):
        gateway.reply = Reply(usage={"prompt_tokens": tokens - 1, "completion_tokens": 1})
        ask(page, "More?")
        figures = shown(page)
        assert (figures["state"], figures["kv"]) == ("41.4 MiB", kv)
        assert figures["kv-note"] == "grows by 7.9 KiB a token"
        assert figures["full"] == "With the whole context used: 41.4 MiB and 7.9 GiB."
        seen.append(picture(page))
    whole = 1.08 * most * each
    for (across, up), tokens in zip(seen, (1_000, 10_000, 1_000_000), strict=True):
        assert across == pytest.approx(tokens / most)
        assert up == pytest.approx(tokens * each / whole)
    expect(page.locator('[data-show="caption"]')).to_have_text(
        "Now, at 1,000,000 tokens, the latent KV is 186 times the state."
    )
    expect(page.get_by_role("img")).to_have_attribute(
        "aria-label",
        "Memory by length of the conversation, up to 1,048,576 tokens: the KDA state stays at 41.4 MiB, "
        "the latent KV grows to 7.9 GiB.",
    )
    assert state < whole


@pytest.mark.parametrize(
    "context", [None, {**CONTEXT, "kda_state_bytes": None, "mla_bytes_per_token": None}], ids=["no route", "null"]
)
def test_memory_is_hidden_where_it_is_not_known(
    visit: Callable[..., Page], gateway: FakeGateway, context: dict[str, Any] | None
) -> None:
    gateway.context = context
    page = visit()
    ask(page, "One?")
    expect(page.locator(".memory")).to_be_hidden()
    expect(page.locator('[data-show="no-memory"]')).to_contain_text("model_config")
    assert shown(page)["used"] == "131,284 of 1,048,576 tokens, 12.5%"  # /v1/models has the length, too


def test_cached_tokens_not_reported(page: Page, gateway: FakeGateway) -> None:
    gateway.reply = Reply(usage={**USAGE, "prompt_tokens_details": None})
    ask(page, "One?")
    figures = shown(page)
    assert (figures["cached"], figures["fresh-name"], figures["fresh"]) == ("not reported", "Prompt", "131,072")
    expect(page.locator(".figures")).to_contain_text("Prompt\u00a0131,072 ·")


def test_figures_of_an_answer(page: Page, gateway: FakeGateway) -> None:
    gateway.reply = Reply(pause=0.05)
    ask(page, "One?")
    queue, first, prompt, answer, speed = page.locator(".figures").inner_text().replace("\u00a0", " ").split(" · ")
    assert queue == "Queue 0.25 s"
    assert first.startswith("First token ") and first.endswith(" s")
    assert prompt == "Prompt 131,072, 75.0% cached"
    assert answer == "Answer 212"
    assert speed.endswith(" tokens/s")


def test_no_figure_is_made_up(page: Page, gateway: FakeGateway) -> None:
    """Neither usage nor the gateway's headers: what the browser measured is all there is."""
    gateway.reply = Reply(usage=None, gateway_headers=False)
    ask(page, "One?")
    assert page.locator(".figures").inner_text().startswith("First\u00a0token\u00a0")
    assert "·" not in page.locator(".figures").inner_text()
    assert shown(page)["used"] == "0 of 1,048,576 tokens, 0%"


def test_a_stopped_answer_has_its_figures(page: Page, gateway: FakeGateway) -> None:
    gateway.reply = Reply(hold_after=1, running_usage=True)
    start(page, "One?")
    expect(page.locator('[data-show="used"]')).to_have_text("131,073 of 1,048,576 tokens, 12.5%")
    assert shown(page)["cached"] == "known at the end"
    page.click("#stop")
    page.wait_for_selector(DONE)
    expect(page.locator(".figures")).to_contain_text("Answer\u00a01")
    assert shown(page)["cached"] == "not reported"
    assert gateway.bodies[0]["stream_options"]["continuous_usage_stats"] is True


def test_length_is_that_of_the_chosen_model(visit: Callable[..., Page], gateway: FakeGateway) -> None:
    gateway.models = ["kimi-linear", "other"]
    page = visit()
    expect(page.locator("#model")).to_be_enabled()
    page.select_option("#model", "other")
    ask(page, "One?")
    assert gateway.bodies[0]["model"] == "other"
