"""Skips tests whose programs, or whose GPU, a machine lacks."""

import os
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import pytest
import torch

_Test = TypeVar("_Test", bound=Callable[..., Any])


def not_tested(reason: str) -> NoReturn:
    """Skips this test loudly; in CI, where everything is available, it fails."""
    (pytest.fail if "CI" in os.environ else pytest.skip)(f"NOT TESTED: {reason}")
    raise AssertionError("unreachable")


def needs_cuda(test: _Test) -> _Test:
    """Skips a test where there is no NVIDIA GPU, which CI has not; `bash tests/gpu/run` runs them all on one."""
    without_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: bash tests/gpu/run")
    marked: _Test = pytest.mark.cuda(without_gpu(test))
    return marked
