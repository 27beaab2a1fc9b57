"""Gives the suites of the Open Inference Protocol tritonclient with a key, and its inputs."""

from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import tritonclient.http as triton

from tests.conftest import Server


class Keyed:
    """tritonclient's blocking client, with a key on every request."""

    def __init__(self, server: Server, key: str) -> None:
        self._client = triton.InferenceServerClient(urlsplit(server.url).netloc)
        self._key = key

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)
        return lambda *args, **kwargs: method(*args, headers={"Authorization": f"Bearer {self._key}"}, **kwargs)

    def close(self) -> None:
        """Closes its connections."""
        self._client.close()


def rows(count: int, *, binary: bool = True) -> Any:
    """Returns the input `batch_size`."""
    value = triton.InferInput("batch_size", [1], "INT32")
    return value.set_data_from_numpy(np.array([count], np.int32), binary_data=binary)


def masked(mask: list[list[int]], *, binary: bool = True) -> Any:
    """Returns the input `attention_mask`."""
    array = np.array(mask, np.int64)
    return triton.InferInput("attention_mask", list(array.shape), "INT64").set_data_from_numpy(
        array, binary_data=binary
    )
