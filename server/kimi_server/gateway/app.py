"""The ASGI applications: the API with the playground, and the metrics on their own port."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

from kimi_server.gateway import openapi
from kimi_server.gateway.errors import GatewayError, error_body
from kimi_server.gateway.gateway import Gateway
from kimi_server.gateway.headers import api_key
from kimi_server.gateway.keys import rate_limits
from kimi_server.gateway.proxy import ProxyResponse
from kimi_server.gateway.routes import ROUTES, Route
from kimi_server.playground.page import mount_playground
from vllm_kimi_linear import __version__

EXPOSED = ("retry-after", "x-request-id", "x-kimi-lane", "x-kimi-queue-seconds", "x-kimi-replica")


class RejectEncodedPaths:
    """Answers 404 for a percent-encoded path, so that no two spellings lead to one route."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and b"%" in scope["raw_path"]:
            await not_found()(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def not_found() -> Response:
    return JSONResponse(error_body(404, "There is no such path here: see /openapi.json."), 404)


def build(gateway: Gateway) -> FastAPI:
    """The application; its lifespan runs the gateway's background tasks."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with gateway.running():
            yield

    app = FastAPI(
        title="Kimi Linear gateway",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_middleware(RejectEncodedPaths)
    if gateway.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=gateway.settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[*EXPOSED, *rate_limits.NAMES],
        )
    app.exception_handler(HTTPException)(http_error)
    for route in ROUTES:
        app.add_api_route(
            route.path,
            proxy_endpoint(gateway, route),
            methods=[route.method],
            name=route.path,
            response_class=Response,
            **openapi.describe(route),
        )

    @app.get("/healthz", responses=openapi.plain("The gateway runs."))
    async def healthz() -> Response:
        return Response("ok\n", media_type="text/plain")

    not_ready = openapi.plain("No replica is up, or the gateway is stopping.", 503)

    @app.get("/readyz", responses=openapi.plain("A replica is up.") | not_ready)
    async def readyz() -> Response:
        return Response(
            "ready\n" if gateway.ready else "not ready\n", 200 if gateway.ready else 503, media_type="text/plain"
        )

    if gateway.settings.metrics_port is None:

        @app.get("/metrics", responses=openapi.METRICS)
        async def metrics(request: Request) -> Response:
            try:
                gateway.keyring.check_metrics(api_key(list(request.scope["headers"])))
            except GatewayError as error:
                return Response(error.body, error.status, error.headers)
            return Response(gateway.metrics_text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/kimi/context", responses=openapi.CONTEXT)
    async def kimi_context() -> dict[str, Any]:
        cost = gateway.context_cost
        return {
            "model": gateway.model,
            "max_model_len": gateway.max_model_len,
            "kda_state_bytes": cost and cost.kda_state_bytes,
            "mla_bytes_per_token": cost and cost.mla_bytes_per_token,
        }

    mount_playground(app)
    return app


def metrics_app(gateway: Gateway) -> FastAPI:
    """The application on the metrics' port: /metrics alone, without a key."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.exception_handler(HTTPException)(http_error)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(gateway.metrics_text(), media_type=CONTENT_TYPE_LATEST)

    return app


def proxy_endpoint(gateway: Gateway, route: Route) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint of a proxied route."""

    async def endpoint(request: Request) -> Response:
        response_id = request.path_params.get("response_id", "x")
        if not openapi.RESPONSE_ID.fullmatch(response_id):
            return not_found()
        # Not `request.url.path`, which depends on the Host header too.
        return ProxyResponse(gateway, route, request.scope["path"])

    return endpoint


def redirect_without_slash(request: Request) -> Response | None:
    """A redirect for a path that is a route but for a trailing slash; relative, for the Host header is not trusted."""
    path = request.scope["path"]
    shorter = {**request.scope, "path": path.removesuffix("/")}
    if not path.endswith("/") or path.startswith("//"):
        return None
    if not any(route.matches(shorter)[0] is not Match.NONE for route in request.app.routes):
        return None
    query = request.scope["query_string"].decode("latin-1")
    return Response(status_code=307, headers={"location": shorter["path"] + (f"?{query}" if query else "")})


async def http_error(request: Request, error: Exception) -> Response:
    """404 and 405 as OpenAI error bodies; a route with a trailing slash is redirected, as vLLM does."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return redirect_without_slash(request) or not_found()
    message = f"{error.detail}: {request.scope['path']} does not take {request.method}."
    return JSONResponse(error_body(error.status_code, message), error.status_code, error.headers)
