"""How pip is configured on this machine, said to uv, which reads none of it.

pip's configuration files and PIP_* variables say where packages come from: an index, more of them, folders of wheels,
constraints, certificates. uv reads variables of its own; what the user set of those stays.
"""

import ast
from collections.abc import Iterable, Mapping

# pip's setting -> uv's variable. Lists are separated by spaces there, but for links.
VARIABLES = {
    "cert": "SSL_CERT_FILE",
    "client-cert": "SSL_CLIENT_CERT",
    "constraint": "UV_CONSTRAINT",
    "default-timeout": "UV_HTTP_TIMEOUT",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "index-url": "UV_DEFAULT_INDEX",
    "no-cache-dir": "UV_NO_CACHE",
    "proxy": "ALL_PROXY",
    "retries": "UV_HTTP_RETRIES",
    "timeout": "UV_HTTP_TIMEOUT",
    "trusted-host": "UV_INSECURE_HOST",
}
# About pip itself: they change neither what is installed nor where it comes from.
OF_PIP_ALONE = {
    *("break-system-packages", "cache-dir", "compile", "debug", "disable-pip-version-check", "exists-action"),
    *("keyring-provider", "log", "no-color", "no-compile", "no-input", "no-python-version-warning"),
    *("no-warn-conflicts", "no-warn-script-location", "prefer-binary", "progress-bar", "quiet"),
    *("require-virtualenv", "root-user-action", "use-deprecated", "use-feature", "verbose"),
}
SECTIONS = ("global", "install", ":env:")  # of the settings that `pip install` reads, each above those before it


def parse(listing: str) -> dict[str, str]:
    """The settings of `pip install`, from what `pip config list` prints; empty ones count as not set."""
    found = []
    for line in listing.splitlines():
        name, equals, value = line.partition("=")
        section, _, key = name.rpartition(".")
        if equals and section in SECTIONS:
            found.append((SECTIONS.index(section), key, str(ast.literal_eval(value)).strip()))
    settings = {key: value for _, key, value in sorted(found)}
    return {key: value for key, value in settings.items() if value}


def unknown_to_uv(settings: Iterable[str]) -> list[str]:
    """The settings that uv cannot be told and that may change what is installed."""
    return sorted(set(settings) - VARIABLES.keys() - OF_PIP_ALONE)


def uv_environment(settings: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """The environment in which uv takes the packages that pip would take.

    Args:
        settings: as `parse` gives them.
        environment: the one that uv would have otherwise; what it says of uv's own variables stays.
    """
    told = {
        # As pip does: the best version of all indexes, not the best of the first that has the package.
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_PYTHON_DOWNLOADS": "never",
    }
    if "SSL_CERT_FILE" not in environment and "cert" not in settings:
        # requests, and so pip, reads these; where there is none, pip trusts what the system trusts.
        bundle = environment.get("REQUESTS_CA_BUNDLE") or environment.get("CURL_CA_BUNDLE")
        told |= {"SSL_CERT_FILE": bundle} if bundle else {"UV_SYSTEM_CERTS": "1"}
    for key, value in settings.items():
        if key == "no-cache-dir" and value.lower() in ("0", "false", "no", "off"):
            continue
        if key in VARIABLES:
            separator = "," if key == "find-links" else " "
            told[VARIABLES[key]] = separator.join(value.split())
    return told | dict(environment)
