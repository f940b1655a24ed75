"""Serves the playground: a static page and its files, from this package's data."""

import mimetypes
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.staticfiles import StaticFiles
from starlette.types import Scope

# Not in every system's list of types.
mimetypes.add_type("font/woff2", ".woff2")
mimetypes.add_type("text/javascript", ".js")

FILES = Path(__file__).with_name("static")

# The page may load and call its own origin only, and may not be framed. The files have no version in their names, so
# a browser revalidates its copy each time.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class PageFiles(StaticFiles):
    """Adds HEADERS to each file."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


def mount_playground(app: FastAPI) -> None:
    """Serve the page at `/` and its files under `/playground/`, without a key: they hold no state of the server."""
    files = PageFiles(directory=FILES)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page(request: Request) -> Response:
        return await files.get_response("index.html", request.scope)

    app.mount("/playground", files, name="playground")
