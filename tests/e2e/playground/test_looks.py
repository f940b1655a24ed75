"""What the page looks like: light and dark, phone and desk, and whether everybody can use it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.e2e.playground.asking import ANSWER as ANSWER_TEXT
from tests.e2e.playground.asking import DONE, ask, attach, module, start, until
from tests.e2e.playground.conftest import DESK, PHONE
from tests.e2e.playground.fake_gateway import FakeGateway, Reply

pytestmark = pytest.mark.browser

ANSWER = r"""A delta rule writes the *difference* between what a memory returns and what it should return:

$$S_t = S_{t-1}\left(\operatorname{Diag}(\alpha_t) - \beta_t k_t k_t^\top\right) + \beta_t v_t k_t^\top$$

```python
state = state * decay
state = state + beta * outer(value - state @ key, key)  # an old association is replaced, not blurred
```

| length | KDA state | latent KV |
| ---: | ---: | ---: |
| 4,096 | 41.4 MiB | 31.5 MiB |
| 1,048,576 | 41.4 MiB | 7.9 GiB |

1. The state has a fixed size, whatever the length of the text.
2. A token costs the same at position ten and at position one million.
"""
COLD = {"prompt_tokens": 612_040, "completion_tokens": 212, "prompt_tokens_details": {"cached_tokens": 0}}
WARM = {"prompt_tokens": 612_290, "completion_tokens": 96, "prompt_tokens_details": {"cached_tokens": 612_096}}
# As if earlier visits had measured this model.
MEASURED = {"tokens": 262_144, "cached": 0, "bytes": 1_100_000, "seconds": 28}
PLACES: dict[str, dict[str, Any]] = {
    "phone": {"viewport": PHONE, "is_mobile": True, "has_touch": True},
    "desk": {"viewport": DESK},
}
Visit = Callable[..., Page]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessible_in_each_state(
    visit: Visit, gateway: FakeGateway, scheme: str, place: str, request: pytest.FixtureRequest
) -> None:
    folder: Path | None = request.config.getoption("--screenshots", default=None)
    page = visit(color_scheme=scheme, **PLACES[place])
    gateway.reply = Reply(pieces=re.findall(r"\s*\S+", ANSWER), pause=0.005)

    def look(state: str) -> None:
        if folder:
            page.screenshot(path=folder / f"{place}-{scheme}-{state}.png")
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
        assert page.evaluate("document.documentElement.scrollWidth") <= PLACES[place]["viewport"]["width"]
        for part in ("#composer", ".top", "summary"):
            expect(page.locator(part)).to_be_in_viewport(ratio=1)

    measured = {"key": "kimi-linear", "prompts": [MEASURED], "prefixes": {}}
    module(page, "store/database.js", "(await m.openDatabase()).put('measures', a)", measured)
    page.reload()
    expect(page.locator("#model option")).to_have_count(1)
    look("welcome")
    gateway.counts = 1_200_000
    attach(page, "report-with-a-name-that-is-much-longer-than-a-phone-is-wide.txt", b"word " * 600_000)
    expect(page.locator("#forecast")).to_contain_text("at most")
    look("too-long")
    page.press("#question", "Enter")
    expect(page.locator("#notice")).to_contain_text("Not sent")
    look("not-sent")
    page.get_by_role("button", name="Remove").click()
    gateway.counts = 612_000
    attach(page, "report.txt", b"words " * 500_000)
    page.fill("#question", "What is a delta rule?")
    expect(page.locator("#forecast")).to_contain_text("first token in about")
    look("document")
    gateway.reply = Reply(
        pieces=["", *re.findall(r"\s*\S+", ANSWER)], pause=0.005, usage=COLD, hold_after=1, gateway_headers=False
    )
    page.press("#question", "Enter")
    until(page, "document.querySelector('.waiting .bar').getAttribute('aria-valuenow') > 3")
    look("reading")
    gateway.release()
    page.wait_for_selector(DONE)
    expect(page.locator(".formula.set")).to_have_count(1)
    until(page, "document.querySelector('.hljs-comment')")
    look("answer")
    gateway.reply = Reply(pieces=["The state alone: 41.4 MiB."], usage=WARM, gateway_headers=False)
    ask(page, "And how much memory does that take?")
    expect(page.locator("#warmth")).to_contain_text("times sooner")
    page.locator("#context").evaluate("(context) => { context.open = true; }")
    look("warm")
    page.locator("#context").evaluate("(context, open) => { context.open = open; }", place == "desk")
    gateway.held.clear()
    gateway.reply = Reply(pieces=["It is the sum of", " two parts"], hold_after=1)
    start(page, "Why?")
    expect(page.locator(ANSWER_TEXT)).to_have_text("It is the sum of")
    page.click("#stop")
    page.wait_for_selector(DONE)
    look("stopped")
    page.locator(".edit").nth(1).click()
    look("editing")
    page.keyboard.press("Escape")
    gateway.reply = Reply(status=429, error="60 requests a minute", headers={"Retry-After": "12"})
    ask(page, "And how fast is it?")
    look("refused")
    page.get_by_role("button", name="Chats").click()
    page.locator("#chats li").wait_for()
    look("chats")
    page.get_by_role("button", name="Settings").click()
    look("settings")
    page.get_by_role("button", name="API key").click()
    look("key")


def test_colours_follow_the_system(visit: Visit) -> None:
    def lightness(page: Page, what: str) -> int:
        colour = page.evaluate(f"getComputedStyle(document.documentElement).{what}")
        return sum(int(value) for value in re.findall(r"\d+", colour)[:3])

    light, dark = visit(color_scheme="light"), visit(color_scheme="dark")
    assert lightness(light, "backgroundColor") > 700 > 120 > lightness(light, "color")
    assert lightness(dark, "backgroundColor") < 120 < 600 < lightness(dark, "color")
    dark.emulate_media(color_scheme="light")
    assert lightness(dark, "backgroundColor") > 700


def test_figures_stand_beside_the_text_on_a_desk_and_above_it_on_a_phone(visit: Visit) -> None:
    def boxes(page: Page) -> tuple[dict, dict]:
        return page.evaluate("""["#reading", ".side"].map((one) => document.querySelector(one)
            .getBoundingClientRect().toJSON())""")

    desk, phone = visit(**PLACES["desk"]), visit(**PLACES["phone"])
    text, side = boxes(desk)
    assert text["right"] <= side["left"]
    expect(desk.locator(".legend").first).to_be_visible()
    text, side = boxes(phone)
    assert side["bottom"] <= text["top"]
    assert (text["left"], text["right"]) == (0, PHONE["width"])
    expect(phone.locator(".legend").first).to_be_hidden()
    phone.click("summary")
    expect(phone.locator(".legend").first).to_be_visible()


def test_message_field_stands_under_the_text(visit: Visit, gateway: FakeGateway) -> None:
    for options in PLACES.values():
        page = visit(**options)
        gateway.reply = Reply(pieces=["line\n\n"] * 80)
        ask(page, "Long?")
        left, right = page.evaluate("""["left", "right"].map((edge) => Math.abs(
            document.querySelector("#composer").getBoundingClientRect()[edge]
            - document.querySelector("#conversation").getBoundingClientRect()[edge]))""")
        assert left < 1 and right < 1


def test_message_field_grows_with_its_text_to_a_limit(page: Page) -> None:
    def height() -> float:
        return page.evaluate("question.getBoundingClientRect().height")

    one = height()
    page.fill("#question", "a\nb\nc")
    assert one * 2 < height() < one * 4
    page.fill("#question", "a\n" * 200)
    assert height() <= 0.4 * DESK["height"] + 1
    expect(page.locator("#send")).to_be_in_viewport(ratio=1)
    page.fill("#question", "")
    assert height() == one


def test_motion_is_left_out_where_it_is_not_wanted(visit: Visit, gateway: FakeGateway) -> None:
    gateway.reply = Reply(hold_after=0)
    page = visit(reduced_motion="reduce")
    page.fill("#question", "Wait")
    page.press("#question", "Enter")
    expect(page.locator(".waiting")).to_be_visible()
    assert page.evaluate("document.getAnimations().length") == 0
