"""A fake gateway, and a real Chromium that looks at its playground.

pytest tests/e2e/playground --screenshots FOLDER    also writes what the pages looked like
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.e2e.playground.fake_gateway import FakeGateway, serving
from tests.run_all import chromium

DESK = {"width": 1280, "height": 860}
PHONE = {"width": 390, "height": 844}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("playground").addoption(
        "--screenshots", metavar="FOLDER", type=Path, help="write screenshots of the playground to FOLDER"
    )


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    with serving(FakeGateway()) as gateway:
        yield gateway


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    program = chromium()
    if not program:
        pytest.skip("no Chromium is on the path (Debian: apt install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser, gateway: FakeGateway) -> Iterator[Callable[..., Page]]:
    """`visit(**options)`: the playground in a browser context with these options.

    At the end no page may have raised, broken its content security policy, or asked another host for anything.
    """
    complaints: list[str] = []
    contexts = []

    def complain(of: str) -> None:
        # A refused request is logged as well, which is what the tests of errors are about.
        if of and not of.startswith("Failed to load resource"):
            complaints.append(of)

    def open_page(**options: Any) -> Page:
        context = browser.new_context(**{"viewport": DESK, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: complain(f"raised {error}"))
        page.on("console", lambda line: complain(line.text))
        page.on("request", lambda request: complain("" if request.url.startswith(gateway.url) else request.url))
        page.goto(gateway.url)
        page.locator("#model option, #notice:not([hidden])").first.wait_for(state="attached")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def page(visit: Callable[..., Page]) -> Page:
    return visit()
