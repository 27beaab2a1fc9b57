"""Base models on this machine, loaded by transformers without its own output; imports nothing of it until then."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Any, Final

from prefix_service.errors import InvalidRequest

_NAME: Final = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
"""A model on Hugging Face: `name` or `owner/name`."""


class Dtype(StrEnum):
    """The dtype in which a model computes."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def auto_class(name: str) -> Any:
    """Returns one of transformers' classes that load by a folder or a name."""
    import transformers

    return getattr(transformers, name)


def load_model(name: str, dtype: Dtype | None, device: str) -> Any:
    """Returns a causal language model on a device, by default in the dtype of its weights."""
    found = auto_class("AutoModelForCausalLM").from_pretrained(name, dtype="auto" if dtype is None else dtype.value)
    return found.to(device)


def loaded(name: str, load: Callable[[], Any]) -> Any:
    """Returns what transformers loads for the model `name`: a folder, or a name on Hugging Face.

    Raises:
        InvalidRequest: it cannot, or `name` is neither a folder nor a possible name on Hugging Face, which transformers
            would ask for a minute all the same.
    """
    # Of a name that is too long, pathlib would raise what the system says.
    if _NAME.fullmatch(name) is None and not os.path.isdir(name):  # noqa: PTH112
        raise InvalidRequest(f"the model {name:.300} cannot be loaded: there is no such folder; check the path")
    try:
        return load()
    except (
        OSError,
        ValueError,
        RuntimeError,
        AssertionError,
        ImportError,
    ) as error:  # torch asserts that there is CUDA
        reason = " ".join(str(error).split())
        raise InvalidRequest(f"the model {name} cannot be loaded: {reason:.500}") from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps bars and warnings of transformers, and of the hub's client, from the terminal: the command shows what
    matters.
    """
    from huggingface_hub.utils import logging as module_of_hub
    from transformers import logging as module

    logging: Any = module
    hub: Any = module_of_hub
    verbosity, of_hub = logging.get_verbosity(), hub.get_verbosity()
    logging.set_verbosity_error()
    hub.set_verbosity_error()  # without a network it would write each of its retries
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        hub.set_verbosity(of_hub)
        logging.enable_progress_bar()
