"""`system.shares`: bounded, and nobody displaces another's equal part."""

from hypothesis import given
from hypothesis import strategies as st

from prefix_service.system.shares import Shares

MOST = 100
puts = st.tuples(st.sampled_from("abcd"), st.integers(0, 30), st.integers(1, 40))


@given(st.lists(puts, max_size=200))
def test_what_it_holds_is_what_was_put(steps: list[tuple[str, int, int]]) -> None:
    """Never more than the bound; what is found is what was put last; sizes add up."""
    shares: Shares[tuple[str, int], int] = Shares(MOST)
    last: dict[tuple[str, int], int] = {}
    for tenant, number, size in steps:
        shares.put(tenant, (tenant, number), size, size)
        last[tenant, number] = size
        found = {key: value for key in last if (value := shares.get(key)) is not None}
        assert all(last[key] == value for key, value in found.items())
        assert shares.get((tenant, number)) == size or size > MOST // 4, "what is no more than an equal part is kept"
        assert shares.size == sum(found.values()) == sum(map(shares.size_of, "abcd")) <= MOST


@given(st.lists(puts, max_size=200))
def test_an_equal_part_is_not_displaced(steps: list[tuple[str, int, int]]) -> None:
    """A tenant that has no more than its equal part loses nothing to the others."""
    shares: Shares[tuple[str, int], int] = Shares(MOST)
    for number in range(5):
        shares.put("calm", ("calm", number), number, 4)
    for tenant, number, size in steps:
        shares.put(tenant, (tenant, number), size, size)
    assert [shares.get(("calm", number)) for number in range(5)] == list(range(5))


def test_the_oldest_goes_first_and_what_is_too_large_is_not_kept() -> None:
    """Replacing makes new; forgetting a tenant forgets all it has."""
    shares: Shares[str, str] = Shares(2)
    for key in ("first", "second", "first", "third"):
        shares.put("t", key, key)
    assert [shares.get(key) for key in ("first", "second", "third")] == ["first", None, "third"]
    shares.put("t", "huge", "huge", 3)
    assert shares.get("huge") is None
    shares.put("other", "mine", "mine")
    shares.pop_tenant("t")
    assert (shares.size, shares.get("mine"), shares.get("first")) == (1, "mine", None)


def test_everything_can_be_forgotten() -> None:
    """Then all of it is free again."""
    shares: Shares[str, int] = Shares(2)
    for tenant in ("t", "u"):
        shares.put(tenant, tenant, 1)
    shares.clear()
    assert (shares.size, shares.size_of("t"), shares.get("t")) == (0, 0, None)
    shares.put("u", "a", 1, 2)
    assert shares.get("a") == 1
