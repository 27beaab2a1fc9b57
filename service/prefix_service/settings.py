"""Every knob of the service, with its default; each is also an environment variable with the prefix `PREFIX_`."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from prefix_service.logs import LogLevel

_MIB = 1 << 20
_GIB = 1 << 30
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


class Settings(BaseSettings):
    """The configuration of one service, read once from the environment and never changed."""

    model_config = SettingsConfigDict(env_prefix="PREFIX_", frozen=True, extra="ignore")

    host: Annotated[str, Field(description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="TCP port to listen on")] = 8080
    uds: Annotated[Path | None, Field(description="Unix socket to listen on instead of TCP")] = None
    data_dir: Annotated[Path, Field(description="folder of the catalog, the blobs and the keys' secret")] = Path("data")
    workers: Annotated[int, Field(ge=1, le=64, description="processes that serve the same data folder")] = 1
    dev: Annotated[bool, Field(description="no keys, every caller may do everything; on loopback only")] = False
    read_only: Annotated[
        bool, Field(description="serve what the data folder holds and change nothing, as on a read-only mount")
    ] = False
    device: Annotated[str, Field(description="where prefixes are encoded and kept: auto, cpu, cuda or cuda:1")] = "auto"
    key_secret_file: Annotated[
        Path | None, Field(description="secret that keys are hashed with; made in the data folder when absent")
    ] = None
    device_bytes: Annotated[
        int,
        Field(gt=0, description="budget of each process for prefixes on the device, in bytes; a request may hold half"),
    ] = 4 * _GIB
    rendering_bytes: Annotated[
        int,
        Field(
            gt=0,
            description="budget of each process for prefixes in host memory as they travel, in bytes; a request may "
            "hold half",
        ),
    ] = 2 * _GIB
    shared_dir: Annotated[
        Path | None,
        Field(description="folder in memory for files that workers on the Unix socket map instead of receiving"),
    ] = None
    work_bytes: Annotated[
        int,
        Field(gt=0, description="memory of work in progress of each process, in bytes; a request may take half"),
    ] = 4 * _GIB
    max_in_flight: Annotated[int, Field(gt=0, description="requests that a process answers at a time")] = 2048
    max_in_flight_tenant: Annotated[int, Field(gt=0, description="requests of one tenant among them")] = 512
    max_connections: Annotated[
        int, Field(gt=0, description="connections of a process; fewer if the limit of open files has no room for them")
    ] = 8192
    garbage_grace: Annotated[
        float, Field(ge=1, description="seconds that the bytes of what was deleted, or never finished, stay")
    ] = 3600
    audit_days: Annotated[int, Field(ge=1, le=36_500, description="days that the audit keeps a change")] = 365
    usage_days: Annotated[int, Field(ge=1, le=36_500, description="days that usage by hour is kept")] = 90
    http_parser: Annotated[
        Literal["auto", "httptools", "h11"],
        Field(description="auto: httptools on loopback and Unix sockets, h11 elsewhere"),
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
    max_request_bytes: Annotated[
        int, Field(gt=0, description="largest request body that is not an upload, in bytes")
    ] = 64 * _MIB
    max_upload_bytes: Annotated[int, Field(gt=0, description="largest weights file, in bytes")] = 2 * _GIB

    log_level: Annotated[LogLevel, Field(description="debug, info, warning or error; health and metrics at debug")] = (
        "info"
    )
    metrics_port: Annotated[
        int | None, Field(ge=1, le=65535, description="TCP port that serves /metrics without a key, on the same host")
    ] = None

    @model_validator(mode="after")
    def _dev_stays_at_home(self) -> Self:
        if self.dev and self.uds is None and self.host not in LOOPBACK:
            raise ValueError(f"dev mode has no keys, so it listens on loopback only, not on {self.host}")
        return self

    @property
    def parser(self) -> Literal["httptools", "h11"]:
        """The HTTP parser: the fast one where only this machine comes in, unless one is chosen."""
        if self.http_parser != "auto":
            return self.http_parser
        return "httptools" if self.uds or self.host in LOOPBACK else "h11"

    @property
    def secret_file(self) -> Path:
        """Where the keys' secret is kept."""
        return self.key_secret_file or self.data_dir / "key.secret"
