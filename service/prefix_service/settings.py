"""The settings of the service with their defaults; each is an environment variable with the prefix `PREFIX_`."""

import contextlib
import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from prefix_service.errors import InvalidInput
from prefix_service.logs import LogLevel
from prefix_service.system.sizes import EXAMPLES, parse_bytes

_MIB = 1 << 20
_GIB = 1 << 30
_PREFIX: Final = "PREFIX_"
_BUCKET: Final = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9_./-]*)?")
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})

NOT_SETTINGS: Final = {
    "PREFIX_URL": "where the client's commands and `PrefixClient` find the service",
    "PREFIX_API_KEY": "the key that they send",
    "PREFIX_IMAGE": "the image that docker-compose.yml starts",
    "PREFIX_PUBLISH": "the address and port that docker-compose.yml publishes",
    "PREFIX_FLEET_PUBLISH": "those that it publishes for a fleet",
    "PREFIX_TEST_IMAGE": "whether the tests build the image",
    "PREFIX_TEST_INSTALL": "whether the tests install the package in a fresh clone",
}
"""Variables with the settings' prefix that the service does not read, each with its reader and purpose."""

# Kubernetes adds these variables to every container for each Service in its namespace; these are of Services named
# `prefix…`, such as `prefix-service`: PREFIX_SERVICE_SERVICE_HOST, PREFIX_SERVICE_PORT=tcp://10.0.0.1:8080, …
_LINK_NAME: Final = re.compile(
    r"PREFIX_(\w+_)?(SERVICE_(HOST|PORT(_\w+)?)|PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_LINK_VALUE: Final = re.compile(r"(tcp|udp|sctp)://")


def _bytes(value: object) -> object:
    """Returns the bytes that a text names, and any other value unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return parse_bytes(value)
    except InvalidInput as error:
        raise ValueError(f"a size is written as in {EXAMPLES}") from error


Size = Annotated[int, BeforeValidator(_bytes), Field(gt=0)]
"""A number of bytes; in the environment with or without a unit."""


def _catalog_url(value: SecretStr) -> SecretStr:
    """Returns the URL of a catalog unchanged, or raises ValueError without it, since it may have a password."""
    from prefix_service.catalog.url import require_url  # SQLAlchemy takes a tenth of a second

    try:
        require_url(value.get_secret_value())
    except InvalidInput as error:
        raise ValueError(error.message) from None
    return value


def _address(value: str) -> str:
    """Returns the address of a service without a slash at its end."""
    parts, is_address = urlsplit(value), False
    with contextlib.suppress(ValueError):  # the port is no number, or too large
        has_host = bool(parts.hostname) and parts.port != 0
        is_address = has_host and parts.scheme in ("http", "https") and parts.path in ("", "/") and not parts.query
    if not is_address:
        raise ValueError("an address is written as http://10.0.0.5:8080 or https://prefix-1.example.org")
    if parts.username is not None:
        raise ValueError("an address has no user and no password: platform admins and logs see it")
    return value.rstrip("/")


class Settings(BaseSettings):
    """The configuration of one service, read once from the environment, and immutable."""

    # Inputs are hidden because a value can be secret.
    model_config = SettingsConfigDict(env_prefix="PREFIX_", frozen=True, extra="ignore", hide_input_in_errors=True)

    host: Annotated[str, Field(description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="TCP port to listen on")] = 8080
    uds: Annotated[Path | None, Field(description="Unix socket to listen on instead of TCP")] = None
    data_dir: Annotated[Path, Field(description="folder of the catalog, the blobs and the keys' secret")] = Path("data")
    blobs_url: Annotated[
        str | None,
        Field(
            description="`s3://bucket/path` that holds the blobs instead of the data folder; server and keys come from "
            "the usual `AWS_…` variables"
        ),
    ] = None
    blob_cache_bytes: Annotated[
        Size, Field(description="most bytes of copies of blobs in the data folder, with `PREFIX_BLOBS_URL`")
    ] = 10 * _GIB
    workers: Annotated[int, Field(ge=1, le=64, description="processes that serve the same data folder")] = 1
    dev: Annotated[bool, Field(description="no keys, every caller may do everything; on loopback only")] = False
    read_only: Annotated[
        bool, Field(description="serve what the data folder holds and change nothing, as on a read-only mount")
    ] = False
    device: Annotated[str, Field(description="where prefixes are encoded and kept: auto, cpu, cuda or cuda:1")] = "auto"
    key_secret_file: Annotated[
        Path | None, Field(description="secret that keys are hashed with; made in the data folder when absent")
    ] = None
    catalog_url: Annotated[
        Annotated[SecretStr, AfterValidator(_catalog_url)] | None,
        Field(
            description="PostgreSQL database of the catalog, `postgresql+psycopg://user:password@host/database`; "
            "SQLite in the data folder when absent"
        ),
    ] = None
    advertise: Annotated[
        Annotated[str, AfterValidator(_address)] | None,
        Field(description="address at which clients reach this replica, such as `http://10.0.0.5:8080`"),
    ] = None
    device_bytes: Annotated[
        Size, Field(description="budget of each process for prefixes on the device; a request may hold half")
    ] = 4 * _GIB
    rendering_bytes: Annotated[
        Size,
        Field(description="budget of each process for prefixes in host memory as they travel; a request may hold half"),
    ] = 2 * _GIB
    shared_dir: Annotated[
        Path | None,
        Field(description="folder in memory for files that workers on the Unix socket map instead of receiving"),
    ] = None
    work_bytes: Annotated[
        Size, Field(description="memory of work in progress of each process; a request may take half")
    ] = 4 * _GIB
    max_in_flight: Annotated[
        int,
        Field(
            gt=0,
            description="requests that a process answers at a time; beside them a sixteenth as many on the public "
            "pages, without a key",
        ),
    ] = 2048
    max_in_flight_tenant: Annotated[int, Field(gt=0, description="requests of one tenant among them")] = 512
    max_connections: Annotated[
        int, Field(gt=0, description="connections of a process; fewer if the limit of open files has no room for them")
    ] = 8192
    max_watchers: Annotated[
        int,
        Field(
            gt=0,
            description="callers of a process that follow changes or live numbers, beside its requests; a quarter may "
            "be of one tenant",
        ),
    ] = 4096
    garbage_grace: Annotated[
        float, Field(ge=1, description="seconds that the bytes of what was deleted, or never finished, stay")
    ] = 3600
    audit_days: Annotated[int, Field(ge=1, le=36_500, description="days that the audit keeps a change")] = 365
    changes_days: Annotated[
        int, Field(ge=1, le=36_500, description="days that changes are kept for processes and watchers that were away")
    ] = 7
    usage_days: Annotated[int, Field(ge=1, le=36_500, description="days that usage by hour is kept")] = 90
    http_parser: Annotated[
        Literal["auto", "httptools", "h11"],
        Field(description="httptools or h11; auto: httptools on loopback and Unix sockets, h11 elsewhere"),
    ] = "auto"
    receive_timeout: Annotated[
        float, Field(gt=0, description="seconds for a request's head, for its body, and for an upload without progress")
    ] = 30
    send_timeout: Annotated[
        float, Field(gt=0, description="seconds after which a reader that does not read is cut off")
    ] = 60
    max_batch_size: Annotated[int, Field(ge=1, le=65536, description="largest batch_size of a request")] = 256
    max_sequence_length: Annotated[
        int, Field(ge=1, description="longest row of an attention_mask in a request, in tokens")
    ] = 131_072
    max_request_bytes: Annotated[Size, Field(description="largest request body that is not an upload")] = 64 * _MIB
    max_upload_bytes: Annotated[Size, Field(description="largest weights file")] = 2 * _GIB

    log_level: Annotated[
        LogLevel,
        Field(
            description="lowest level that is logged: debug, info, warning or error; health and metrics are at debug"
        ),
    ] = "info"
    metrics_port: Annotated[
        int | None, Field(ge=1, le=65535, description="TCP port that serves /metrics without a key, on the same host")
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _without_service_links(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Drops the variables that Kubernetes sets for a Service named `prefix`: PREFIX_PORT=tcp://10.0.0.1:8080."""
        return {name: value for name, value in given.items() if not _is_link(value)}

    @field_validator("blobs_url")
    @classmethod
    def _names_a_bucket(cls, url: str | None) -> str | None:
        if url is not None and "@" in url:
            raise ValueError("the URL must not contain a key: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        if url is not None and not _BUCKET.fullmatch(url):
            raise ValueError("a place for blobs is written as in s3://bucket/path")
        return url

    @model_validator(mode="after")
    def _dev_stays_at_home(self) -> Self:
        if self.dev and self.uds is None and self.host not in LOOPBACK:
            raise ValueError(f"dev mode has no keys, so it listens on loopback only, not on {self.host}")
        return self

    @model_validator(mode="after")
    def _replicas_share_a_secret(self) -> Self:
        if self.catalog_url is not None and self.key_secret_file is None:
            raise ValueError(
                "PREFIX_CATALOG_URL needs PREFIX_KEY_SECRET_FILE, a file with the same secret on every replica: make "
                "it once with `openssl rand -hex 32`"
            )
        return self

    @property
    def parser(self) -> Literal["httptools", "h11"]:
        """The HTTP parser: unless one is chosen, the fast one if only this machine can connect, else the strict one."""
        if self.http_parser != "auto":
            return self.http_parser
        return "httptools" if self.uds or self.host in LOOPBACK else "h11"

    @property
    def secret_file(self) -> Path:
        """The path of the secret that keys are hashed with."""
        return self.key_secret_file or self.data_dir / "key.secret"


def variable(name: str) -> str:
    """Returns the environment variable of a setting."""
    return _PREFIX + name.upper()


def is_secret(name: str) -> bool:
    """Returns whether the value of a setting must not be shown: a URL can contain a password."""
    return name.endswith("_url")


def unknown_variables(environment: Iterable[tuple[str, str]]) -> list[tuple[str, str | None]]:
    """Returns variables with the settings' prefix that nothing reads, each with the setting that may be meant.

    Variables in `NOT_SETTINGS` and Kubernetes' service links are left out.
    """
    known = {variable(name) for name in Settings.model_fields} | NOT_SETTINGS.keys()
    unknown = sorted(
        name
        for name, value in environment
        if name.upper().startswith(_PREFIX)
        and name.upper() not in known
        and not _LINK_NAME.fullmatch(name)
        and not _is_link(value)
    )
    return [(name, _meant(name)) for name in unknown]


def _meant(name: str) -> str | None:
    """Returns the variable of the most similar setting; None if no setting is similar."""
    near = get_close_matches(name[len(_PREFIX) :].lower(), Settings.model_fields, n=1, cutoff=0.7)
    return variable(near[0]) if near else None


def _is_link(value: object) -> bool:
    return isinstance(value, str) and _LINK_VALUE.match(value) is not None
