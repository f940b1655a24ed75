"""Requests made from the gateway's own description of its routes, by schemathesis: no answer is outside of it."""

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from kimi_server.gateway.app import build
from kimi_server.gateway.config.settings import ReplicaSettings, Settings
from kimi_server.gateway.gateway import Gateway
from kimi_server.gateway.routes import CLOSED, ROUTES
from tests.support.gateway import Running, Start
from tests.support.upstream import Upstream

CHECKS = [
    not_a_server_error,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
]
EXAMPLES = 20  # of each route

described = build(Gateway(Settings(replicas=(ReplicaSettings("http://127.0.0.1:1"),)))).openapi()
schema = schemathesis.openapi.from_dict(described)


@pytest.fixture(scope="module")
def gateway(start_module: Start) -> Running:
    return start_module(Upstream(tokens=2))


@schema.parametrize()
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_answers_are_as_described(case: schemathesis.Case, gateway: Running) -> None:
    case.call_and_validate(base_url=gateway.url, checks=CHECKS, timeout=120)
    assert gateway.outstanding == 0


def test_every_route_is_described(gateway: Running) -> None:
    paths = {(method.upper(), path) for path, methods in described["paths"].items() for method in methods}
    assert paths >= {(route.method, route.path) for route in ROUTES}
    assert not {path for _, path in paths} & set(CLOSED)
    assert httpx.get(f"{gateway.url}/openapi.json", trust_env=False).json() == described
