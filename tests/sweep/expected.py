"""The expected outcome of each architecture, and why, from `expected.toml` beside this file."""

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
        """Whether that is what was found."""
        return verdict.outcome == self.outcome


def expected_outcomes() -> dict[str, Expected]:
    """By the architecture's name. An entry of the file is `<outcome>` or `<outcome>: <reason>`."""
    kinds = tomllib.loads((Path(__file__).parent / "expected.toml").read_text())
    return {
        f"{kind}/{label}": Expected(*entry.partition(": ")[::2])
        for kind, entries in kinds.items()
        for label, entry in entries.items()
    }
