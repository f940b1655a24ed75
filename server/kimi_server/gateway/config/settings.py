"""gateway.yaml -> frozen `Settings`, or one sentence that names the field, its value and the remedy."""

import dataclasses
import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

import httpx
from pydantic import AfterValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from kimi_server.gateway.config.fields import (
    CONFIG,
    Fields,
    HeaderSecret,
    Seconds,
    Switch,
    Text,
    Whole,
    build,
    must,
    wrong,
)
from kimi_server.gateway.config.yaml_file import SettingsError as SettingsError
from kimi_server.gateway.config.yaml_file import parse, read_bytes

HOST = re.compile(r"[^\s%]+")
FILES = ("keys", "model_config", "ssl_certfile", "ssl_keyfile")  # settings that name one
API_KEY_VARIABLE = "VLLM_API_KEY"  # as `vllm serve` reads it


def _replica_url(text: str) -> str:
    """A URL as the HTTP client understands it, without what every path begins with: a last `/` and `/v1`."""
    if "@" in text:
        raise must("hold no user or password: give api_key instead")
    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, ValueError):
        raise must("be a URL such as http://127.0.0.1:8000") from None
    _http(text)
    if not HOST.fullmatch(_host(url.host)):
        raise must("name a host, as http://127.0.0.1:8000")
    if url.port is not None and not 1 <= url.port <= 65535:
        raise must("have a port from 1 to 65535")
    if url.query or url.fragment or "?" in text or "#" in text:
        raise must("hold neither ? nor #")
    return str(url).rstrip("/").removesuffix("/v1").rstrip("/")


def _http(text: str) -> str:
    if not text.lower().startswith(("http://", "https://")):
        raise must("begin with http:// or https://")
    return text


def _host(text: str) -> str:
    try:
        text.encode("idna")  # as the socket does
    except UnicodeError:
        raise must("be an address or the name of a host") from None
    return text


Host = Annotated[Text, AfterValidator(_host)]
Port = Annotated[Whole, Field(ge=0, le=65535)]


@dataclass(frozen=True, config=CONFIG)
class ReplicaSettings(Fields):
    url: Annotated[Text, AfterValidator(_replica_url)]
    data_parallel_rank: Whole | None = Field(default=None, ge=0)
    api_key: HeaderSecret | None = None  # sent to this replica in place of the client's


def _place(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not HOST.fullmatch(_host(host)) or not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65535:
        raise must("be a host and a port, as prefill-0:5710")
    return text


@dataclass(frozen=True, config=CONFIG)
class PrefillSettings(ReplicaSettings):
    """A server that reads long prompts for the replicas; `p2p` is host:port of its P2P tier, as they reach it."""

    p2p: Annotated[Text, AfterValidator(_place)] = Field(kw_only=True)

    @property
    def place(self) -> tuple[str, int]:
        host, _, port = self.p2p.rpartition(":")
        return host.strip("[]"), int(port)


@dataclass(frozen=True, config=CONFIG)
class AdmissionSettings(Fields):
    """The unit of sizes is prompt tokens."""

    prefill_tokens: Whole = Field(default=131072, ge=2)
    short_prompt: Whole = Field(default=4096, ge=1)
    short_reserve: Whole = Field(default=16384, ge=1)
    queue: Whole = Field(default=256, ge=0)
    deadline_seconds: Seconds = Field(default=120, ge=0.01)

    @model_validator(mode="after")
    def _fit(self) -> "AdmissionSettings":
        if self.short_prompt > self.short_reserve:
            raise wrong(
                f"short_prompt is {self.short_prompt}, more than short_reserve, {self.short_reserve}: a short prompt "
                "must fit into the reserve"
            )
        if self.short_reserve >= self.prefill_tokens:
            raise wrong(
                f"short_reserve is {self.short_reserve}: it must be less than prefill_tokens, {self.prefill_tokens}, "
                "or no long prompt is ever let in"
            )
        return self


@dataclass(frozen=True, config=CONFIG)
class LimitSettings(Fields):
    body_bytes: Whole = Field(default=64 << 20, ge=1)
    bodies_bytes: Whole = Field(default=256 << 20, ge=1)  # of all bodies held at once
    header_bytes: Whole = Field(default=16384, ge=256)
    header_seconds: Seconds = Field(default=10, ge=0.01)
    body_seconds: Seconds = Field(default=60, ge=0.01)
    client_seconds: Seconds = Field(default=60, ge=0.01)  # that a client may leave the bytes of its answer unread
    replica_seconds: Seconds = Field(default=3600, ge=0.01)  # of a replica's silence, a long prefill included


@dataclass(frozen=True, config=CONFIG)
class Settings(Fields):
    replicas: tuple[ReplicaSettings, ...]
    prefill: tuple[PrefillSettings, ...] = ()
    host: Host = "127.0.0.1"
    port: Port = 8080
    metrics_host: Host = "127.0.0.1"
    metrics_port: Port | None = 9464  # None: on the port of the API, for keys that may read them
    keys: Path | None = None
    cache_salt: Switch | None = None  # None: where there are keys of different owners
    model_config: Path | None = None
    admission: AdmissionSettings = AdmissionSettings()
    limits: LimitSettings = LimitSettings()
    drain_seconds: Seconds = Field(default=60, ge=0)
    max_model_len: Whole | None = Field(default=None, ge=1)
    cors_origins: tuple[Text, ...] = ()  # of pages elsewhere that may ask; "*" is any
    ssl_certfile: Path | None = None  # with both, the port of the API speaks TLS
    ssl_keyfile: Path | None = None
    otlp_traces_endpoint: Annotated[Text, AfterValidator(_http)] | None = None  # takes a span a request

    @model_validator(mode="after")
    def _fit(self) -> "Settings":
        if not self.replicas:
            raise wrong("replicas is empty: name at least one, as `- url: http://127.0.0.1:8000`")
        for field, servers in (("replicas", self.replicas), ("prefill", self.prefill)):
            if len({(one.url, one.data_parallel_rank) for one in servers}) < len(servers):
                raise wrong(f"{field} names one server twice: give each its own url or data_parallel_rank")
        if self.keys is None and not is_loopback(self.host):
            raise wrong(
                f"host is {self.host!r} and there are no keys, which would serve anybody: set `keys`, or keep host "
                "127.0.0.1"
            )
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            given, other = (
                ("ssl_certfile", "ssl_keyfile") if self.ssl_keyfile is None else ("ssl_keyfile", "ssl_certfile")
            )
            raise wrong(f"{given} is given and {other} is not: TLS needs both, give the other or leave both out")
        if self.metrics_port == self.port != 0:
            raise wrong(
                f"metrics_port is {self.port}, which is port, too: name another, or null for /metrics on that port"
            )
        return self


R = TypeVar("R", bound=ReplicaSettings)


def load(path: Path, **overrides: Any) -> Settings:
    """Read and check a configuration; `overrides` that are not None replace top-level fields of the file.

    Paths in the file are relative to it, those of `overrides` to the working directory. A replica without `api_key`
    gets that of the environment. Raises SettingsError.
    """
    given = parse(read_bytes(path), path)
    overrides = {name: value for name, value in overrides.items() if value is not None}
    given.update(overrides)
    settings = build(Settings, given, path)
    files = {name: getattr(settings, name) for name in FILES}
    return dataclasses.replace(
        settings,
        replicas=tuple(_with_key_of_the_environment(one) for one in settings.replicas),
        prefill=tuple(_with_key_of_the_environment(one) for one in settings.prefill),
        **{name: named and path.parent / named for name, named in files.items() if name not in overrides},
    )


def _with_key_of_the_environment(replica: R) -> R:
    key = os.environ.get(API_KEY_VARIABLE)
    if not key or replica.api_key:
        return replica
    given = {field.name: getattr(replica, field.name) for field in dataclasses.fields(replica)}
    return build(type(replica), {**given, "api_key": key}, f"{API_KEY_VARIABLE} of the environment")


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
