"""Runs `python -m tests.chaos --fleet` in short: it checks bytes and losses, and leaves times to the command."""

from dataclasses import replace
from typing import Final

from tests.chaos.campaign import Row
from tests.chaos.fleet.campaign import campaign
from tests.chaos.fleet.faults import FAULTS

_SHORT: Final = 2.0  # seconds of each fault
_BETWEEN: Final = 0.3  # seconds; everything that is acknowledged is compared after each fault, so less is compared
_CHOSEN: Final = ("kill PostgreSQL", "kill S3 server", "kill replica", "PostgreSQL half-open")


def test_a_fleet_in_use_survives_faults() -> None:
    """A fleet survives a killed replica, a killed PostgreSQL, a killed S3 server, and connections that are cut
    half-open. Whatever was acknowledged is known to every replica afterwards, and every answer was right.
    """
    with campaign(tenants=2, between=_BETWEEN) as running:
        for name in _CHOSEN:
            fault = next(fault for fault in FAULTS if fault.name == name)
            row = Row(fault)
            running.suffer(replace(fault, seconds=min(fault.seconds, _SHORT)), row)
            assert row.goes_on is not None, f"after {name} work did not go on"
        truth = running.truth
        assert (truth.wrong, truth.lost) == ([], [])
        assert truth.acknowledged > 0
