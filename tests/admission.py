"""Makes an `Admission` that refuses nothing, for tests of other parts."""

from prefix_service.registry.admission import Admission


def generous_admission() -> Admission:
    """Returns an admission that is wide enough for any test."""
    return Admission(in_flight=10_000, in_flight_tenant=10_000, work_bytes=8 << 30, processors=2)
