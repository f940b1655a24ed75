"""Errors that the gateway itself answers with, as OpenAI error bodies."""

import json
from dataclasses import dataclass
from http import HTTPStatus
from math import ceil
from typing import Any


@dataclass
class GatewayError(Exception):
    """Ends a request with an HTTP error.

    `reason` labels the metric of rejected requests and is the access log's `error`. `retry_after` is in seconds and
    is rounded up for the Retry-After header; None sends none.
    """

    status: int
    reason: str
    message: str
    retry_after: float | None = None

    @property
    def headers(self) -> dict[str, str]:
        headers = {"content-type": "application/json", "content-length": str(len(self.body))}
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, ceil(self.retry_after)))
        if self.status == HTTPStatus.UNAUTHORIZED:
            headers["www-authenticate"] = "Bearer"
        return headers

    @property
    def body(self) -> bytes:
        return json.dumps(error_body(self.status, self.message)).encode()


def error_body(status: int, message: str) -> dict[str, Any]:
    """The error object of the OpenAI API, with the fields that vLLM fills."""
    kind = HTTPStatus(status).phrase.title().replace(" ", "") + "Error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def draining() -> GatewayError:
    return GatewayError(503, "draining", "This gateway is shutting down: try again.", 1)


def no_replica() -> GatewayError:
    return GatewayError(503, "no_replica", "No replica of the model is up: try again later.", 5)
