"""The routes of vLLM that the gateway passes on. What is not here does not exist: 404, and nothing upstream.

Closed on purpose are the routes outside /v1 (metrics, load, scaling, profiling, ...) and, inside it, the loading and
unloading of LoRA adapters.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Route:
    method: str
    path: str
    prefills: bool = False  # makes the engine read a prompt: goes through admission
    json_body: bool = False
    anthropic: bool = False  # errors in a stream have that API's form
    # What says how long an answer may be, the first given counts; `answer`: if none is, None for all the context.
    answer_fields: tuple[str, ...] = ()
    answer: int | None = None
    counts: str | None = None  # the path that counts the tokens of the same body's prompt


CHAT, TOKENIZE = ("max_completion_tokens", "max_tokens"), "/tokenize"

ROUTES = (
    Route("GET", "/v1/models"),
    Route("POST", "/v1/chat/completions", prefills=True, json_body=True, answer_fields=CHAT, counts=TOKENIZE),
    Route("POST", "/v1/chat/completions/batch", prefills=True, json_body=True, answer_fields=CHAT),
    Route(
        *("POST", "/v1/completions"),
        prefills=True,
        json_body=True,
        answer_fields=("max_tokens",),
        answer=16,
        counts=TOKENIZE,
    ),
    Route("POST", "/v1/responses", prefills=True, json_body=True, answer_fields=("max_output_tokens",)),
    Route("GET", "/v1/responses/{response_id}"),
    Route("POST", "/v1/responses/{response_id}/cancel"),
    Route(
        *("POST", "/v1/messages"),
        prefills=True,
        json_body=True,
        anthropic=True,
        answer_fields=("max_tokens",),
        counts="/v1/messages/count_tokens",
    ),
    Route("POST", "/v1/messages/count_tokens", json_body=True, anthropic=True),
    Route("POST", "/v1/systemone", prefills=True, json_body=True, answer=2),
)

# Of /v1 too, but not for clients.
CLOSED = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
