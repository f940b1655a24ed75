"""Which metrics there are, with their labels, and whether an expression of PromQL asks for those alone."""

import re
from importlib.util import find_spec
from pathlib import Path

# (type, labels) of the gateway's metrics without their prefix.
GATEWAY = {
    "requests_total": ("counter", {"route", "status", "lane"}),
    "queue_seconds": ("histogram", {"lane"}),
    "ttft_seconds": ("histogram", {"lane"}),
    "queued": ("gauge", {"lane"}),
    "running": ("gauge", {"replica"}),
    "prefill_tokens_outstanding": ("gauge", {"replica", "lane"}),
    "prompt_tokens_total": ("counter", {"key"}),
    "cached_tokens_total": ("counter", {"key"}),
    "completion_tokens_total": ("counter", {"key"}),
    "rejected_total": ("counter", {"reason"}),
    "replica_up": ("gauge", {"replica"}),
    "prefills_total": ("counter", {"outcome"}),
    "sessions_spilled_total": ("counter", set[str]()),
}
PREFIX = "kimi_gateway_"
ADDED = {"instance", "job"}  # by Prometheus
PARTS = re.compile("_(total|bucket|sum|count)$")


def samples(expression: str) -> set[str]:
    """The names of the samples that it asks for."""
    return set(re.findall(r"(?:vllm:|kimi_gateway_|kimi_linear_)\w+", expression))


def gateway_samples() -> dict[str, set[str]]:
    """Name -> labels of every sample that the gateway's metrics consist of."""
    found: dict[str, set[str]] = {}
    for name, (kind, labels) in GATEWAY.items():
        if kind == "histogram":
            found |= {f"{PREFIX}{name}_{part}": labels for part in ("sum", "count")}
            found[f"{PREFIX}{name}_bucket"] = labels | {"le"}
        else:
            found[f"{PREFIX}{name}"] = labels
    return found


def server_names() -> set[str]:
    """Of a server's metrics, without the ends of samples; read from the sources of vLLM and the plugin."""
    spec = find_spec("vllm")
    assert spec and spec.submodule_search_locations
    vllm = Path(spec.submodule_search_locations[0]) / "v1/metrics/loggers.py"
    ours = Path(__file__).resolve().parents[2] / "vllm_kimi_linear/cache/metrics.py"
    names = re.findall(r'name\s*=\s*"(vllm:\w+)"', vllm.read_text())
    return {*names, *re.findall(r'"(kimi_linear_\w+)"', ours.read_text())}


def check(expression: str, known: dict[str, set[str]]) -> None:
    """Fail for a sample that is not known, and for a label that it does not have."""
    used = samples(expression)
    assert used and used <= known.keys(), f"{used - known.keys()} of {expression}"
    for name, matchers in re.findall(r"((?:vllm:|kimi_)\w+)\{([^}]*)\}", expression):
        assert set(re.findall(r"(\w+)\s*[=!]~?", matchers)) <= known[name] | ADDED, expression
    for grouped in re.findall(r"by \(([^)]*)\)", expression):
        for name in used:
            assert set(grouped.split(", ")) <= known[name] | ADDED, expression
