"""What goes wrong, in a browser: one sentence each that says what to do, and nothing of the conversation is lost."""

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from tests.e2e.playground.asking import ANSWER, DONE, ask, attach
from tests.e2e.playground.fake_gateway import FakeGateway, Reply

pytestmark = pytest.mark.browser


def refused(status: int, error: str = "", after: str = "") -> Reply:
    return Reply(status=status, error=error, headers={"Retry-After": after} if after else {})


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        (
            refused(429, "60 requests a minute.", "12"),
            "Too many requests: retry in 12 s.",
        ),
        (refused(429), "Too many requests: retry in a while."),
        (refused(503, "draining", "3"), "The server has no capacity for this request now: retry in 3 s."),
        (
            refused(503, "", "Wed, 21 Oct 2026 07:28:00 GMT"),
            "The server has no capacity for this request now: retry in a while.",
        ),
        (refused(502, "no replica"), "The server failed with status 502: retry in a while."),
        (refused(413), "This is more than the gateway accepts in one request: attach a shorter document."),
        (
            refused(400, "This model's maximum context length is 8192 tokens. However, you requested 9000 tokens."),
            "The prompt has 9,000 tokens, and at most 8,192 fit: shorten the question.",
        ),
        (
            refused(400, "Input length (40000) exceeds model's maximum context length (32768)."),
            "The prompt has 40,000 tokens, and at most 32,768 fit: shorten the question.",
        ),
        (
            refused(
                400,
                "This model's maximum context length is 32768 tokens. However, your prompt contains 900000 characters "
                "(more than 32768 characters, which is the upper bound for 32768 input tokens).",
            ),
            "The prompt has more than the 32,768 tokens that fit: shorten the question.",
        ),
        (
            refused(
                400,
                "Key 'a' may use a context of 8192 tokens, and this request asks for about 9000 of prompt and an "
                "answer: shorten it.",
            ),
            "The prompt has 9,000 tokens, and at most 8,192 fit: shorten the question.",
        ),
        (
            refused(400, "max_tokens=50000 cannot be greater than max_model_len=32768. Please request fewer."),
            "The longest answer is more than the longest context (32,768 tokens): "
            "lower “Longest answer” in the settings.",
        ),
        (
            Reply(
                end="The decoder prompt (length 9000) is longer than the maximum model length of 8192.", end_code=400
            ),
            "The prompt has 9,000 tokens, and at most 8,192 fit: shorten the question.",
        ),
        (
            refused(400, "Traceback: KeyError 'x' in engine/core.py"),
            "The server did not accept this request (status 400): check the settings, or edit the question.",
        ),
        (
            Reply(status=500, error="NCCL error", headers={"X-Request-Id": "req-1f"}),
            "The server failed with status 500: retry in a while. "
            "If this continues, report the request id req-1f to the operator.",
        ),
        (
            refused(404, "The model `x` does not exist."),
            "The gateway does not serve this model any more: reload the page, and choose another.",
        ),
        (Reply(end="engine died"), "The server stopped this answer early: retry to ask again."),
        (Reply(end="drop", pause=0.05), "The connection broke off before the answer was complete: retry to ask again."),
        (Reply(end="silent"), "The stream ended before the answer was complete: retry to ask again."),
        (
            Reply(end="length"),
            "The answer has reached the longest it may be: start a new chat, or attach less.",
        ),
    ],
)
def test_one_sentence_and_a_way_on(page: Page, gateway: FakeGateway, reply: Reply, sentence: str) -> None:
    gateway.reply = reply
    ask(page, "Well?")
    problem = page.locator(".turn .problem")
    expect(problem).to_have_text(sentence)
    assert problem.get_attribute("role") == "alert"
    # What arrived before it stays.
    expect(page.locator(ANSWER)).to_have_text("" if reply.status != 200 else "Hello there.")
    gateway.reply = Reply(pieces=["Now it works."])
    page.click(".retry")
    page.wait_for_selector(DONE)
    expect(page.locator(ANSWER)).to_have_text("Now it works.")
    expect(problem).to_be_hidden()
    assert gateway.bodies[1]["messages"] == [{"role": "user", "content": "Well?"}]


def test_an_answer_of_something_that_is_no_gateway(page: Page) -> None:
    page.route("**/v1/models", lambda route: route.fulfill(body="<h1>Log in to the network</h1>"))
    page.reload()
    expect(page.locator("#notice")).to_have_text(
        "The answer is not the gateway's: check the address of this page, then retry."
    )


def test_a_context_that_is_refused_is_no_missing_configuration(
    visit: Callable[..., Page], gateway: FakeGateway
) -> None:
    gateway.context, gateway.context_status = None, 503
    page = visit()
    expect(page.locator("#notice")).to_have_text("The server has no capacity for this request now: retry in a while.")
    expect(page.locator("[data-show=no-memory]")).to_be_hidden()
    ask(page, "Well?")
    expect(page.locator(ANSWER)).to_have_text("Hello there.")


def test_an_example_that_does_not_load(page: Page) -> None:
    page.route("**/examples/*", lambda route: route.fulfill(status=502))
    page.locator("#example button").first.click()
    expect(page.locator("#notice")).to_have_text(
        "The example did not load: check that the gateway runs, then choose it again."
    )


def test_a_reader_of_files_that_does_not_load(page: Page) -> None:
    page.route("**/digest.worker.js", lambda route: route.fulfill(status=502))
    attach(page, "one.txt", b"first")
    expect(page.locator("#notice")).to_have_text(
        "The reader of files did not load: check that the gateway runs, then attach it again."
    )
    page.unroute("**/digest.worker.js")
    attach(page, "one.txt", b"first")
    expect(page.locator("#attached .chip")).to_have_count(1)


def test_a_browser_that_does_not_let_the_page_copy(page: Page) -> None:
    ask(page, "Well?")
    page.evaluate(
        "() => { navigator.clipboard.writeText = () => Promise.reject(new DOMException('', 'NotAllowedError')); }"
    )
    page.click(".copy")
    expect(page.locator("#notice")).to_have_text(
        "The browser did not let the page copy: select the text, and copy it yourself."
    )
    expect(page.locator("#status")).not_to_have_text("Copied.")


def test_an_error_body_that_is_no_json(page: Page) -> None:
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=504, body="<h1>nginx</h1>"))
    ask(page, "Well?")
    expect(page.locator(".turn .problem")).to_have_text("The server was silent for too long: retry in a while.")


def test_nobody_answers(page: Page) -> None:
    page.route("**/v1/chat/completions", lambda route: route.abort())
    ask(page, "Well?")
    expect(page.locator(".turn .problem")).to_have_text(
        "The gateway cannot be reached: check that it runs and that you are online, then retry."
    )


def test_a_key_is_asked_for_sent_and_kept_for_the_tab_only(visit: Callable[..., Page], gateway: FakeGateway) -> None:
    gateway.key = "kl-secret"
    page = visit()
    expect(page.locator("#notice")).to_have_text(
        "The gateway asks for a valid API key: enter one under “Settings”, “API key”, then retry."
    )
    expect(page.locator("#key")).to_be_focused()
    assert page.locator("#key").get_attribute("type") == "password"
    page.keyboard.type(" kl-secret ")
    page.keyboard.press("Enter")
    expect(page.locator("#access")).to_be_hidden()
    expect(page.locator("#notice")).to_be_hidden()
    expect(page.locator("#model option")).to_have_text("kimi-linear")
    ask(page, "Well?")
    expect(page.locator(ANSWER)).to_have_text("Hello there.")
    assert gateway.headers[0]["authorization"] == "Bearer kl-secret"
    assert page.evaluate("localStorage.length + document.cookie.length") == 0
    assert "kl-secret" not in page.url
    page.reload()
    expect(page.locator("#model option")).to_have_text("kimi-linear")
    other = visit()
    expect(other.locator("#notice")).to_be_visible()


def test_a_key_that_stops_to_fit(page: Page, gateway: FakeGateway) -> None:
    gateway.key = "new"
    ask(page, "Well?")
    expect(page.locator(".turn .problem")).to_contain_text("asks for a valid API key")
    expect(page.locator("#key")).to_be_focused()
    page.fill("#key", "new")
    page.press("#key", "Enter")
    page.click(".retry")
    page.wait_for_selector(DONE)
    expect(page.locator(ANSWER)).to_have_text("Hello there.")


def test_a_key_no_header_can_carry(page: Page, gateway: FakeGateway) -> None:
    page.click("text=Settings")
    page.click("#settings >> text=API key")
    page.fill("#key", "schlüssel")
    page.press("#key", "Enter")
    expect(page.locator("#notice")).to_have_text(
        "The API key has a space or another character that keys cannot have: enter it again."
    )


def test_escape_closes_the_key_before_it_stops_an_answer(page: Page, gateway: FakeGateway) -> None:
    gateway.reply = Reply(hold_after=1)
    page.fill("#question", "Long?")
    page.press("#question", "Enter")
    page.click("text=Settings")
    page.click("#settings >> text=API key")
    page.keyboard.press("Escape")
    expect(page.locator("#access")).to_be_hidden()
    expect(page.locator("#stop")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    expect(page.locator("#stop")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#send")).to_be_visible()


def test_a_gateway_that_is_not_ready_yet_keeps_the_message(visit: Callable[..., Page], gateway: FakeGateway) -> None:
    models, gateway.models = gateway.models, []
    page = visit()
    expect(page.locator("#notice")).to_have_text("The gateway serves no model yet: send again in a while.")
    page.fill("#question", "Well?")
    page.press("#question", "Enter")
    expect(page.locator("#notice")).to_be_visible()
    expect(page.locator("#question")).to_have_value("Well?")
    assert gateway.bodies == []
    gateway.models = models
    page.press("#question", "Enter")
    page.wait_for_selector(DONE)
    expect(page.locator("#notice")).to_be_hidden()
    expect(page.locator(ANSWER)).to_have_text(re.compile("Hello"))
