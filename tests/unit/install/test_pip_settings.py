"""deploy/install/pip_settings.py: what pip is configured with, as uv is told it."""

import pytest

from deploy.install.pip_settings import parse, unknown_to_uv, uv_environment

LISTING = """
:env:.cert='/etc/ssl/cert.pem'
:env:.find-links='/from/the/environment'
download.find-links='/of another command'
global.constraint='/etc/constraints.txt'
global.extra-index-url='file:///a/simple file:///b/simple'
global.find-links='/a\\n/b'
global.index-url='https://user:secret@index.invalid/simple'
install.constraint='/etc/install.txt'
:env:.no-input='1'
:env:.proxy=''
"""


def test_the_nearest_section_counts() -> None:
    assert parse(LISTING) == {
        "cert": "/etc/ssl/cert.pem",
        "constraint": "/etc/install.txt",
        "extra-index-url": "file:///a/simple file:///b/simple",
        "find-links": "/from/the/environment",
        "index-url": "https://user:secret@index.invalid/simple",
        "no-input": "1",
    }


@pytest.mark.parametrize("listing", ["", "\n", "a line of another kind\n"])
def test_nothing_is_configured(listing: str) -> None:
    assert parse(listing) == {}


def test_uv_is_told_the_same() -> None:
    told = uv_environment(parse(LISTING), {"PATH": "/bin"})
    assert told == {
        "PATH": "/bin",
        "SSL_CERT_FILE": "/etc/ssl/cert.pem",
        "UV_CONSTRAINT": "/etc/install.txt",
        "UV_DEFAULT_INDEX": "https://user:secret@index.invalid/simple",
        "UV_FIND_LINKS": "/from/the/environment",
        "UV_INDEX": "file:///a/simple file:///b/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_PYTHON_DOWNLOADS": "never",
    }


def test_several_links() -> None:
    told = uv_environment(parse("global.find-links='\\n/a\\n/b'"), {})
    assert told["UV_FIND_LINKS"] == "/a,/b"


def test_what_the_user_told_uv_stays() -> None:
    own = {"UV_INDEX_STRATEGY": "first-index", "UV_FIND_LINKS": "/mine", "SSL_CERT_FILE": "/mine.pem"}
    told = uv_environment({"find-links": "/a", "cert": "/b.pem"}, own)
    assert told.items() >= own.items()


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({}, {"UV_SYSTEM_CERTS": "1"}),
        ({"REQUESTS_CA_BUNDLE": "/r.pem", "CURL_CA_BUNDLE": "/c.pem"}, {"SSL_CERT_FILE": "/r.pem"}),
        ({"CURL_CA_BUNDLE": "/c.pem"}, {"SSL_CERT_FILE": "/c.pem"}),
    ],
)
def test_certificates_that_pip_finds_itself(environment: dict[str, str], told: dict[str, str]) -> None:
    assert uv_environment({}, environment).items() >= told.items()


@pytest.mark.parametrize(("value", "off"), [("1", True), ("true", True), ("0", False), ("False", False)])
def test_cache(value: str, off: bool) -> None:
    assert ("UV_NO_CACHE" in uv_environment({"no-cache-dir": value}, {})) == off


def test_settings_that_uv_cannot_be_told() -> None:
    listing = ":env:.no-index='1'\nglobal.require-hashes='true'\nglobal.quiet='1'\nglobal.timeout='60'\n"
    assert unknown_to_uv(parse(listing)) == ["no-index", "require-hashes"]
