"""What kinds of files a browser makes documents of: PDF by pages, text in UTF-8, UTF-16 and Latin-1."""

import hashlib
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.e2e.playground.asking import ask, attach, module
from tests.e2e.playground.fake_gateway import FakeGateway
from tests.e2e.playground.pdf_file import pdf

pytestmark = pytest.mark.browser


def sent(gateway: FakeGateway) -> str:
    return gateway.bodies[-1]["messages"][-1]["content"]


def test_pdf_page_by_page(page: Page, gateway: FakeGateway) -> None:
    workers: list[str] = []
    page.on("worker", lambda worker: workers.append(worker.url))
    attach(page, "paper.pdf", pdf("First page, läuft", "", "Third page"))
    expect(page.locator("#attached .chip .name")).to_have_text("paper.pdf")
    assert any("pdf.worker" in url for url in workers), "the page's own thread read it"
    ask(page, "What?")
    assert sent(gateway) == (
        '<document name="paper.pdf">\n[Page 1]\nFirst page, läuft\n\n[Page 2]\n\n\n[Page 3]\nThird page\n\n'
        "</document>\n\nWhat?"
    )


def test_pdf_says_how_far_it_is(page: Page) -> None:
    page.evaluate("""() => {
        window.seen = new Set();
        new MutationObserver(() => window.seen.add(notice.textContent)).observe(notice, { childList: true });
    }""")
    attach(page, "long.pdf", pdf(*[f"Page {number}" for number in range(40)]))
    expect(page.locator("#attached .chip")).to_have_count(1)
    assert "Reading page 40 of 40 of long.pdf." in page.evaluate("[...window.seen]")
    expect(page.locator("#notice")).to_be_hidden()


def test_pdf_without_text(page: Page) -> None:
    attach(page, "scan.pdf", pdf("", ""))
    expect(page.locator("#notice")).to_have_text(
        "scan.pdf contains only images: run text recognition (OCR) on it first."
    )


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "latin-1", "cp1252"])
def test_text_is_decoded_as_it_was_meant(page: Page, gateway: FakeGateway, encoding: str) -> None:
    text = "Größe: 5 µm, naïve café\x1b[0m\n"
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
    attach(page, "log.txt", mark + text.encode(encoding))
    chip = page.locator("#attached .chip")
    expect(chip).to_have_count(1)
    assert ("read as Latin-1" in chip.inner_text()) == (encoding in ("latin-1", "cp1252"))
    ask(page, "What?")
    assert text in sent(gateway)


@pytest.mark.parametrize("length", [0, 1, 55, 56, 63, 64, 65, 119, 120, 100_000])
def test_hash_without_https(page: Page, length: int) -> None:
    content = bytes(at * 7 % 251 for at in range(length))
    found = module(page, "lib/sha256.js", "m.sha256(new Uint8Array(a))", list(content))
    assert found == hashlib.sha256(content).hexdigest()


def test_documents_are_kept_under_the_hash_of_their_text(page: Page, gateway: FakeGateway) -> None:
    attach(page, "a.txt", b"\xef\xbb\xbftext")
    ask(page, "What?")
    found: list[dict[str, Any]] = module(page, "store/database.js", "(await m.openDatabase()).all('documents')")
    assert [(one["sha256"], one["text"]) for one in found] == [(hashlib.sha256(b"text").hexdigest(), "text")]
