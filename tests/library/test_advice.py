"""Advice is given where the numbers call for it, and says them."""

from dataclasses import replace

from prefix_service.library.advice import PinnedVersion, of_tiers, of_unread
from prefix_service.registry.report import TierReport

TIER = TierReport("host", "host", 1 << 30, 1 << 29, 0, 9, 0, 0, 799, 201, 0, 12, 201, 0, 1.0)


def test_a_low_hit_ratio() -> None:
    """Enough lookups, evictions, and less than 80 % of hits."""
    (found,) = of_tiers([TIER])
    assert found.code == "low-hit-ratio"
    assert found.text == (
        "Only 80% of the lookups in host memory found what they asked for, and 12 evictions made room: a larger "
        "PREFIX_RENDERING_BYTES would save loads."
    )
    for other in (replace(TIER, hits=800, misses=200), replace(TIER, misses=200), replace(TIER, evictions=0)):
        assert of_tiers([other]) == []


def test_unread_versions() -> None:
    """One, and thousands, for a day, and for a week."""
    one = PinnedVersion("acme", "a", 1, 3 << 29)
    assert of_unread([], 7) == []
    assert of_unread([one], 1)[0].text == (
        "1 pinned version unread for 1 day holds 1.5 GiB on the device: unpin what is not needed."
    )
    (found,) = of_unread([one] * 2000, 7)
    assert (found.nbytes, found.versions) == (2000 * one.nbytes, [one] * 2000)
    assert found.text.startswith("2,000 pinned versions unread for 7 days hold 2.9 TiB on the device")
