"""The routes of vLLM that the gateway proxies: an allow-list. Every other path is 404, and nothing is sent upstream.

Left out on purpose: the routes outside /v1 (metrics, load, scaling, profiling, ...) and, inside it, loading and
unloading of LoRA adapters.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Route:
    method: str
    path: str
    prefills: bool = False  # has a prompt to prefill: goes through admission
    json_body: bool = False
    anthropic: bool = False  # errors in a stream have the form of that API
    # The fields that limit a completion's tokens, of which the first given counts, and vLLM's default without them
    # (None: the rest of the context).
    output_limit_fields: tuple[str, ...] = ()
    default_output_tokens: int | None = None
    tokenize_path: str | None = None  # takes the same body and counts its prompt's tokens
    transfers: bool = False  # vLLM takes a prompt that another server has read
    priority_in_body: bool = False  # vLLM takes it from there, not from the header


CHAT_LIMITS, TOKENIZE = ("max_completion_tokens", "max_tokens"), "/tokenize"

ROUTES = (
    Route("GET", "/v1/models"),
    Route(
        "POST",
        "/v1/chat/completions",
        prefills=True,
        json_body=True,
        output_limit_fields=CHAT_LIMITS,
        tokenize_path=TOKENIZE,
        transfers=True,
    ),
    Route(
        *("POST", "/v1/chat/completions/batch"),
        prefills=True,
        json_body=True,
        output_limit_fields=CHAT_LIMITS,
        priority_in_body=True,
    ),
    Route(
        *("POST", "/v1/completions"),
        prefills=True,
        json_body=True,
        output_limit_fields=("max_tokens",),
        default_output_tokens=16,
        tokenize_path=TOKENIZE,
        transfers=True,
    ),
    Route("POST", "/v1/responses", prefills=True, json_body=True, output_limit_fields=("max_output_tokens",)),
    Route("GET", "/v1/responses/{response_id}"),
    Route("POST", "/v1/responses/{response_id}/cancel"),
    Route(
        *("POST", "/v1/messages"),
        prefills=True,
        json_body=True,
        anthropic=True,
        output_limit_fields=("max_tokens",),
        tokenize_path="/v1/messages/count_tokens",
        transfers=True,
    ),
    Route("POST", "/v1/messages/count_tokens", json_body=True, anthropic=True),
    Route("POST", "/v1/systemone", prefills=True, json_body=True, default_output_tokens=2, priority_in_body=True),
)

# Paths of vLLM's /v1 that clients must not reach.
CLOSED = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
