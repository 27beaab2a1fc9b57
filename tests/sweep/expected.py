"""Reads the expected outcome of each architecture, and its reason, from `expected.toml` in this folder."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

from tests.sweep.verdict import Verdict


@dataclass(frozen=True)
class Expected:
    """An outcome, and the reason for one that is not `equal`."""

    outcome: str
    reason: str

    def is_met_by(self, verdict: Verdict) -> bool:
        """Returns whether the verdict has this outcome."""
        return verdict.outcome == self.outcome


def expected_outcomes() -> dict[str, Expected]:
    """Returns the outcomes by the architecture's name. An entry of the file is `<outcome>` or `<outcome>: <reason>`."""
    kinds = tomllib.loads((Path(__file__).parent / "expected.toml").read_text())
    return {
        f"{kind}/{label}": Expected(*entry.partition(": ")[::2])
        for kind, entries in kinds.items()
        for label, entry in entries.items()
    }
