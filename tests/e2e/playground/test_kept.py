"""What the browser keeps: conversations with their documents, also of an answer that was cut off by a reload."""

import json
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.e2e.playground.asking import ANSWER, ask, attach, kept, module, start
from tests.e2e.playground.fake_gateway import FakeGateway, Reply

pytestmark = pytest.mark.browser


def documents(page: Page) -> list[str]:
    found = module(page, "store/database.js", "(await m.openDatabase()).all('documents')")
    return sorted(one["text"] for one in found)


def open_list(page: Page) -> None:
    page.click("text=Chats")
    expect(page.locator("#chats")).to_be_visible()


def test_a_reload_shows_the_conversation_and_goes_on_with_it(page: Page, gateway: FakeGateway) -> None:
    attach(page, "a.txt", b"content")
    ask(page, "One?")
    page.reload()
    expect(page.locator(ANSWER)).to_have_text("Hello there.")
    expect(page.locator(".turn .chip .name")).to_have_text("a.txt")
    expect(page.locator(".figures")).to_contain_text("Answer\u00a0212")
    expect(page.locator('[data-show="used"]')).to_contain_text("131,284")
    expect(page.locator("#model option")).to_have_count(1)
    ask(page, "Two?")
    first, second = (body["messages"] for body in gateway.bodies)
    assert second[:1] == first
    assert gateway.headers[0]["x-session-id"] == gateway.headers[1]["x-session-id"]


def test_a_reload_in_the_middle_of_an_answer_keeps_what_was_written(page: Page, gateway: FakeGateway) -> None:
    gateway.reply = Reply(pieces=["Some", " words", " more"], hold_after=2)
    start(page, "Long?")
    expect(page.locator(ANSWER)).to_have_text("Some words")
    page.reload()
    expect(page.locator(ANSWER)).to_have_text("Some words")
    expect(page.locator(".turn .ended")).to_have_text(
        "Cut off: you left the page before this answer was complete. Retry asks again."
    )
    gateway.reply = Reply(pieces=["All of it."])
    expect(page.locator("#model option")).to_have_count(1)
    page.click(".retry")
    expect(page.locator(ANSWER)).to_have_text("All of it.")
    expect(page.locator(".turn .ended")).to_be_hidden()


def test_another_tab_begins_anew_and_finds_the_list(page: Page, gateway: FakeGateway) -> None:
    ask(page, "One?")
    page.click("#new")
    ask(page, "Two?")
    other = page.context.new_page()
    other.goto(gateway.url)
    expect(other.locator("#welcome")).to_be_visible()
    open_list(other)
    expect(other.locator("#chats .title")).to_have_text(["Two?", "One?"])
    other.locator("#chats .open").nth(1).click()
    expect(other.locator(".question .text")).to_have_text("One?")
    expect(other.locator("#chats")).to_be_hidden()
    expect(other).to_have_title("One? · Kimi Linear")


def test_renamed_and_deleted_by_keyboard(page: Page, gateway: FakeGateway) -> None:
    attach(page, "a.txt", b"of one")
    ask(page, "One?")
    page.click("#new")
    attach(page, "b.txt", b"of two")
    ask(page, "Two?")
    open_list(page)
    page.locator("#chats .rename").first.focus()
    page.keyboard.press("Enter")
    page.keyboard.type("Report <b>")
    page.keyboard.press("Enter")
    expect(page.locator("#chats .title")).to_have_text(["Report <b>", "One?"])
    page.locator("#chats .rename").nth(1).press("Enter")
    page.keyboard.type("Nothing")
    page.keyboard.press("Escape")
    expect(page.locator("#chats .title")).to_have_text(["Report <b>", "One?"])
    expect(page.locator("#chats")).to_be_visible()
    page.locator("#chats .delete").nth(1).press("Enter")
    expect(page.locator("#chats .title")).to_have_count(2)
    page.keyboard.press("Enter")
    expect(page.locator("#chats .title")).to_have_text(["Report <b>"])
    assert documents(page) == ["of two"]
    page.locator("#chats .delete").press("Enter")
    page.keyboard.press("Enter")
    expect(page.locator("#chats .none")).to_be_visible()
    expect(page.locator("#welcome")).to_be_visible()
    assert (kept(page), documents(page)) == ([], [])


def test_a_name_that_was_given_stays(page: Page, gateway: FakeGateway) -> None:
    ask(page, "One?")
    open_list(page)
    page.locator("#chats .rename").press("Enter")
    page.keyboard.type("Mine")
    page.keyboard.press("Enter")
    expect(page.locator("#chats .title")).to_have_text("Mine")
    page.keyboard.press("Escape")
    ask(page, "Two?")
    assert [one["title"] for one in kept(page)] == ["Mine"]


def test_deleted_while_it_is_answered(page: Page, gateway: FakeGateway) -> None:
    gateway.reply = Reply(hold_after=1)
    start(page, "Long?")
    open_list(page)
    page.locator("#chats .delete").click()
    page.locator("#chats .delete").click()
    expect(page.locator("#chats .none")).to_be_visible()
    assert gateway.cancelled.wait(10)
    page.wait_for_timeout(200)
    assert kept(page) == []


def test_a_document_of_two_conversations_is_kept_once(page: Page, gateway: FakeGateway) -> None:
    for question in ("One?", "Two?"):
        attach(page, f"{question[:3]}.txt", b"the same")
        expect(page.locator("#attached .chip")).to_have_count(1)
        ask(page, question)
        page.click("#new")
    assert documents(page) == ["the same"]
    open_list(page)
    page.locator("#chats .delete").first.click()
    page.locator("#chats .delete").first.click()
    expect(page.locator("#chats .title")).to_have_text(["One?"])
    assert documents(page) == ["the same"]


@pytest.mark.parametrize("kind", ["markdown", "json"])
def test_exported(page: Page, gateway: FakeGateway, kind: str, tmp_path: Path) -> None:
    attach(page, "a.txt", b"content")
    ask(page, "One, two?")
    gateway.reply = Reply(pieces=["Half", " more"], hold_after=1)
    start(page, "And?")
    page.click("#stop")
    expect(page.locator(".turn:last-child .ended")).to_have_text("Stopped.")
    open_list(page)
    with page.expect_download() as started:
        page.locator(f"#chats .{kind}").click()
    assert started.value.suggested_filename == ("One-two.md" if kind == "markdown" else "One-two.json")
    text = Path(started.value.path()).read_text()
    if kind == "json":
        found = json.loads(text)
        assert [turn["answer"] for turn in found["turns"]] == ["Hello there.", "Half"]
        assert [(one["name"], one["text"]) for one in found["documents"]] == [("a.txt", "content")]
        assert found["format"] == "kimi-linear-playground-1"
        return
    digest = "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"
    assert text == (
        "# One, two?\n\nModel: kimi-linear\n\n"
        f"## Question\n\n- Document: a.txt (7 bytes, SHA-256 {digest})\n\nOne, two?\n\n## Answer\n\nHello there.\n\n"
        "## Question\n\nAnd?\n\n## Answer\n\nHalf\n\n*Stopped.*\n"
    )


def test_a_browser_that_keeps_nothing(page: Page, gateway: FakeGateway) -> None:
    page.add_init_script("indexedDB.open = () => { throw new Error('no'); };")
    page.reload()
    ask(page, "One?")
    open_list(page)
    expect(page.locator("#kept")).to_be_visible()
    expect(page.locator("#chats .title")).to_have_text("One?")


def test_a_browser_without_room_says_so_and_goes_on(page: Page, gateway: FakeGateway) -> None:
    page.evaluate("""() => {
        IDBObjectStore.prototype.put = () => { throw new DOMException("full", "QuotaExceededError"); };
    }""")
    ask(page, "One?")
    expect(page.locator(ANSWER)).to_have_text("Hello there.")
    expect(page.locator("#notice")).to_have_text(
        "The browser has no room to keep this chat: delete others, or export it before you leave."
    )
