"""Reads files of a vLLM as it is published, without its other hundreds of megabytes."""

import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import fsspec

from tests.missing import not_tested

_FOR: Final = ("--only-binary", "vllm", "--platform", "manylinux_2_28_x86_64")
_BLOCK: Final = 1 << 16  # bytes that a request for a part asks for at least: 1.4 of 336 MB are read in all


def read_published(version: str, files: Iterable[str], folder: Path) -> None:
    """Writes those of these files that this version of the package vllm has into a folder. Skips the test loudly where
    pip's index cannot be reached.
    """
    with fsspec.open(_address(version), "rb", block_size=_BLOCK) as remote, zipfile.ZipFile(remote) as wheel:
        wanted = {f"vllm/{file}" for file in files}
        wheel.extractall(folder, wanted & set(wheel.namelist()))


def _address(version: str) -> str:
    """Returns the address of the wheel, which pip knows from its index and tells in its log alone: its report would
    download the wheel.
    """
    pip = [sys.executable, "-m", "pip", "index", "versions", "vllm", *_FOR, "-vv", "--disable-pip-version-check"]
    told = subprocess.run(pip, check=False, capture_output=True, text=True)
    found = re.search(rf"Found link ([^\s#]+\.whl)\S* .*, version: {re.escape(version)}$", told.stdout, re.MULTILINE)
    if found is None:
        not_tested(f"pip's index has no wheel of vLLM {version}, or cannot be reached: {told.stderr[-300:]}")
    return found[1]
