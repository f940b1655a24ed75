"""Asking again, from any turn, and what stays of what was there; the bytes that a prompt begins with."""

import itertools
import json

import pytest
from playwright.sync_api import Page, expect

from tests.e2e.playground.asking import ANSWER, DONE, ask, attach, kept, start
from tests.e2e.playground.fake_gateway import FakeGateway, Reply

pytestmark = pytest.mark.browser


def questions(page: Page) -> list[list[str]]:
    """Of each conversation that is kept, newest first."""
    return [[turn["question"] for turn in one["turns"]] for one in kept(page)]


def three(page: Page) -> None:
    for question in ("One?", "Two?", "Three?"):
        ask(page, question)


def test_retry_asks_the_same_again(page: Page, gateway: FakeGateway) -> None:
    ask(page, "One?")
    ask(page, "Two?")
    gateway.reply = Reply(pieces=["Another."])
    page.click(".turn:last-child .retry")
    page.wait_for_selector(DONE)
    expect(page.locator(ANSWER)).to_have_text("Another.")
    expect(page.locator(".turn")).to_have_count(2)
    assert gateway.bodies[2]["messages"] == gateway.bodies[1]["messages"]
    assert questions(page) == [["One?", "Two?"]]


def test_retry_in_the_middle_leaves_the_old_conversation_in_the_list(page: Page, gateway: FakeGateway) -> None:
    three(page)
    gateway.reply = Reply(pieces=["Another."])
    page.locator(".turn .retry").nth(1).click()
    expect(page.locator(ANSWER)).to_have_text("Another.")
    expect(page.locator(".turn")).to_have_count(2)
    page.wait_for_selector(DONE)
    assert gateway.bodies[3]["messages"] == gateway.bodies[1]["messages"]
    assert gateway.headers[3]["x-session-id"] == gateway.headers[1]["x-session-id"]  # the replica with the prefix
    assert questions(page) == [["One?", "Two?"], ["One?", "Two?", "Three?"]]
    assert [one["title"] for one in kept(page)] == ["One? (edited)", "One?"]
    ask(page, "Four?")
    page.click("text=Chats")
    page.locator("#chats .open").nth(1).click()
    expect(page.locator(".question .text")).to_have_text(["One?", "Two?", "Three?"])
    expect(page.locator(f"{ANSWER}")).to_have_text("Hello there.")


def test_edit_replaces_the_last_turn_once_it_is_sent(page: Page, gateway: FakeGateway) -> None:
    attach(page, "a.txt", b"content of a")
    expect(page.locator("#attached .chip")).to_have_count(1)
    ask(page, "One?")
    page.click(".edit")
    expect(page.locator(".turn.replaced")).to_have_count(1)
    expect(page.locator("#attached .chip")).to_have_count(1)
    expect(page.locator("#question")).to_have_value("One?")
    expect(page.locator("#question")).to_be_focused()
    ask(page, "Other?")
    expect(page.locator(".turn")).to_have_count(1)
    (message,) = gateway.bodies[1]["messages"]
    assert "content of a" in message["content"] and message["content"].endswith("Other?")
    assert questions(page) == [["Other?"]]


@pytest.mark.parametrize("how", ["Escape", "button"])
def test_edit_left_changes_nothing(page: Page, gateway: FakeGateway, how: str) -> None:
    three(page)
    page.locator(".edit").nth(1).click()
    expect(page.locator(".turn.replaced")).to_have_count(2)
    expect(page.locator("#edited")).to_be_visible()
    if how == "button":
        page.click("#cancel-edit")
    else:
        page.keyboard.press("Escape")
    expect(page.locator(".turn.replaced")).to_have_count(0)
    expect(page.locator("#question")).to_have_value("")
    expect(page.locator("#edited")).to_be_hidden()
    ask(page, "Four?")
    assert questions(page) == [["One?", "Two?", "Three?", "Four?"]]


def test_edit_in_the_middle(page: Page, gateway: FakeGateway) -> None:
    three(page)
    page.locator(".edit").nth(0).click()
    page.fill("#question", "Zero?")
    page.press("#question", "Enter")
    expect(page.locator(".question .text")).to_have_text(["Zero?"])
    page.wait_for_selector(DONE)
    assert gateway.bodies[3]["messages"] == [{"role": "user", "content": "Zero?"}]
    assert questions(page) == [["Zero?"], ["One?", "Two?", "Three?"]]


def test_a_turn_asked_again_while_another_is_answered_stops_it(page: Page, gateway: FakeGateway) -> None:
    ask(page, "One?")
    gateway.reply = Reply(pieces=["Half", " more"], hold_after=1)
    start(page, "Two?")
    expect(page.locator(ANSWER)).to_have_text("Half")
    gateway.reply = Reply(pieces=["Again."])
    page.locator(".retry").first.click()
    expect(page.locator(ANSWER)).to_have_text("Again.")
    assert gateway.cancelled.wait(10)
    page.wait_for_selector(DONE)
    page.wait_for_timeout(100)
    (new, old) = kept(page)
    assert [turn["answer"] for turn in new["turns"]] == ["Again."]
    assert [(turn["answer"], turn["state"]) for turn in old["turns"]] == [
        ("Hello there.", "complete"),
        ("Half", "stopped"),
    ]


def test_the_prompt_of_a_turn_begins_with_the_bytes_of_the_turn_before(page: Page, gateway: FakeGateway) -> None:
    """What a prefix cache goes by: also across a stop, a reload and an answer with odd signs."""
    page.click("text=Settings")
    page.fill("#system", "Be brief.")
    page.keyboard.press("Escape")
    attach(page, "a.txt", "läuft \u2028 \r\n".encode())
    gateway.reply = Reply(pieces=["A  trailing blank \n\n", "\\(x\\) \u00a0é "])
    ask(page, "One?")
    gateway.reply = Reply(pieces=["Half", " more"], hold_after=1)
    start(page, "Two?")
    expect(page.locator(ANSWER)).to_have_text("Half")
    page.click("#stop")
    page.wait_for_selector(DONE)
    gateway.reply = Reply()
    ask(page, "Three?")
    page.reload()
    expect(page.locator(ANSWER)).to_have_text("Hello there.")
    expect(page.locator("#model option")).to_have_count(1)
    ask(page, "Four?")
    prompts = [json.dumps(body["messages"], ensure_ascii=False)[:-1] for body in gateway.bodies]
    assert len(prompts) == 4
    for before, after in itertools.pairwise(prompts):
        assert after.startswith(before)
    assert [message["role"] for message in gateway.bodies[0]["messages"]] == ["system", "user"]


def test_a_document_is_in_the_prompt_once(page: Page, gateway: FakeGateway) -> None:
    attach(page, "a.txt", b"the text")
    ask(page, "One?")
    attach(page, "copy.txt", b"the text")
    expect(page.locator("#notice")).to_have_text("copy.txt is already in this chat: just ask about it.")
    ask(page, "Two?")
    assert json.dumps(gateway.bodies[1]).count("the text") == 1
    page.click("#new")
    attach(page, "copy.txt", b"the text")
    expect(page.locator("#attached .chip")).to_have_count(1)


def test_a_document_that_was_deleted_is_not_made_up(page: Page, gateway: FakeGateway) -> None:
    attach(page, "a.txt", b"the text")
    ask(page, "One?")
    page.evaluate("""async () => {
        const { openDatabase } = await import("/playground/store/database.js");
        const database = await openDatabase();
        for (const { sha256 } of await database.all("documents")) await database.delete("documents", sha256);
    }""")
    page.reload()
    expect(page.locator("#model option")).to_have_count(1)
    ask(page, "Two?")
    expect(page.locator(".turn:last-child .problem")).to_have_text(
        "A document of this chat was deleted: attach it again in a new chat."
    )
    assert len(gateway.bodies) == 1
