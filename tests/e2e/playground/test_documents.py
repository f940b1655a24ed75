"""Long documents in a browser: dropped, pasted or chosen, sent before the question, never in the page's way."""

import re

import pytest
from playwright.sync_api import Page, expect

from tests.e2e.playground.asking import ANSWER, ask, attach, choose
from tests.e2e.playground.fake_gateway import FakeGateway

pytestmark = pytest.mark.browser

LINE = 'INFO "step" 17 läuft\n'
LINES = 5 * 2**20 // len(LINE.encode())

DROP = """([name, line, lines]) => {
    const carried = new DataTransfer();
    carried.items.add(new File([line.repeat(lines)], name, { type: "text/plain" }));
    const event = (kind) => new DragEvent(kind, { dataTransfer: carried, bubbles: true, cancelable: true });
    document.body.dispatchEvent(event("dragenter"));
    const shown = !document.getElementById("drop").hidden;
    const over = event("dragover");
    document.body.dispatchEvent(over);
    document.body.dispatchEvent(event("drop"));
    return shown && over.defaultPrevented && document.getElementById("drop").hidden;
}"""
PASTE = """(text) => {
    const carried = new DataTransfer();
    carried.setData("text/plain", text);
    const paste = new ClipboardEvent("paste", { clipboardData: carried, bubbles: true, cancelable: true });
    question.dispatchEvent(paste);
    return paste.defaultPrevented;
}"""


def test_five_megabytes_dropped(page: Page, gateway: FakeGateway) -> None:
    assert page.evaluate(DROP, ["run.log", LINE, LINES])
    chip = page.locator("#attached .chip")
    expect(chip.locator(".name")).to_have_text("run.log")
    expect(chip.locator(".size")).to_contain_text("5.0 MiB")
    expect(page.locator("#question")).to_be_focused()
    ask(page, "What happened?")
    expect(page.locator(ANSWER)).to_have_text("Hello there.")
    expect(page.locator(".turn .chip .name")).to_have_text("run.log")
    expect(page.locator("#attached .chip")).to_have_count(0)
    # It is sent whole and before the question, again with each turn; the page itself never holds it.
    ask(page, "And then?")
    for body in gateway.bodies:
        content = body["messages"][0]["content"]
        document, question = content.rsplit("\n\n", 1)
        assert document == f'<document name="run.log">\n{LINE * LINES}\n</document>'
        assert question == "What happened?"
    assert page.evaluate("document.documentElement.outerHTML.length") < 20_000


def test_long_text_pasted_becomes_a_document(page: Page, gateway: FakeGateway) -> None:
    assert page.evaluate(PASTE, "word " * 10_000)
    expect(page.locator("#attached .chip")).to_have_text(re.compile(r"^pasted-1.txt 48.8 KiB, 70,000 tokens\s+Remove"))
    expect(page.locator("#question")).to_have_value("")
    ask(page, "")
    assert gateway.bodies[0]["messages"][0]["content"].startswith('<document name="pasted-1.txt">\nword word')


def test_short_text_is_pasted_as_ever(page: Page) -> None:
    assert not page.evaluate(PASTE, "a few words")
    expect(page.locator("#attached")).to_be_hidden()


def test_chosen_and_removed(page: Page, gateway: FakeGateway) -> None:
    attach(page, "one.txt", b"first")
    attach(page, "two.md", b"second")
    expect(page.locator("#attached .chip")).to_have_count(2)
    page.get_by_role("button", name="Remove one.txt").click()
    expect(page.locator("#attached .chip")).to_have_count(1)
    attach(page, "three.md", "\ufeffthird".encode())
    ask(page, "Which?")
    content = gateway.bodies[0]["messages"][0]["content"]
    assert content == (
        '<document name="two.md">\nsecond\n</document>\n\n<document name="three.md">\nthird\n</document>\n\nWhich?'
    )


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"\x7fELF\x00\x00\x01", "bad.txt is neither text nor a PDF: save it as a text file first."),
        (b"\x89PNG\r\n\x1a\n\xff\xd8", "bad.txt is neither text nor a PDF: save it as a text file first."),
        (b"\xff\xfeodd", "bad.txt is neither text nor a PDF: save it as a text file first."),
        (b"%PDF-1.7 nothing", "bad.txt is no PDF that can be read: save it again, or as text."),
        (b"", "bad.txt is empty: attach one with text."),
        (b" \n", "bad.txt is empty: attach one with text."),
    ],
)
def test_what_is_no_text_is_refused(page: Page, content: bytes, sentence: str) -> None:
    page.fill("#question", "kept")
    attach(page, "bad.txt", content)
    expect(page.locator("#notice")).to_have_text(sentence)
    expect(page.locator("#attached .chip")).to_have_count(0)
    expect(page.locator("#question")).to_have_value("kept")
    attach(page, "good.txt", b"text")
    expect(page.locator("#attached .chip")).to_have_count(1)
    expect(page.locator("#notice")).to_be_hidden()


def test_too_large_a_file_is_refused_unread(page: Page) -> None:
    page.evaluate(DROP, ["huge.log", "x" * 1024, 65 * 1024])
    expect(page.locator("#notice")).to_have_text("huge.log has 65.0 MiB; the limit is 64.0 MiB: split the file.")
    expect(page.locator("#attached .chip")).to_have_count(0)


def test_a_message_waits_for_its_document(page: Page, gateway: FakeGateway) -> None:
    page.fill("#question", "What?")
    page.evaluate("""() => {
        const read = File.prototype.arrayBuffer;
        File.prototype.arrayBuffer = function () {
            return new Promise((done) => { window.goOn = done; }).then(() => read.call(this));
        };
    }""")
    choose(page, "slow.txt", b"content")
    expect(page.locator("#send")).to_be_disabled()
    page.press("#question", "Enter")
    expect(page.locator(".turn")).to_have_count(0)
    page.evaluate("window.goOn()")
    expect(page.locator("#send")).to_be_enabled()
    ask(page, "What?")
    assert "content" in gateway.bodies[0]["messages"][0]["content"]
