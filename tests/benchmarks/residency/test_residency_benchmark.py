"""The measures of README.md, small: this implementation and libcachesim's, and a tenant during another's scan."""

from dataclasses import replace

import pytest

from tests.benchmarks.residency.neighbours import CASES, measure
from tests.benchmarks.residency.replay import ours, peer, ratios
from tests.benchmarks.residency.traces import PREFIX, by_tenants


@pytest.mark.parametrize("share", [0.01, 0.05, 0.2])
def test_it_hits_as_often_as_libcachesims_s3fifo(share: float) -> None:
    """With one tenant and uniform sizes the residency hits as often as S3FIFO, and more often than LRU."""
    trace = by_tenants(1, in_blocks=True)
    trace = replace(trace, keys=trace.keys[:40_000])
    found = ratios(trace, ours(trace, int(trace.bytes * share))).objects
    for name, least, most in (("S3FIFO", 0.995, 1.005), ("LRU", 1.03, 2.0), ("Belady", 0.0, 1.0)):
        hits = peer(name, trace, int(trace.bytes * share) // PREFIX * PREFIX)
        assert hits is not None
        assert least <= found / ratios(trace, hits).objects <= most


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_scan_leaves_a_tenant_four_fifths_of_its_lone_figure(case: object) -> None:
    """A tenant keeps four fifths of the hits that it has alone with the whole budget, even if its working set is far
    larger than half of it, the scan is four times as fast, or each scanned adapter is read three times in a row.
    """
    kept = measure(next(one for one in CASES if one == case))
    assert kept.alone > 0.5
    assert kept.part >= 0.8
