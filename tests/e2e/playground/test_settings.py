"""System prompt, temperature, top-p and longest answer of a conversation."""

import pytest
from playwright.sync_api import Page, expect

from tests.e2e.playground.asking import DONE, ask
from tests.e2e.playground.fake_gateway import FakeGateway, Reply

pytestmark = pytest.mark.browser
FIELDS = ("temperature", "top_p", "max_tokens")


def test_what_is_not_set_is_left_to_the_server(page: Page, gateway: FakeGateway) -> None:
    ask(page, "One?")
    assert not {*FIELDS, "system"} & set(gateway.bodies[0])
    assert gateway.bodies[0]["messages"][0]["role"] == "user"


def test_settings_are_sent_and_kept_and_go_on_in_a_new_chat(page: Page, gateway: FakeGateway) -> None:
    page.click("text=Settings")
    page.fill("#system", "Be brief.")
    for field, value in zip(FIELDS, ("0.2", "0.9", "300"), strict=True):
        page.fill(f"[name={field}]", value)
    page.press("[name=max_tokens]", "Enter")
    expect(page.locator("#settings")).to_be_hidden()
    ask(page, "One?")
    page.reload()
    expect(page.locator("#model option")).to_have_count(1)
    ask(page, "Two?")
    page.click("#new")
    ask(page, "Three?")
    for body in gateway.bodies:
        assert [body[field] for field in FIELDS] == [0.2, 0.9, 300]
        assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    page.click("text=Settings")
    expect(page.locator("#system")).to_have_value("Be brief.")
    page.click("text=Reset")
    expect(page.locator("#system")).to_have_value("")
    page.keyboard.press("Escape")
    ask(page, "Four?")
    assert not set(FIELDS) & set(gateway.bodies[3])


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("temperature", "3", "Temperature must be a number from 0 to 2, or empty."),
        ("top_p", "0", "Top-p must be a number above 0 and at most 1, or empty."),
        ("max_tokens", "1.5", "Longest answer must be a whole number from 1 to 10000000, or empty."),
        ("max_tokens", "0", "Longest answer must be a whole number from 1 to 10000000, or empty."),
    ],
)
def test_what_the_server_would_refuse_is_said_at_once(
    page: Page, gateway: FakeGateway, field: str, value: str, sentence: str
) -> None:
    page.click("text=Settings")
    page.fill(f"[name={field}]", value)
    expect(page.locator("#settings .problem")).to_have_text(sentence)
    expect(page.locator(f"[name={field}]")).to_have_attribute("aria-invalid", "true")
    page.keyboard.press("Escape")
    ask(page, "One?")
    assert field not in gateway.bodies[0]


def test_an_answer_that_reached_the_length_that_was_set(page: Page, gateway: FakeGateway) -> None:
    page.click("text=Settings")
    page.fill("[name=max_tokens]", "5")
    page.keyboard.press("Escape")
    gateway.reply = Reply(end="length")
    ask(page, "One?")
    page.wait_for_selector(DONE)
    expect(page.locator(".turn .problem")).to_have_text(
        "The answer has reached the longest that you allow: raise “Longest answer” in the settings."
    )
