"""`deploy`: files to copy, for what runs the service or looks at it."""

import sys
from enum import StrEnum
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Final

import typer

from prefix_service.cli.console import print_json
from prefix_service.cli.files import check_output, written
from prefix_service.cli.options import Json


class Deployed(StrEnum):
    """The programs that the package has a file for."""

    SYSTEMD = "systemd"
    NGINX = "nginx"
    HAPROXY = "haproxy"
    KUBERNETES = "kubernetes"
    KUBERNETES_FLEET = "k8s-fleet"
    PROMETHEUS = "prometheus"
    ALERTS = "alerts"
    GRAFANA = "grafana"
    GRAFANA_VLLM = "grafana-vllm"


_FILES: Final = {
    Deployed.SYSTEMD: "prefix-service.service",
    Deployed.NGINX: "nginx.conf",
    Deployed.HAPROXY: "haproxy.cfg",
    Deployed.KUBERNETES: "kubernetes.yaml",
    Deployed.KUBERNETES_FLEET: "kubernetes-fleet.yaml",
    Deployed.PROMETHEUS: "prometheus.yml",
    Deployed.ALERTS: "alerts.yml",
    Deployed.GRAFANA: "grafana.json",
    Deployed.GRAFANA_VLLM: "grafana-vllm.json",
}

_NAMES: Final = f"What the file is for: {', '.join(Deployed)}. Alerts are rules for Prometheus."


def _deployed(name: str) -> Deployed:
    # Not by the argument's type: its help would have all names in one line, which is longer than a screen.
    try:
        return Deployed(name)
    except ValueError as error:
        raise typer.BadParameter(f"{name!r:.80} is none of {', '.join(Deployed)}") from error


def register(app: typer.Typer) -> None:
    """Add this command to the command line."""
    app.command()(deploy)


def deploy(
    name: Annotated[str, typer.Argument(help=_NAMES, autocompletion=lambda: list(Deployed))],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; default: print.")] = None,
    as_json: Json = False,
) -> None:
    """Print a configuration file to copy."""
    deployed = _deployed(name)
    if output is not None:
        check_output(output)
    text = files("prefix_service").joinpath("deploy", _FILES[deployed]).read_text()
    if output is not None:
        with written(output) as aside:
            aside.write_text(text)
        if as_json:
            print_json({"path": str(output)})
    elif as_json:
        print_json({"name": _FILES[deployed], "text": text})
    else:
        sys.stdout.write(text)
