"""The short form of `python -m tests.chaos`: life, right bytes and nothing lost; times are for the command to judge."""

from dataclasses import replace
from typing import Final

from tests.chaos.campaign import Row, campaign
from tests.chaos.faults import FAULTS

_SHORT: Final = 3.0  # seconds of each fault
_CHOSEN: Final = (
    "kill worker",
    "disk full",
    "blobs damaged",
    "catalog locked 5 s",
    "blob folder away",
    "kill supervisor",
)


def test_a_service_in_use_survives_faults() -> None:
    """A worker killed, the disk full, blobs damaged and away, the catalog locked, and in the end the supervisor killed:
    whatever was acknowledged is there afterwards, and every answer was right."""
    with campaign() as running:
        for name in _CHOSEN:
            fault = next(fault for fault in FAULTS if fault.name == name)
            row = Row(fault)
            running.suffer(replace(fault, seconds=min(fault.seconds, _SHORT)), row)
            assert row.skipped or row.goes_on is not None, f"after {name} work did not go on"
        truth = running.truth
        assert (truth.wrong, truth.lost) == ([], [])
        assert truth.acknowledged > 0
