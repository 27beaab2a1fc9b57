"""The configuration: what the environment may say, and that all of it is documented."""

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from prefix_service.settings import Settings

README = Path(__file__).parents[1] / "README.md"
_ROW = re.compile(r"^\|\s*`(PREFIX_[A-Z_]+)`\s*\|\s*(?:`([^`]*)`|[^|`]*)\s*\|\s*(\S[^|]*)\|", re.MULTILINE)


def _documented() -> dict[str, str]:
    """The README's configuration table: `PREFIX_NAME` | `default`, or nothing in backquotes for none | what it is."""
    return {name: default for name, default, _ in _ROW.findall(README.read_text())}


def _written(default: Any) -> str:
    """A default as an environment variable would hold it; empty for none."""
    if default is None:
        return ""
    return str(default).lower() if isinstance(default, bool) else str(default)


def test_every_setting_is_in_the_readme() -> None:
    """The README's table has exactly the settings that there are, with their defaults."""
    settings = {f"PREFIX_{name.upper()}": _written(field.default) for name, field in Settings.model_fields.items()}
    assert _documented() == settings


def test_every_setting_says_what_it_is() -> None:
    """A setting has a description."""
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_the_environment_is_read_when_settings_are_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not at import: each Settings sees the environment of its own moment."""
    monkeypatch.setenv("PREFIX_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("PREFIX_MAX_BATCH_SIZE", "7")
    assert (Settings().data_dir, Settings().max_batch_size) == (tmp_path, 7)
    monkeypatch.delenv("PREFIX_MAX_BATCH_SIZE")
    assert Settings().max_batch_size == 256


def test_settings_do_not_change() -> None:
    """Read once, then frozen."""
    with pytest.raises(ValidationError):
        Settings().port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value"),
    [("PORT", "-1"), ("PORT", "65536"), ("WORKERS", "0"), ("MAX_BATCH_SIZE", "0"), ("DEVICE_BYTES", "x"), ("DEV", "2")],
)
def test_values_out_of_bounds(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """A value that makes no sense is refused."""
    monkeypatch.setenv(f"PREFIX_{name}", value)
    with pytest.raises(ValidationError):
        Settings()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])  # noqa: S104 - it is refused
def test_dev_mode_stays_on_loopback(host: str) -> None:
    """Without keys the service listens on loopback, or on a Unix socket."""
    with pytest.raises(ValidationError, match="loopback"):
        Settings(dev=True, host=host)
    for loopback in ("127.0.0.1", "::1", "localhost"):
        assert Settings(dev=True, host=loopback).dev
    assert Settings(dev=True, host=host, uds=Path("socket")).dev


def test_the_secret_is_in_the_data_folder_unless_told(tmp_path: Path) -> None:
    """Replicas share a secret by a file; one machine alone makes its own."""
    assert Settings(data_dir=tmp_path).secret_file == tmp_path / "key.secret"
    assert Settings(data_dir=tmp_path, key_secret_file=tmp_path / "s").secret_file == tmp_path / "s"


def test_the_parser_is_the_fast_one_where_only_this_machine_comes_in() -> None:
    """Unless one is chosen."""
    assert {Settings(host=host).parser for host in ("127.0.0.1", "::1", "localhost")} == {"httptools"}
    assert {Settings(host=host).parser for host in ("0.0.0.0", "::", "192.0.2.1")} == {"h11"}  # noqa: S104
    assert Settings(host="192.0.2.1", uds=Path("socket")).parser == "httptools"
    assert Settings(host="192.0.2.1", http_parser="httptools").parser == "httptools"
    assert Settings(http_parser="h11").parser == "h11"
