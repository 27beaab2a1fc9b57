"""What `doctor` finds."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Check:
    """A finding, and advice where it is not good. `failed` means that this machine cannot fetch prefixes."""

    name: str
    state: Literal["ok", "warning", "failed"]
    found: str
    advice: str = ""
