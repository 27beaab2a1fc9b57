"""Help on a screen of 80 columns: every command in one whole line, every option with its default and variable."""

from collections.abc import Iterator
from typing import Any

import click
import pytest
import typer.main

from prefix_service.cli.app import app

_SCREEN = 80


def groups(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """A command, and if it is a group the commands below it."""
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from groups(below, (*path, name))


EVERY = dict(groups(typer.main.get_command(app)))


def shown(path: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> str:
    """The help of a command, as a terminal of 80 columns has it."""
    monkeypatch.setenv("COLUMNS", str(_SCREEN))
    parent = click.Context(EVERY[()], info_name="prefix-service", terminal_width=_SCREEN)
    for depth in range(1, len(path) + 1):
        parent = click.Context(EVERY[path[:depth]], info_name=path[depth - 1], parent=parent, terminal_width=_SCREEN)
    text: str = EVERY[path].get_help(parent)
    return text


@pytest.mark.parametrize("path", EVERY, ids=lambda path: " ".join(path) or "prefix-service")
def test_a_help_fits_the_screen(path: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """No line is longer, and no sentence is cut."""
    lines = shown(path, monkeypatch).splitlines()
    assert max(map(len, lines)) <= _SCREEN
    assert not [line for line in lines if line.endswith("...") and not line.startswith("Usage")]


@pytest.mark.parametrize("path", EVERY, ids=lambda path: " ".join(path) or "prefix-service")
def test_a_help_shows_defaults_and_variables(path: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every option that has one."""
    text = " ".join(shown(path, monkeypatch).split())
    for parameter in EVERY[path].params:
        if parameter.envvar:
            assert f"env var: {parameter.envvar}" in text, parameter.name
        if parameter.default not in (None, False, "", []) and not callable(parameter.default):
            assert f"default: {getattr(parameter.default, 'value', parameter.default)}" in text, parameter.name
        assert parameter.help or parameter.name == "help", parameter.name
