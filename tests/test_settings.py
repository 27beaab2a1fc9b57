"""The environment configures the service, and every setting is documented."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from prefix_service.cli.commands.serve import load_settings
from prefix_service.errors import InvalidInput
from prefix_service.settings import NOT_SETTINGS, Settings, unknown_variables
from tests.conftest import running_server
from tests.processes import lines_of
from tests.tables import TABLES, filled


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_of_the_pages_are_made_from_the_code(name: str) -> None:
    """`python -m tests.tables` would change nothing."""
    page, _ = TABLES[name]
    assert page.read_text() == filled(name)


def test_every_setting_says_what_it_is() -> None:
    """Every setting has a description."""
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_the_environment_is_read_when_settings_are_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each Settings has the environment of the moment in which it was made, not of the import."""
    monkeypatch.setenv("PREFIX_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("PREFIX_MAX_BATCH_SIZE", "7")
    assert (Settings().data_dir, Settings().max_batch_size) == (tmp_path, 7)
    monkeypatch.delenv("PREFIX_MAX_BATCH_SIZE")
    assert Settings().max_batch_size == 256


def test_settings_do_not_change() -> None:
    """Settings are frozen once they are made."""
    with pytest.raises(ValidationError):
        Settings().port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value"),
    [("PORT", "-1"), ("PORT", "65536"), ("WORKERS", "0"), ("MAX_BATCH_SIZE", "0"), ("DEVICE_BYTES", "x"), ("DEV", "2")],
)
def test_values_out_of_bounds(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """A value out of its bounds is refused."""
    monkeypatch.setenv(f"PREFIX_{name}", value)
    with pytest.raises(ValidationError):
        Settings()


@pytest.mark.parametrize(("text", "nbytes"), [("4GB", 4_000_000_000), ("20GiB", 20 << 30), ("4096", 4096)])
def test_sizes_take_units(monkeypatch: pytest.MonkeyPatch, text: str, nbytes: int) -> None:
    """Every budget and bound takes a size with a unit from the environment."""
    for name in (
        "DEVICE_BYTES",
        "RENDERING_BYTES",
        "WORK_BYTES",
        "BLOB_CACHE_BYTES",
        "MAX_REQUEST_BYTES",
        "MAX_UPLOAD_BYTES",
    ):
        monkeypatch.setenv(f"PREFIX_{name}", text)
    made = Settings()
    sizes = (made.device_bytes, made.rendering_bytes, made.work_bytes, made.blob_cache_bytes)
    assert {*sizes, made.max_request_bytes, made.max_upload_bytes} == {nbytes}


@pytest.mark.parametrize("text", ["s3://bucket", "s3://bucket/path", "s3://a.bucket-7/of/service_1/"])
def test_places_for_blobs(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """A bucket, and a path in it, can be named."""
    monkeypatch.setenv("PREFIX_BLOBS_URL", text)
    assert Settings().blobs_url == text


@pytest.mark.parametrize("text", ["", "bucket/path", "http://bucket", "s3://", "s3://B", "s3://bucket/?x", "s3:bucket"])
def test_what_is_no_place_for_blobs(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Whatever names no bucket is refused."""
    monkeypatch.setenv("PREFIX_BLOBS_URL", text)
    with pytest.raises(ValidationError, match="s3://bucket/path"):
        Settings()


def test_a_key_in_the_url_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys belong into AWS_… variables, and the error of `serve` does not repeat one."""
    monkeypatch.setenv("PREFIX_BLOBS_URL", "s3://id:geheim@bucket/path")
    with pytest.raises(InvalidInput, match="PREFIX_BLOBS_URL: the URL must not contain a key") as caught:
        load_settings({})
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize("text", ["4 gigs", "4,5GB", "0GiB", "-4GB"])
def test_what_is_no_size(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """A size that cannot be read is refused, never read in part."""
    monkeypatch.setenv("PREFIX_DEVICE_BYTES", text)
    with pytest.raises(ValidationError):
        Settings()


_LINKS = {
    "PREFIX_PORT": "tcp://10.96.0.1:8080",  # of a Service named `prefix`: the name of a setting
    "PREFIX_SERVICE_HOST": "10.96.0.1",
    "PREFIX_SERVICE_PORT": "8080",
    "PREFIX_PORT_8080_TCP": "tcp://10.96.0.1:8080",
    "PREFIX_METRICS_PORT": "tcp://10.96.0.1:9000",  # of one named `prefix-metrics`
    "PREFIX_SERVICE_SERVICE_HOST": "10.96.0.1",  # of one named `prefix-service`
    "PREFIX_SERVICE_SERVICE_PORT": "8080",
    "PREFIX_SERVICE_SERVICE_PORT_HTTP": "8080",
    "PREFIX_SERVICE_PORT_8080_TCP": "tcp://10.96.0.1:8080",
    "PREFIX_SERVICE_PORT_8080_TCP_PROTO": "tcp",
    "PREFIX_SERVICE_PORT_8080_TCP_PORT": "8080",
    "PREFIX_SERVICE_PORT_8080_TCP_ADDR": "10.96.0.1",
}
"""The variables that Kubernetes sets for Services whose names begin with `prefix`; PREFIX_SERVICE_PORT has two
meanings, by whichever Service came last."""


def test_unknown_variables_are_named_with_what_they_may_have_meant() -> None:
    """A misspelt setting is reported, in any case of letters; known names and service links are not."""
    known = {
        "PREFIX_PORT": "8080",
        "prefix_port": "8080",
        "PREFIX": "x",
        "PATH": "/bin",
        **dict.fromkeys(NOT_SETTINGS, "x"),
    }
    assert unknown_variables({**known, **_LINKS, "PREFIX_SERVICE_PORT": "tcp://10.96.0.1:80"}.items()) == []
    assert unknown_variables(_LINKS.items()) == []
    wrong = {"PREFIX_DEVICE_BYTE": "4GB", "prefix_wokers": "2", "PREFIX_QUACK": "1", "PREFIX_UDS_PORT": "1"}
    assert unknown_variables(wrong.items()) == [
        ("PREFIX_DEVICE_BYTE", "PREFIX_DEVICE_BYTES"),
        ("PREFIX_QUACK", None),
        ("PREFIX_UDS_PORT", None),
        ("prefix_wokers", "PREFIX_WORKERS"),
    ]


def test_service_links_set_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The links of a Kubernetes Service named `prefix` do not change the port."""
    for name, value in _LINKS.items():
        monkeypatch.setenv(name, value)
    assert (Settings().port, Settings().metrics_port) == (8080, None)


def test_serve_warns_of_a_variable_that_is_no_setting(tmp_path: Path) -> None:
    """The service runs, and its log warns once of the variable by name."""
    environment = {"PREFIX_DEVICE_BYTE": "4GB", "PREFIX_SERVICE_PORT": "tcp://10.0.0.1:80"}
    with running_server(tmp_path / "data", environment=environment) as server:
        hint = "no setting has this name, so it changes nothing: did you mean PREFIX_DEVICE_BYTES?"
        (line,) = lines_of(server.log, hint)
        assert (line["level"], line["variable"]) == ("warning", "PREFIX_DEVICE_BYTE")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])  # noqa: S104 - it is refused
def test_dev_mode_stays_on_loopback(host: str) -> None:
    """Without keys the service listens only on loopback or on a Unix socket."""
    with pytest.raises(ValidationError, match="loopback"):
        Settings(dev=True, host=host)
    for loopback in ("127.0.0.1", "::1", "localhost"):
        assert Settings(dev=True, host=loopback).dev
    assert Settings(dev=True, host=host, uds=Path("socket")).dev


def test_the_secret_is_in_the_data_folder_unless_told(tmp_path: Path) -> None:
    """A service has its own secret in the data folder; replicas share one by a file."""
    assert Settings(data_dir=tmp_path).secret_file == tmp_path / "key.secret"
    assert Settings(data_dir=tmp_path, key_secret_file=tmp_path / "s").secret_file == tmp_path / "s"


SERVER = "postgresql+psycopg://someone:hunter2@db.example/prefix"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("hunter2", "has no ://"),
        ("postgres://someone:hunter2@db/prefix", r"begin it with postgresql\+psycopg:// instead of postgres://"),
        ("mysql://someone:hunter2@db/prefix", r"only postgresql\+psycopg:// is supported, not 'mysql'"),
        ("postgresql+psycopg://someone:hunter2@db:x/prefix", "the port is a number"),
        ("postgresql+psycopg://someone:hunter2@db", "names no database"),
        ("postgresql+psycopg://someone:hunter@2@db/prefix", "as in p%40ss"),
    ],
)
def test_what_is_wrong_with_a_catalogs_url(monkeypatch: pytest.MonkeyPatch, url: str, said: str) -> None:
    """The message says it, and never shows the URL, which may have a password; nor does any other form of the error."""
    monkeypatch.setenv("PREFIX_CATALOG_URL", url)
    monkeypatch.setenv("PREFIX_KEY_SECRET_FILE", "secret")
    with pytest.raises(InvalidInput, match=f"^PREFIX_CATALOG_URL: .*{said}") as told:
        load_settings({})
    assert "hunter" not in str(told.value) + str(told.value.__cause__)


def test_a_catalogs_url_is_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings do not show it, and it needs a secret that all replicas have."""
    monkeypatch.setenv("PREFIX_CATALOG_URL", f"{SERVER}?sslmode=verify-full")
    with pytest.raises(InvalidInput, match="openssl rand -hex 32") as told:
        load_settings({})
    monkeypatch.setenv("PREFIX_KEY_SECRET_FILE", "secret")
    assert "hunter2" not in repr(load_settings({})) + str(told.value) + str(told.value.__cause__)


@pytest.mark.parametrize("address", ["10.0.0.5:8080", "ftp://a", "http://a/b", "http://a:99999", "http://u:p@a"])
def test_what_is_no_address(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """An advertised address is one at which a client can be pointed."""
    monkeypatch.setenv("PREFIX_ADVERTISE", address)
    with pytest.raises(InvalidInput, match="PREFIX_ADVERTISE: an address "):
        load_settings({})
    monkeypatch.setenv("PREFIX_ADVERTISE", "https://replica-1.example.org:8443/")
    assert load_settings({}).advertise == "https://replica-1.example.org:8443"


def test_the_parser_is_the_fast_one_where_only_this_machine_comes_in() -> None:
    """The fast parser serves loopback and Unix sockets, and h11 other hosts, unless one is chosen."""
    assert {Settings(host=host).parser for host in ("127.0.0.1", "::1", "localhost")} == {"httptools"}
    assert {Settings(host=host).parser for host in ("0.0.0.0", "::", "192.0.2.1")} == {"h11"}  # noqa: S104
    assert Settings(host="192.0.2.1", uds=Path("socket")).parser == "httptools"
    assert Settings(host="192.0.2.1", http_parser="httptools").parser == "httptools"
    assert Settings(http_parser="h11").parser == "h11"
