"""The playground without a browser: what is served, with which headers, and what the files may not hold."""

import re
from collections.abc import Iterator

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from kimi_server.playground import page

NAMES = sorted(path.name for path in page.FILES.iterdir())
TYPES = {"css": "text/css", "html": "text/html", "js": "text/javascript", "svg": "image/svg+xml"}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    app = FastAPI()
    page.mount_playground(app)
    with TestClient(app) as client:
        yield client


def text(name: str) -> str:
    return (page.FILES / name).read_text()


@pytest.mark.parametrize("url", ["/", *(f"/playground/{name}" for name in NAMES)])
def test_served_with_its_headers(client: TestClient, url: str) -> None:
    name = url.rsplit("/", 1)[1] or "index.html"
    answer = client.get(url)
    assert answer.status_code == 200
    assert answer.text == text(name)
    assert answer.headers["content-type"].split(";")[0] == TYPES[name.rsplit(".")[-1]]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-cache"
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'self';")
    assert "unsafe" not in policy and "http" not in policy and "data:" not in policy
    assert "frame-ancestors 'none'" in policy


@pytest.mark.parametrize("url", ["/", "/playground/playground.js"])
def test_an_unchanged_copy_is_not_sent_again(client: TestClient, url: str) -> None:
    tag = client.get(url).headers["etag"]
    again = client.get(url, headers={"If-None-Match": tag})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["cache-control"] == "no-cache"


def test_head_is_answered_and_other_methods_are_not(client: TestClient) -> None:
    for url in ("/", "/playground/playground.css"):
        assert client.head(url).status_code == 200
        assert client.head(url).content == b""
        assert client.post(url).status_code == 405


@pytest.mark.parametrize("path", ["..%2fplayground.py", "%2e%2e/playground.py", "..%5cplayground.py", "none.js", ""])
def test_nothing_beside_the_files_is_served(client: TestClient, path: str) -> None:
    assert client.get(f"/playground/{path}").status_code == 404


def test_the_routes_are_no_part_of_the_api(client: TestClient) -> None:
    assert client.get("/openapi.json").json()["paths"] == {}


@pytest.mark.parametrize("name", NAMES)
def test_no_file_names_another_host(name: str) -> None:
    found = re.findall(r"(?:https?:|wss?:|data:[a-z]+/|[\"'(]//)[^\s\"')]*", text(name))
    assert set(found) <= {"http://www.w3.org/2000/svg"}  # the name of SVG, which nobody fetches


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(".js")])
def test_scripts_never_make_html_or_code_of_text(name: str) -> None:
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|setHTML|\beval\b|new Function|srcdoc"
    assert re.findall(forbidden, text(name)) == []


def test_page_has_no_inline_script_style_or_handler() -> None:
    page = text("index.html")
    assert re.findall(r"<style|\sstyle=|\son[a-z]+=|javascript:", page) == []
    assert re.findall(r"<script(?![^>]*\ssrc=)", page) == []


def test_what_the_files_name_is_there() -> None:
    named = set(re.findall(r'(?:href|src)="playground/([^"]+)"', text("index.html")))
    for name in NAMES:
        if name.endswith(".js"):
            named |= set(re.findall(r'from "\./([^"]+)"', text(name)))
    assert named | {"index.html"} == set(NAMES)
    ids = set(re.findall(r'\sid="([^"]+)"', text("index.html")))
    used = set(re.findall(r"\bpage\.(\w+)", text("playground.js")))
    assert used <= ids
