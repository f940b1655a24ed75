"""The OpenAPI description of the routes: what the gateway itself checks and answers. vLLM documents the bodies."""

import re
from typing import Any

from kimi_server.gateway.routes import Route

RESPONSE_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["integer", "string", "null"]},
            },
        }
    },
}
ERRORS = {
    400: "The request cannot be served.",
    401: "The API key is missing or unknown.",
    403: "The API key may not do this.",
    404: "There is no such path, model or response.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    429: "A limit of the key is reached; see Retry-After.",
    502: "The replica failed before it answered.",
    503: "No room, no replica, or the gateway is stopping; see Retry-After.",
    504: "The replica was silent for too long.",
}
COUNT = {"type": ["integer", "null"]}
CONTEXT: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "What a context costs.",
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["model", "max_model_len", "kda_state_bytes", "mla_bytes_per_token"],
                    "properties": {
                        "model": {"type": ["string", "null"]},
                        "max_model_len": COUNT,
                        "kda_state_bytes": COUNT,
                        "mla_bytes_per_token": COUNT,
                    },
                }
            }
        },
    }
}


def plain(description: str, status: int = 200) -> dict[int | str, dict[str, Any]]:
    return {status: {"description": description, "content": {"text/plain": {"schema": {"type": "string"}}}}}


def error_response(status: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"description": ERRORS[status], "content": {"application/json": {"schema": ERROR}}}}


METRICS = plain("Prometheus metrics.") | error_response(401) | error_response(403)


def describe(route: Route) -> dict[str, Any]:
    """Arguments for FastAPI's `add_api_route` that describe a proxied route."""
    forms: dict[str, Any] = {"application/json": {}}
    if route.prefills:
        forms["text/event-stream"] = {}
    responses: dict[int | str, dict[str, Any]] = {200: {"description": "The answer of vLLM.", "content": forms}}
    for status in ERRORS:
        responses |= error_response(status)
    extra: dict[str, Any] = {}
    if route.json_body:
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}
    if "{response_id}" in route.path:
        schema = {"type": "string", "pattern": f"^{RESPONSE_ID.pattern}$"}
        extra["parameters"] = [{"name": "response_id", "in": "path", "required": True, "schema": schema}]
    return {"responses": responses, "openapi_extra": extra}
