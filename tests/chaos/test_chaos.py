"""The short form of `python -m tests.chaos`: life, right bytes and nothing lost; times are for the command to judge."""

from typing import Final

from tests.chaos.campaign import Row, campaign
from tests.chaos.faults import FAULTS

_SHORT: Final = (
    "kill worker",
    "disk full",
    "blobs damaged",
    "catalog locked 5 s",
    "blob folder away",
    "kill supervisor",
)


def test_a_service_in_use_survives_faults() -> None:
    """Workers and supervisor killed, disk full, blobs damaged and away, catalog locked: whatever was acknowledged is
    there afterwards, and every answer was right."""
    with campaign() as running:
        for fault in (fault for fault in FAULTS if fault.name in _SHORT):
            row = Row(fault)
            running.suffer(fault, row)
            assert row.skipped or row.goes_on is not None, f"after {fault.name} work did not go on"
        running.finish()
        truth = running.truth
        assert (truth.wrong, truth.lost) == ([], [])
        assert truth.acknowledged > 0
