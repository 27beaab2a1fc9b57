"""Runs `python -m tests.chaos` in short: it checks bytes and losses, and leaves times to the command."""

from dataclasses import replace
from typing import Final

from tests.chaos.campaign import Row, campaign
from tests.chaos.faults import FAULTS

_SHORT: Final = 3.0  # seconds of each fault
_BETWEEN: Final = 0.1  # seconds; everything that is acknowledged is compared after each fault, so less is compared
_CHOSEN: Final = (
    "kill worker",
    "disk full",
    "blobs damaged",
    "catalog locked 5 s",
    "blob folder away",
    "kill supervisor",
)


def test_a_service_in_use_survives_faults() -> None:
    """A service survives a killed worker, a full disk, damaged and missing blobs, a locked catalog and a killed
    supervisor. Whatever was acknowledged is there afterwards, and every answer was right.
    """
    with campaign(_BETWEEN) as running:
        for name in _CHOSEN:
            fault = next(fault for fault in FAULTS if fault.name == name)
            row = Row(fault)
            running.suffer(replace(fault, seconds=min(fault.seconds, _SHORT)), row)
            assert row.skipped or row.goes_on is not None, f"after {name} work did not go on"
        truth = running.truth
        assert (truth.wrong, truth.lost) == ([], [])
        assert truth.acknowledged > 0
