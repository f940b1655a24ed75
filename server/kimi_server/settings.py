"""gateway.yaml -> frozen `Settings`, or one sentence that names the field, its value and the remedy."""

import dataclasses
import ipaddress
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

T = TypeVar("T")


class SettingsError(Exception):
    """A file that cannot be used; the message is one sentence."""


def least(value: float, default: Any = dataclasses.MISSING) -> Any:
    """A field whose value is at least `value`."""
    return field(default=default, metadata={"least": value})


@dataclass(frozen=True)
class ReplicaSettings:
    url: str
    data_parallel_rank: int | None = least(0, None)


@dataclass(frozen=True)
class AdmissionSettings:
    """The unit of sizes is prompt tokens."""

    prefill_tokens: int = least(2, 131072)
    short_prompt: int = least(1, 4096)
    short_reserve: int = least(1, 16384)
    queue: int = least(0, 256)
    deadline_seconds: float = least(0.01, 120)


@dataclass(frozen=True)
class LimitSettings:
    body_bytes: int = least(1, 64 << 20)
    bodies_bytes: int = least(1, 256 << 20)  # of all bodies held at once
    header_bytes: int = least(256, 16384)
    header_seconds: float = least(0.01, 10)
    body_seconds: float = least(0.01, 60)
    client_seconds: float = least(0.01, 60)  # that a client may leave the bytes of its answer unread
    replica_seconds: float = least(0.01, 3600)  # that a replica may be silent, the prefill of a long prompt included


@dataclass(frozen=True)
class Settings:
    replicas: tuple[ReplicaSettings, ...]
    host: str = "127.0.0.1"
    port: int = least(0, 8080)
    keys: Path | None = None
    model_config: Path | None = None
    admission: AdmissionSettings = AdmissionSettings()
    limits: LimitSettings = LimitSettings()
    drain_seconds: float = least(0, 60)
    max_model_len: int | None = least(1, None)
    cors_origins: tuple[str, ...] = ()  # of pages elsewhere that may ask; "*" is any


def load(path: Path, **overrides: Any) -> Settings:
    """Read and check a configuration; `overrides` that are not None replace top-level fields of the file.

    Paths in the file are relative to it. Raises SettingsError.
    """
    given = read_yaml(path)
    given.update({name: value for name, value in overrides.items() if value is not None})
    settings = build(Settings, given, str(path))
    settings = dataclasses.replace(
        settings,
        keys=settings.keys and path.parent / settings.keys,
        model_config=settings.model_config and path.parent / settings.model_config,
    )
    check(settings, path)
    return settings


def check(settings: Settings, path: Path) -> None:
    """Raise SettingsError for values that only together are wrong."""
    admission = settings.admission
    if not settings.replicas:
        raise SettingsError(f"{path}: replicas is empty: name at least one, as `- url: http://127.0.0.1:8000`.")
    for replica in settings.replicas:
        if not replica.url.startswith(("http://", "https://")):
            raise SettingsError(f"{path}: replicas.url is {replica.url!r}: it must begin with http:// or https://.")
    if len(set(settings.replicas)) < len(settings.replicas):
        raise SettingsError(f"{path}: replicas names one replica twice: give each its own url or data_parallel_rank.")
    if settings.port > 65535:
        raise SettingsError(f"{path}: port is {settings.port}: it must be at most 65535.")
    if admission.short_prompt > admission.short_reserve:
        raise SettingsError(
            f"{path}: admission.short_prompt is {admission.short_prompt}, more than admission.short_reserve, "
            f"{admission.short_reserve}: a short prompt must fit into the reserve."
        )
    if admission.short_reserve >= admission.prefill_tokens:
        raise SettingsError(
            f"{path}: admission.short_reserve is {admission.short_reserve}: it must be less than "
            f"admission.prefill_tokens, {admission.prefill_tokens}, or no long prompt is ever let in."
        )
    if settings.keys is None and not is_loopback(settings.host):
        raise SettingsError(
            f"{path}: host is {settings.host!r} and there are no keys, which would serve anybody: set `keys`, or keep "
            "host 127.0.0.1."
        )


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises SettingsError."""
    try:
        found = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(found, dict):
        raise SettingsError(f"{path} must hold a mapping of fields to values, not {type(found).__name__}.")
    return found


def build(kind: type[T], given: Mapping[str, Any], where: str) -> T:
    """A dataclass from a mapping of its fields; an unknown, missing or ill-typed field raises SettingsError.

    `where` is the file and the way into it, for messages.
    """
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]  # every kind is a dataclass
    if unknown := sorted(str(name) for name in given if name not in fields):
        raise SettingsError(f"{where}: there is no field {unknown[0]!r}: use one of {', '.join(fields)}.")
    values = {name: convert(hints[name], value, f"{where}: {name}") for name, value in given.items()}
    for name, one in fields.items():
        if name not in values:
            if one.default is dataclasses.MISSING:
                raise SettingsError(f"{where}: the field {name!r} is missing.")
            continue
        bound, value = one.metadata.get("least"), values[name]
        if bound is not None and value is not None and value < bound:
            raise SettingsError(f"{where}: {name} is {value}: it must be at least {bound}.")
    return kind(**values)


def convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint`, one of those that the dataclasses here use; raises SettingsError."""
    if isinstance(hint, types.UnionType):  # always `X | None`
        return None if value is None else convert(typing.get_args(hint)[0], value, where)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise SettingsError(f"{where} is {value!r}: it must be a list.")
        inner = typing.get_args(hint)[0]
        return tuple(convert(inner, item, f"{where}[{i}]") for i, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise SettingsError(f"{where} is {value!r}: it must be a mapping of fields.")
        return build(typing.cast(type, hint), value, where)
    accepted: Any
    accepted, name = {
        int: (int, "a whole number"),
        float: (int | float, "a number"),
        str: (str, "a text"),
        Path: (str, "a path"),
    }[hint]
    if isinstance(value, bool) or not isinstance(value, accepted) or (hint is float and not math.isfinite(value)):
        raise SettingsError(f"{where} is {value!r}: it must be {name}.")
    return hint(value)
