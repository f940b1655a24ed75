"""A prompt that does not fit, or may not: it is not sent, or the server's refusal says its length and the limit."""

from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from tests.e2e.playground.asking import ask, attach, forecast, module
from tests.e2e.playground.fake_gateway import FakeGateway, Reply, too_long
from tests.e2e.playground.pdf_file import pdf

pytestmark = pytest.mark.browser

BOOK = pdf(*["page " * 40] * 300)


@pytest.fixture
def small(visit: Callable[..., Page], gateway: FakeGateway) -> Page:
    """The page of a model that reads 32,768 tokens, one for each character, and counts no further."""
    gateway.longest, gateway.each = 32_768, 1.0
    return visit()


def test_a_document_that_the_server_does_not_count_to_its_end(small: Page, gateway: FakeGateway) -> None:
    """The estimate, 8,000 tokens, would fit."""
    gateway.each = 2.0
    attach(small, "book.pdf", BOOK)
    expect(small.locator("#attached .size")).to_contain_text("about 61,000 tokens")
    why = (
        "he prompt has about 61,000 tokens, and at most 32,768 fit: remove the document, "
        "or keep the first 153 of 300 pages."
    )
    forecast(small, f"T{why}")
    small.press("#question", "Enter")
    expect(small.locator("#notice")).to_have_text(f"Not sent, as t{why}")
    assert gateway.bodies == []
    attach(small, "notes.txt", b"note " * 2_000)
    forecast(small, r"The prompt has about 81,000 tokens, .* remove a document, or keep .* of 300 pages of book.pdf\.")


def test_a_sample_is_smaller_where_characters_have_many_tokens(small: Page, gateway: FakeGateway) -> None:
    gateway.each = 3.0
    attach(small, "long.txt", b"x" * 100_000)
    forecast(small, "The prompt has about 300,000 tokens, and at most 32,768 fit: .*")
    assert [len(text) for text in gateway.counted] == [100_000, 16_384, 4_096]


def test_a_document_without_a_sample(small: Page, gateway: FakeGateway) -> None:
    gateway.each = 1_000.0
    attach(small, "long.txt", b"x" * 9_000)
    forecast(
        small, "The prompt has at least 32,769 tokens, and at most 32,768 fit: remove the document, .* part of it."
    )


@pytest.mark.parametrize("status", [401, 404, 429, 500])
def test_a_count_that_fails_says_nothing_of_what_fits(small: Page, status: int) -> None:
    small.route("**/count_tokens", lambda route: route.fulfill(status=status, json={"error": {"message": "no"}}))
    attach(small, "long.txt", b"word " * 10_000)
    forecast(small, "About 13,000 tokens of 32,768 by an estimate; whether it fits is not known.")
    attach(small, "other.txt", b"words " * 20_000)
    forecast(small, "About 43,000 tokens by an estimate, and at most 32,768 fit: the server may refuse it.")
    ask(small, "What?")  # an estimate forbids nothing


def test_many_short_documents_are_no_certainty(small: Page, gateway: FakeGateway) -> None:
    for number in range(6):
        attach(small, f"{number}.txt", f"{number} words ".encode() * 700)
    forecast(small, "About 8,400 tokens of 32,768 by an estimate; whether it fits is not known.")
    assert gateway.counted == []


def test_a_refusal_says_how_long_the_prompt_is(small: Page, gateway: FakeGateway) -> None:
    small.route("**/count_tokens", lambda route: route.abort())
    gateway.reply = Reply(status=400, error=too_long(32_768))
    attach(small, "long.txt", b"word " * 10_000)
    ask(small, "What?")
    problem = small.locator(".turn:last-child .problem")
    remedy = "remove the document, or keep a part of it."
    expect(problem).to_have_text(f"The prompt has at least 32,769 tokens, and at most 32,768 fit: {remedy}")
    gateway.reply = Reply(
        status=400,
        error="The decoder prompt (length 50100) is longer than the maximum model length "
        "of 32768. Make sure that `max_model_len` is no smaller than the number of text tokens.",
    )
    small.click(".retry")
    keep = "remove the document, or keep the first 31,000 of about 50,000 tokens."
    expect(problem).to_have_text(f"The prompt has 50,100 tokens, and at most 32,768 fit: {keep}")


def test_retry_refuses_what_does_not_fit(small: Page, gateway: FakeGateway) -> None:
    attach(small, "long.txt", b"word " * 5_000)
    ask(small, "What?")
    module(
        small,
        "store/database.js",
        "(async (d) => { const [c] = await d.all('conversations');"
        "c.turns[0].documents[0].tokens = 40000; await d.put('conversations', c); })(await m.openDatabase())",
    )
    small.reload()
    expect(small.locator("#model option")).to_have_count(1)
    small.click(".retry")
    expect(small.locator("#notice")).to_contain_text(
        "Not sent, as the prompt has about 40,000 tokens, and at most 32,768"
    )
    expect(small.locator(".turn .answer > .text")).to_have_text("Hello there.")
    assert len(gateway.bodies) == 1


def test_the_words_are_those_of_vllm() -> None:
    params = pytest.importorskip("vllm.renderers.params").TokenizeParams(max_total_tokens=32_768, max_output_tokens=0)
    with pytest.raises(Exception, match="tokens") as found:
        params._token_len_check(None, [0] * 32_769)
    assert str(found.value) == too_long(32_768)
