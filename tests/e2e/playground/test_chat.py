"""The conversation in a browser: streaming, stopping, asking again, copying, the keyboard, text that is no HTML."""

from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from tests.e2e.playground.asking import ANSWER, DONE, ask, attach, start, until
from tests.e2e.playground.fake_gateway import FakeGateway, Reply

pytestmark = pytest.mark.browser


def test_answer_is_shown_while_it_streams(page: Page, gateway: FakeGateway) -> None:
    gateway.reply = Reply(pieces=["First ", "words", ", last words."], hold_after=2)
    start(page, "Hello?")
    expect(page.locator(ANSWER)).to_have_text("First words")
    turn = page.locator(".turn")
    expect(turn).to_have_attribute("aria-busy", "true")
    expect(page.locator("#status")).to_have_text("Answering.")
    expect(page.locator("#stop")).to_be_visible()
    expect(page.locator("#send")).to_be_hidden()
    gateway.release()
    expect(page.locator(ANSWER)).to_have_text("First words, last words.")
    expect(turn).to_have_attribute("aria-busy", "false")
    expect(page.locator("#status")).to_have_text("Answer complete.")
    expect(page.locator("#send")).to_be_visible()
    body = gateway.bodies[0]
    assert body["model"] == "kimi-linear"
    assert body["stream"] is True
    assert body["stream_options"]["include_usage"] is True
    assert "authorization" not in gateway.headers[0]


def test_waiting_is_shown_until_the_first_token(page: Page, gateway: FakeGateway) -> None:
    gateway.reply = Reply(pieces=["Here."], hold_after=0)
    page.fill("#question", "Hello?")
    page.press("#question", "Enter")
    expect(page.locator(".waiting")).to_contain_text("Waiting for the first token")
    gateway.release()
    page.wait_for_selector(DONE)
    expect(page.locator(".waiting")).to_be_hidden()


def test_turns_follow_each_other_in_one_session(page: Page, gateway: FakeGateway) -> None:
    ask(page, "One?")
    ask(page, "Two?")
    assert gateway.bodies[1]["messages"] == [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Hello there."},
        {"role": "user", "content": "Two?"},
    ]
    page.click("#new")
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#welcome")).to_be_visible()
    ask(page, "Three?")
    assert gateway.bodies[2]["messages"] == [{"role": "user", "content": "Three?"}]
    first, second, third = (headers["x-session-id"] for headers in gateway.headers)
    assert first == second != third
    assert len(first) == 32


@pytest.mark.parametrize("how", ["button", "key"])
def test_stop_keeps_what_arrived(page: Page, gateway: FakeGateway, how: str) -> None:
    gateway.reply = Reply(pieces=["Some", " more"], hold_after=1)
    start(page, "Long?")
    if how == "button":
        page.click("#stop")
    else:
        page.press("body", "Escape")
    page.wait_for_selector(DONE)
    expect(page.locator("#status")).to_have_text("Stopped.")
    expect(page.locator(ANSWER)).to_have_text("Some")
    expect(page.locator(".turn .ended")).to_have_text("Stopped.")
    expect(page.locator(".turn .problem")).to_be_hidden()
    assert gateway.cancelled.wait(10), "the gateway was not told"
    gateway.reply = Reply()
    ask(page, "Go on")
    assert gateway.bodies[1]["messages"][1] == {"role": "assistant", "content": "Some"}


def test_stop_before_the_first_token(page: Page, gateway: FakeGateway) -> None:
    gateway.reply = Reply(hold_after=0)
    page.fill("#question", "Slow?")
    page.press("#question", "Enter")
    page.click("#stop")
    page.wait_for_selector(DONE)
    expect(page.locator(".copy")).to_be_hidden()
    expect(page.locator(".retry")).to_be_visible()


def test_new_chat_ends_a_running_answer(page: Page, gateway: FakeGateway) -> None:
    gateway.reply = Reply(hold_after=1)
    start(page, "Long?")
    page.click("#new")
    assert gateway.cancelled.wait(10)
    gateway.reply = Reply(pieces=["Fresh"])
    ask(page, "New?")
    expect(page.locator(".turn")).to_have_count(1)
    expect(page.locator(ANSWER)).to_have_text("Fresh")


def test_copy_takes_the_text_as_it_came(visit: Callable[..., Page], gateway: FakeGateway) -> None:
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    gateway.reply = Reply(pieces=["A\n\n```\nb\n```\n"])
    ask(page, "Copy?")
    page.click(".copy")
    expect(page.locator("#status")).to_have_text("Copied.")
    assert page.evaluate("navigator.clipboard.readText()") == "A\n\n```\nb\n```\n"


def test_copy_without_https(page: Page, gateway: FakeGateway) -> None:
    """A browser has no navigator.clipboard on plain http of another machine."""
    ask(page, "Copy?")
    page.evaluate("""() => {
        Object.defineProperty(navigator, "clipboard", { value: undefined });
        document.addEventListener("copy", () => { document.title = document.activeElement.value; });
    }""")
    page.click(".copy")
    expect(page).to_have_title("Hello there.")


def test_keyboard(page: Page, gateway: FakeGateway) -> None:
    question = page.locator("#question")
    expect(question).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    expect(question).to_have_value("one\ntwo")
    assert gateway.bodies == []
    page.keyboard.press("Enter")
    page.wait_for_selector(DONE)
    expect(question).to_have_value("")
    expect(question).to_be_focused()
    assert gateway.bodies[0]["messages"][0]["content"] == "one\ntwo"


def test_enter_sends_nothing_while_a_word_is_composed_or_nothing_is_there(page: Page, gateway: FakeGateway) -> None:
    page.press("#question", "Enter")
    page.fill("#question", "  \n ")
    page.press("#question", "Enter")
    expect(page.locator("#send")).to_be_disabled()
    page.fill("#question", "kimi")
    page.evaluate("""question.dispatchEvent(
        new KeyboardEvent("keydown", { key: "Enter", isComposing: true, bubbles: true, cancelable: true }))""")
    expect(page.locator(".turn")).to_have_count(0)
    assert gateway.bodies == []


def test_everything_is_reached_by_tab_and_shows_its_focus(page: Page, gateway: FakeGateway) -> None:
    ask(page, "One?")
    page.fill("#question", "Two?")
    page.locator("h1").evaluate("(title) => { title.tabIndex = -1; title.focus(); }")
    seen = []
    for _ in range(20):
        page.keyboard.press("Tab")
        name, ring = page.evaluate("""() => {
            const one = document.activeElement;
            const rings = [one, one.closest("label"), one.closest(".composer")].filter(Boolean).map(getComputedStyle);
            const ring = rings.some(s => (s.outlineStyle !== "none" && s.outlineWidth !== "0px")
                || s.boxShadow !== "none");
            return [one.id || one.className || one.tagName, ring];
        }""")
        if name == "BODY":
            break
        assert ring, f"{name} does not show its focus"
        seen.append(name)
    wanted = [
        "quiet",
        "new",
        "SUMMARY",
        "reading",
        "quiet copy",
        "quiet edit",
        "quiet retry",
        "question",
        "files",
        "send",
    ]
    assert [name for name in seen if name in wanted] == wanted


def test_text_is_never_html(page: Page, gateway: FakeGateway) -> None:
    evil = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script><b>bold</b>'
    gateway.reply = Reply(pieces=[evil, "\n```\n", evil, "\n```\n"])
    attach(page, f"{evil[:40]}.txt", b"text")
    expect(page.locator("#attached .chip .name")).to_have_text(f"{evil[:40]}.txt")
    ask(page, evil)
    expect(page.locator(".question .text")).to_have_text(evil)
    expect(page.locator(f"{ANSWER} p")).to_have_text(evil)
    expect(page.locator(f"{ANSWER} pre")).to_have_text(evil)
    for reply in (Reply(status=400, error=evil), Reply(end=evil), Reply(status=500, headers={"X-Request-Id": evil})):
        gateway.reply = reply
        page.click(".retry")
        page.wait_for_selector(DONE)
        expect(page.locator(".turn .problem")).to_be_visible()
        expect(page.locator(".turn .problem")).not_to_contain_text("hacked")
    gateway.models = [evil]
    page.reload()
    expect(page.locator("#model option")).to_have_text(evil)
    assert page.locator("img, b, body script").count() == 0
    assert page.evaluate("window.hacked") is None


def test_reader_is_followed_but_never_fought(page: Page, gateway: FakeGateway) -> None:
    gateway.reply = Reply(pieces=["line\n\n"] * 120, hold_after=60)
    start(page, "Long?")
    expect(page.locator(f"{ANSWER} p")).to_have_count(60)
    rest = "reading.scrollHeight - reading.clientHeight - reading.scrollTop"
    until(page, f"{rest} < 2")
    page.locator("#reading").hover()
    page.mouse.wheel(0, -300)
    until(page, f"{rest} > 200")
    expect(page.locator("#latest")).to_be_visible()
    top = page.evaluate("reading.scrollTop")
    gateway.release()
    page.wait_for_selector(DONE)
    expect(page.locator(f"{ANSWER} p")).to_have_count(120)
    assert page.evaluate("reading.scrollTop") == top
    page.click("#latest")
    until(page, f"{rest} < 2")
    expect(page.locator("#latest")).to_be_hidden()


def test_nothing_shifts_while_an_answer_streams(page: Page, gateway: FakeGateway) -> None:
    gateway.reply = Reply(pieces=[f"word{index} " for index in range(150)], pause=0.01)
    page.fill("#question", "Long?")
    page.press("#question", "Enter")
    # The browser does not count what moves within half a second of a key: begin after that.
    page.wait_for_timeout(700)
    page.evaluate("""() => {
        window.shifts = [];
        new PerformanceObserver((list) => window.shifts.push(...list.getEntries().map((entry) => entry.value)))
            .observe({ type: "layout-shift" });
    }""")
    expect(page.locator(".turn")).to_have_class("turn running")
    page.wait_for_selector(DONE)
    page.wait_for_timeout(100)
    assert page.evaluate("window.shifts") == []
