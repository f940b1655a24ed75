"""A first visit: an example of the kind that the model knows, and the model's name."""

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from kimi_server.playground import page as served
from tests.e2e.playground.asking import ANSWER, DONE, module
from tests.e2e.playground.fake_gateway import FakeGateway

pytestmark = pytest.mark.browser
Visit = Callable[..., Page]


def test_three_questions_about_a_text(page: Page, gateway: FakeGateway) -> None:
    expect(page.locator("#example li")).to_have_count(3)
    question = page.locator("#example button").first.inner_text()
    page.locator("#example button").first.click()
    expect(page.locator(ANSWER)).to_have_text("Hello there.")
    (message,) = gateway.bodies[0]["messages"]
    text = (served.FILES / "examples/gettysburg-address.txt").read_text()
    assert message["content"] == f'<document name="gettysburg-address.txt">\n{text}\n</document>\n\n{question}'
    expect(page.locator("#welcome")).to_be_hidden()


def test_the_document_can_be_read(page: Page) -> None:
    with page.context.expect_page() as opened:
        page.locator("#example a").click()
    expect(opened.value.locator("body")).to_contain_text("Four score and seven years ago")


def test_the_demo_model_gets_its_log_as_it_was_trained_on(visit: Visit, gateway: FakeGateway) -> None:
    gateway.models = [".demo/model"]
    page = visit()
    expect(page.locator("#model option")).to_have_text("Demo model")
    log = (served.FILES / "examples/log.txt").read_text()
    codes = dict(re.findall(r"^The code of (.+) is (\d{4})\.$", log, re.MULTILINE))
    questions = page.locator("#example button").all_inner_texts()
    assert len(questions) == 3
    names = re.findall(r"[A-Z][a-z]+ [A-Z][a-z]+", " ".join(questions))
    assert len(names) == 4 and len([name for name in names if name in codes]) == 3  # one is a stranger
    page.locator("#example button").nth(1).click()
    page.wait_for_selector(DONE)
    assert gateway.bodies[0]["model"] == ".demo/model"
    assert gateway.bodies[0]["messages"] == [{"role": "user", "content": log + questions[1]}]


def test_an_example_by_keyboard(page: Page, gateway: FakeGateway) -> None:
    page.locator("#example button").nth(2).focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(DONE)
    assert len(gateway.bodies) == 1


@pytest.mark.parametrize(
    ("identifier", "name"),
    [
        ("moonshotai/Kimi-Linear-48B-A3B-Instruct", "Kimi-Linear-48B-A3B-Instruct"),
        ("/models/Kimi-Linear-48B-A3B-Instruct/", "Kimi-Linear-48B-A3B-Instruct"),
        ("/home/a/.cache/hub/models--moonshotai--Kimi-Linear-48B/snapshots/0f3a", "Kimi-Linear-48B"),
        ("/srv/project/.demo/model", "Demo model"),
        ("/srv/examples/demo_model/checkpoint", "Demo model"),
        ("C:\\models\\kimi", "kimi"),
        ("kimi-linear", "kimi-linear"),
        ("<b>a</b>", "<b>a</b>"),
    ],
)
def test_a_models_name_is_no_path(page: Page, identifier: str, name: str) -> None:
    assert module(page, "lib/names.js", "m.modelName(a)", identifier) == name


def test_models_of_one_name_are_told_apart(visit: Visit, gateway: FakeGateway) -> None:
    gateway.models = ["/a/kimi", "/b/kimi", "/b/other"]
    page = visit()
    expect(page.locator("#model option")).to_have_text(["/a/kimi", "/b/kimi", "other"])
