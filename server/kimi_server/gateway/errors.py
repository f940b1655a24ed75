"""What the gateway answers when it does not pass a request on: the OpenAI error body, with when to come back."""

import json
from dataclasses import dataclass
from http import HTTPStatus
from math import ceil
from typing import Any


@dataclass
class Refusal(Exception):
    """A request that ends here. `reason` is a metric's label; `retry_after`, in seconds, is sent rounded up."""

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
    """The error object of the OpenAI API, as vLLM fills it."""
    kind = HTTPStatus(status).phrase.title().replace(" ", "") + "Error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def stopping() -> Refusal:
    return Refusal(503, "draining", "This gateway is shutting down: try again.", 1)


def no_replica() -> Refusal:
    return Refusal(503, "no_replica", "No replica of the model is up: try again later.", 5)
