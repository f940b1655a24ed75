"""Answers as Markdown in a browser: blocks, tables, code, formulas, however the stream cuts them; never as HTML."""

import html
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from tests.e2e.playground.asking import ANSWER, ask, attach, until
from tests.e2e.playground.fake_gateway import FakeGateway, Reply

pytestmark = pytest.mark.browser

TEXT = """# Title

One *two* **three** `four`, see [the page](https://example.org/a) and https://example.org/b, not main.rs.

| length | state |
| --- | ---: |
| 4,096 | 41 MiB |

```python
if a:

    b = '```'
```

1. first
   - inner
2. second

> quoted

Later: [named][1].

[1]: https://example.org/c
"""

# What must stay text, or nothing: from the corpora of Markdown renderers.
EVIL = [
    "<script>window.hacked=1</script>",
    '<img src=x onerror="window.hacked=1">',
    '<svg/onload="window.hacked=1"><a xlink:href="javascript:window.hacked=1">x</a></svg>',
    "[a](javascript:window.hacked=1)",
    "[a](JaVaScRiPt&#58;window.hacked=1)",
    "[a](&#x6A&#x61&#x76&#x61&#x73&#x63&#x72&#x69&#x70&#x74&#x3A;window.hacked=1)",
    "[a](data:text/html;base64,PHNjcmlwdD53aW5kb3cuaGFja2VkPTE8L3NjcmlwdD4=)",
    "[a](vbscript:msgbox)",
    "[a](file:///etc/passwd)",
    '[a](https://example.org "onmouseover=window.hacked=1")',
    '[a](https://example.org/"onclick="window.hacked=1)',
    "<javascript:window.hacked=1>",
    '<https://example.org/"onclick=window.hacked=1>',
    "![a](https://example.org/beacon.png)",
    "![a](javascript:window.hacked=1)",
    '![a](x"onerror="window.hacked=1)',
    "```<img/src/onerror=window.hacked=1>\ncode\n```",
    '```"onclick="window.hacked=1\ncode\n```',
    "| a |\n| --- |\n| <iframe srcdoc='<script>parent.hacked=1</script>'> |",
    "$\\href{javascript:window.hacked=1}{x}$",
    "$\\includegraphics{https://example.org/beacon.png}$",
    "$\\htmlData{onclick=window.hacked=1}{x}$ $\\htmlStyle{background:url(https://example.org)}{x}$",
    "$<img src=x onerror=window.hacked=1>$",
    "$$\\def\\a{\\a\\a}\\a$$",
    "\\(\\fcolorbox{red}{blue}{x} \\pmb{y}\\)",
    "<form action=/v1/models><input name=attributes><button>x</button></form>",
    "<math><mtext><table><mglyph><style><img src=x onerror=window.hacked=1>",
    "[x]: javascript:window.hacked=1\n\n[x]",
    "<base href=https://example.org/><link rel=stylesheet href=https://example.org/x.css><style>*{color:red}</style>",
    "<details open ontoggle=window.hacked=1>",
    '<a id="conversation" name="page">clobbered</a>',
]


def test_each_kind_of_block(page: Page, gateway: FakeGateway) -> None:
    """Cut at each character, it ends as it would in one piece."""
    gateway.reply = Reply(pieces=list(TEXT))
    ask(page, "All?")
    answer = page.locator(ANSWER)
    expect(answer.locator("h1")).to_have_text("Title")
    expect(answer.locator("em")).to_have_text("two")
    expect(answer.locator("p code")).to_have_text("four")
    expect(answer.locator("th.right")).to_have_text("state")
    expect(answer.locator("td.right")).to_have_text("41 MiB")
    expect(answer.locator("pre")).to_have_text("if a:\n\n    b = '```'\n")
    expect(answer.locator(".language")).to_have_text("python")
    expect(answer.locator("ol > li")).to_have_count(2)
    expect(answer.locator("ol ul li")).to_have_text("inner")
    expect(answer.locator("blockquote")).to_have_text("quoted")
    links = answer.locator("a").evaluate_all("(all) => all.map((one) => [one.href, one.target, one.rel])")
    assert [link[0].removeprefix("https://example.org/") for link in links] == ["a", "b", "c"]
    assert all(link[1:] == ["_blank", "noopener noreferrer"] for link in links)
    until(page, "document.querySelector('.hljs-keyword')")
    gateway.reply = Reply(pieces=[TEXT])
    ask(page, "In one piece?")
    page.wait_for_timeout(100)
    expect(answer.locator(".hljs-keyword")).to_have_text("if")
    first, second = (page.locator(".answer > .text").nth(at).inner_html() for at in (0, 1))
    assert first == second


def test_what_was_written_is_not_touched_again(page: Page, gateway: FakeGateway) -> None:
    gateway.reply = Reply(pieces=["First.\n\n", "Second", " goes on.\n\nThird."], hold_after=2)
    page.fill("#question", "Grow?")
    page.press("#question", "Enter")
    expect(page.locator(f"{ANSWER} p")).to_have_count(2)
    page.evaluate(f"window.first = document.querySelector('{ANSWER} p')")
    gateway.release()
    expect(page.locator(f"{ANSWER} p")).to_have_count(3)
    assert page.evaluate(f"window.first === document.querySelector('{ANSWER} p')")


def test_code_is_copied(visit: Callable[..., Page], gateway: FakeGateway) -> None:
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    gateway.reply = Reply(pieces=["Run:\n\n```sh\nls  # all\n```\n"])
    ask(page, "Code?")
    page.get_by_role("button", name="Copy code").click()
    expect(page.locator("#status")).to_have_text("Copied.")
    assert page.evaluate("navigator.clipboard.readText()") == "ls  # all\n"


def test_formulas_are_set_with_what_reads_them_aloud(page: Page, gateway: FakeGateway) -> None:
    gateway.reply = Reply(
        pieces=["It is $e^{i\\pi}$, \\(a_1\\).\n\n$$\n\\sum_i x_i\n= y\n- 1\n$$\n\n\\[ z \\]\n\nIt costs $5 and $6."]
    )
    ask(page, "Maths?")
    answer = page.locator(ANSWER)
    expect(answer.locator(".formula.set")).to_have_count(4)
    expect(answer.locator(".katex-display")).to_have_count(2)
    expect(answer.locator("math")).to_have_count(4)
    expect(answer.locator("p").last).to_have_text("It costs $5 and $6.")
    until(page, "[...document.fonts].some((font) => font.family.includes('KaTeX') && font.status === 'loaded')")


def test_a_formula_that_cannot_be_set_stays_as_it_was_written(page: Page, gateway: FakeGateway) -> None:
    gateway.reply = Reply(pieces=["$\\nothing{$ and $x$"])
    ask(page, "Maths?")
    expect(page.locator(f"{ANSWER} .formula.set")).to_have_count(1)
    expect(page.locator(f"{ANSWER} .formula:not(.set)")).to_have_text("\\nothing{")


def test_libraries_are_loaded_when_they_are_needed(page: Page, gateway: FakeGateway) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    ask(page, "Plain?")
    assert not [url for url in asked if "/vendor/" in url]
    gateway.reply = Reply(pieces=["$x$"])
    ask(page, "Maths?")
    expect(page.locator(".formula.set")).to_have_count(1)
    assert {url.split("/vendor/")[1].split("/")[0] for url in asked if "/vendor/" in url} == {"katex"}


@pytest.mark.parametrize("pieces", ["whole", "cut"])
def test_nothing_an_answer_says_becomes_html_or_is_fetched(page: Page, gateway: FakeGateway, pieces: str) -> None:
    text = "\n\n".join(EVIL)
    gateway.reply = Reply(pieces=[text] if pieces == "whole" else [text[at : at + 7] for at in range(0, len(text), 7)])
    ask(page, "Evil?")
    page.wait_for_timeout(300)
    found = page.evaluate(
        """(answer) => [...document.querySelector(answer).querySelectorAll("*")].flatMap((one) => [
            one.localName, ...[...one.attributes].map(({ name, value }) => `${name}=${value}`)])""",
        ANSWER,
    )
    forbidden = {"script", "img", "svg", "iframe", "form", "input", "style", "link", "base", "details", "object"}
    assert not forbidden & set(found)
    assert not [one for one in found if one.startswith(("on", "id=", "name=", "srcdoc", "data-"))]
    links = [one.partition("=")[2] for one in found if one.startswith(("href=", "src=", "xlink"))]
    assert links and all(link.startswith("https://example.org") for link in links)
    assert page.evaluate("window.hacked") is None
    shown = html.unescape(page.locator(ANSWER).inner_html())
    assert "<script>window.hacked=1</script>" in shown  # as text


@pytest.mark.parametrize("evil", EVIL[:3])
def test_names_of_files_are_text(page: Page, gateway: FakeGateway, evil: str) -> None:
    name = evil.replace("/", "_")
    attach(page, name, b"text")
    expect(page.locator("#attached .chip .name")).to_have_text(name)
    ask(page, evil)
    expect(page.locator(".question .chip .name")).to_have_text(name)
    page.click("text=Chats")
    expect(page.locator("#chats .title")).to_contain_text(evil[:60])
    assert page.evaluate("window.hacked") is None
    (message,) = gateway.bodies[0]["messages"]
    assert message["content"].startswith('<document name="_')
    assert message["content"].split("\n")[0].count('"') == 2
