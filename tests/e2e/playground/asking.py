"""How the browser tests ask, and where the answer stands."""

import re
from typing import Any

import pytest
from playwright.sync_api import Page, expect

ANSWER = "#conversation .turn:last-child .answer > .text"
DONE = "#conversation .turn:last-child:not(.running)"


def ask(page: Page, question: str) -> None:
    """Send a question and wait until its answer has ended."""
    page.fill("#question", question)
    page.press("#question", "Enter")
    page.wait_for_selector(DONE)


def start(page: Page, question: str) -> None:
    """Send a question and wait for the beginning of its answer."""
    page.fill("#question", question)
    page.press("#question", "Enter")
    page.wait_for_selector(f"{ANSWER} p")


def attach(page: Page, name: str, content: bytes) -> None:
    """Choose a file of this content, and wait until it is read or refused."""
    choose(page, name, content)
    page.wait_for_selector("#composer[aria-busy=false]")


def choose(page: Page, name: str, content: bytes) -> None:
    """Choose a file of this content."""
    page.set_input_files("#files", {"name": name, "mimeType": "text/plain", "buffer": content})


def forecast(page: Page, pattern: str) -> None:
    """Wait for this line under the message, a regular expression."""
    expect(page.locator("#forecast")).to_have_text(re.compile(f"^{pattern}$"))


def until(page: Page, condition: str) -> None:
    """Wait for a condition in JavaScript; Playwright's own way of it needs the eval that the page forbids."""
    for _ in range(500):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(20)
    pytest.fail(f"never came: {condition}")


def module(page: Page, path: str, expression: str, argument: Any = None) -> Any:
    """The value of an expression over a module of the page, `m`, and an argument, `a`."""
    return page.evaluate(
        f"async (a) => {{ const m = await import('/playground/{path}'); return {expression}; }}", argument
    )


def kept(page: Page) -> list[dict[str, Any]]:
    """The conversations that the browser keeps, newest first."""
    return module(
        page,
        "store/database.js",
        "(await (await m.openDatabase()).all('conversations')).sort((one, other) => other.changed - one.changed)",
    )
