"""The playground without a browser: what is served, with which headers, and what the files may not hold."""

import hashlib
import re
from collections.abc import Iterator

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from kimi_server.playground import page

ALL = sorted(path.relative_to(page.FILES).as_posix() for path in page.FILES.rglob("*") if path.is_file())
VENDORED = [name for name in ALL if name.startswith("vendor/")]
NAMES = [name for name in ALL if name not in VENDORED]
SCRIPTS = [name for name in NAMES if name.endswith(".js")]
TYPES = {
    "css": "text/css",
    "html": "text/html",
    "js": "text/javascript",
    "svg": "image/svg+xml",
    "txt": "text/plain",
    "woff2": "font/woff2",
}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    app = FastAPI()
    page.mount_playground(app)
    with TestClient(app) as client:
        yield client


def text(name: str) -> str:
    return (page.FILES / name).read_text()


@pytest.mark.parametrize("url", ["/", *(f"/playground/{name}" for name in ALL)])
def test_served_with_its_headers(client: TestClient, url: str) -> None:
    name = url.removeprefix("/playground/").removeprefix("/") or "index.html"
    answer = client.get(url)
    assert answer.status_code == 200
    assert answer.content == (page.FILES / name).read_bytes()
    kind = name.rsplit(".")[-1]
    assert kind not in TYPES or answer.headers["content-type"].split(";")[0] == TYPES[kind]
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
    for url in ("/", "/playground/styles/page.css"):
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
    found = re.findall(r"(?:https?:|\bwss?:|data:[a-z]+/|[\"'(]//)[^\s\"')]*", text(name))
    assert set(found) <= {"http://www.w3.org/2000/svg"}  # the name of SVG, which nobody fetches


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_never_make_html_or_code_of_text(name: str) -> None:
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|setHTML|\beval\b|new Function|srcdoc"
    assert re.findall(forbidden, text(name)) == []


def test_page_has_no_inline_script_style_or_handler() -> None:
    page = text("index.html")
    assert re.findall(r"<style|\sstyle=|\son[a-z]+=|javascript:", page) == []
    assert re.findall(r"<script(?![^>]*\ssrc=)", page) == []


def test_what_the_files_name_is_there() -> None:
    """No link leads nowhere, and no file is there that nothing uses."""
    named = {f"styles/{name}" for name in re.findall(r'href="playground/styles/([^"]+)"', text("index.html"))}
    named |= {"index.html", "icon.svg", "playground.js"}
    for name in SCRIPTS:
        for path in re.findall(r'(?:from |URL\()"(\.[^"]+\.js)"', text(name)):
            named.add((page.FILES / name).parent.joinpath(path).resolve().relative_to(page.FILES.resolve()).as_posix())
    named |= {f"examples/{name}" for name in re.findall(r'file: "([^"]+)"', text("panels/examples.js"))}
    named |= {f"vendor/{name}" for name in re.findall(r'(?:url\(|href: url\()"([^"]+)"', text("lib/libraries.js"))}
    named |= {name for name in VENDORED if name.endswith((".woff2", "LICENSE", "README.md"))}
    assert named == set(ALL)


def test_every_element_that_the_page_names_is_there() -> None:
    html = text("index.html")
    ids = re.findall(r'\sid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    script = text("playground.js")
    assert set(re.findall(r"\bpage\.(\w+)", script) + re.findall(r'page\["([^"]+)"\]', script)) <= set(ids)
    assert set(re.findall(r'(?:for|popovertarget|aria-describedby)="([^"]+)"', html)) <= set(ids)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("examples/")])
def test_a_file_of_ours_has_one_noun(name: str) -> None:
    lines = text(name).splitlines()
    assert len(lines) <= 300
    assert not [line for line in lines if len(line) > 120]


def test_libraries_of_others_are_those_that_the_list_names() -> None:
    rows = re.findall(r"^\| (\S+/\S+) \| \S+ \| ([0-9a-f]{64}) \|$", text("vendor/README.md"), re.MULTILINE)
    found = {name: hashlib.sha256((page.FILES / name).read_bytes()).hexdigest() for name in VENDORED}
    assert {f"vendor/{name}": digest for name, digest in rows} | {
        "vendor/README.md": found["vendor/README.md"]
    } == found
    assert {f"vendor/{name.split('/')[0]}/LICENSE" for name, _ in rows} <= set(VENDORED)
    assert sum((page.FILES / name).stat().st_size for name in VENDORED) < 3_000_000
