"""Field types of the configuration files, for pydantic, and its errors as one sentence each."""

import dataclasses
import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    AllowInfNan,
    ConfigDict,
    Field,
    SecretStr,
    Strict,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from kimi_server.gateway.config.yaml_file import SettingsError

T = TypeVar("T")


def must(remedy: str) -> PydanticCustomError:
    """The error of one field; `must("begin with http://")` ends its message with 'it must begin with http://'."""
    return PydanticCustomError("must", "it must {remedy}", {"remedy": remedy})


def wrong(sentence: str) -> PydanticCustomError:
    """The error of several fields that do not fit together; `sentence` names them and has no full stop."""
    return PydanticCustomError("wrong", "{sentence}", {"sentence": sentence})


def _printable(text: str) -> str:
    if not text.isprintable():  # a lone surrogate has no UTF-8, a line feed would forge a line of the log
        raise must("hold no control characters")
    return text


def _header(secret: SecretStr) -> SecretStr:
    value = secret.get_secret_value()
    if not value or not all("!" <= char <= "~" for char in value):
        raise must("be printable ASCII without spaces, for it is sent in a header")
    return secret


# Strict: "8080" is no number, `true` is none. The upper bounds keep arithmetic with floats exact and timers possible.
Whole = Annotated[int, Strict(), Field(le=1 << 53)]
Seconds = Annotated[float, Strict(), AllowInfNan(False), Field(le=1e9)]
Text = Annotated[str, Strict(), AfterValidator(_printable)]
Switch = Annotated[bool, Strict()]
Secret = Annotated[SecretStr, Strict()]
HeaderSecret = Annotated[SecretStr, Strict(), AfterValidator(_header)]

CONFIG = ConfigDict(extra="forbid")
SECRET = ("api_key", "cache_salt_secret", "sha256")  # fields whose values no message shows
REMEDIES = {
    "int_type": "be a whole number",
    "float_type": "be a number",
    "finite_number": "be a number",
    "string_type": "be a text",
    "bool_type": "be true or false",
    "path_type": "be a path",
    "tuple_type": "be a list",
    "dataclass_type": "be a mapping of fields",
    "greater_than_equal": "be at least {ge}",
    "less_than_equal": "be at most {le:.0f}",
}


class Fields:
    """Base of the dataclasses for a mapping in a file; the error of an unknown field lists the known ones."""

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        if isinstance(given, dict):
            names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]  # the subclasses are
            if unknown := sorted(given.keys() - set(names)):
                raise wrong(f"there is no field {reprlib.repr(unknown[0])}: use one of {', '.join(names)}")
        return given


def build(kind: type[T], given: Mapping[str, Any], where: object) -> T:
    """Validate `given` as the dataclass `kind`; raises SettingsError. `where`, the file, begins the message."""
    try:
        return TypeAdapter(kind).validate_python(given)
    except ValidationError as error:
        raise SettingsError(f"{where}: {_sentence(error.errors(include_url=False)[0])}.") from None


def _sentence(error: ErrorDetails) -> str:
    """`replicas[0].url is 3: it must be a text`"""
    *parents, last = error["loc"] or ("",)
    within = _path(*parents)
    at = _path(*parents, last)
    if error["type"] == "missing":
        return f"{within}: the field {last!r} is missing" if within else f"the field {last!r} is missing"
    if error["type"] == "wrong":
        return f"{at}: {error['msg']}" if at else error["msg"]
    if error["type"] in REMEDIES:
        remedy = f"it must {REMEDIES[error['type']].format(**error.get('ctx', {}))}"
    else:
        remedy = error["msg"]
    return f"{at} is {_shown(at, error)}: {remedy}"


def _path(*loc: int | str) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")


def _shown(at: str, error: ErrorDetails) -> str:
    """The value as a message shows it: shortened, and hidden where it is, or may be a misplaced, secret."""
    value = error["input"]
    misplaced = error["type"] in ("dataclass_type", "tuple_type")
    if isinstance(value, str) and (misplaced or at.endswith(SECRET) or "@" in value):
        return "a text that is not shown"
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    return reprlib.repr(value)
