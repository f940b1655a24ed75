"""Refuse a malformed request at the first faulty item of a list, without checking the rest."""

from collections.abc import Iterator
from typing import Any

from vllm_kimi_linear import ARCHITECTURE
from vllm_kimi_linear.patches.patch import Function, Hook, Patch

LISTS = ("list", "tuple", "set", "frozenset")


def end_at_first_faults(original: Function) -> Function:
    def build_app(args: Any, supported_tasks: Any = None, model_config: Any = None) -> Any:
        app = original(args, supported_tasks, model_config)
        if model_config is not None and model_config.architecture == ARCHITECTURE:
            for adapter in _bodies(app.routes):
                _end_at_first_fault(adapter)
        return app

    return build_app


def _bodies(routes: Any) -> Iterator[Any]:
    """The pydantic adapter of each route's body."""
    for route in routes:
        if getattr(route, "body_field", None) is not None:
            yield route.body_field._type_adapter
        yield from _bodies(getattr(route, "routes", ()))


def _end_at_first_fault(adapter: Any) -> None:
    """Validate by the same schema, whose lists end at a fault; the models themselves, which others use, stay."""
    from pydantic_core import SchemaValidator

    # Without `_use_prebuilt` it would take the models' own validators for the models inside of the schema.
    adapter.validator = SchemaValidator(_with_short_lists(adapter.core_schema), None, _use_prebuilt=False)


def _with_short_lists(schema: Any) -> Any:
    """A copy of a schema of pydantic-core, which is of dictionaries and lists and refers to others by their name."""
    if isinstance(schema, dict):
        copy = {key: _with_short_lists(value) for key, value in schema.items()}
        return copy | {"fail_fast": True} if schema.get("type") in LISTS else copy
    if isinstance(schema, list | tuple):
        return type(schema)(map(_with_short_lists, schema))
    return schema


PATCH = Patch(
    symptom='A body of 900 kB, `{"messages": [{}, {}, ...]}`, stops every stream of a server for 80 seconds and '
    "takes 7 GiB of memory before it is refused.",
    cause="pydantic collects the faults of every item of a list, here 15 for each item, one for each kind of "
    "message that it might be, and FastAPI makes a dictionary of each. vLLM then shortens only the answer, to ten "
    "of them.",
    upstream="vLLM limits what is shown (`_MAX_REPORTED_ERRORS`), not what is collected; not reported yet.",
    remove_when="vLLM's request models stop at the first fault in a list (pydantic's `FailFast`).",
    hooks=(
        # In the module that calls it, which has it by name from `launchers.app`.
        Hook(
            "vllm.entrypoints.launchers.api_server.entry:build_app",
            "args supported_tasks model_config",
            end_at_first_faults,
        ),
    ),
)
