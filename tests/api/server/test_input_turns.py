"""Callers take turns in having their input parsed."""

import asyncio
import time
from collections.abc import Callable
from functools import partial

from hypothesis import given
from hypothesis import strategies as st

from prefix_service.api.server.input_turns import InputTurns


async def _parsed(arrivals: list[str], seconds: float = 0) -> list[list[tuple[str, int]]]:
    """Returns what was parsed in each turn of the loop, if all arrives in one; each takes so many seconds. The first
    turn that is returned is two: what may be parsed when it arrives, and the turn after.
    """
    turns: list[list[tuple[str, int]]] = [[]]
    shares = InputTurns()
    left = len(arrivals)

    def parse(caller: str, number: int) -> None:
        nonlocal left
        left -= 1
        time.sleep(seconds)
        turns[-1].append((caller, number))

    for number, caller in enumerate(arrivals):
        call: Callable[[], None] = partial(parse, caller, number)
        if shares.take(caller, call):
            call()
    while left:
        await asyncio.sleep(0)
        turns.append([])
    return [turn for turn in turns if turn]


def test_a_caller_does_not_stand_behind_the_crowd_of_another() -> None:
    turns = asyncio.run(_parsed(["crowd"] * 300 + ["other"]))
    assert ("other", 300) in turns[0]


def test_a_turn_takes_a_few_connections() -> None:
    turns = asyncio.run(_parsed(["crowd"] * 300))
    assert len(turns[0]) == 8
    assert max(map(len, turns)) <= 32


def test_costly_requests_have_a_turn_each_and_cheap_ones_share_it() -> None:
    costly = asyncio.run(_parsed(["crowd"] * 20, seconds=0.004))
    cheap = asyncio.run(_parsed(["crowd"] * 300))
    assert [len(turn) for turn in costly[-5:]] == [1] * 5
    assert max(map(len, cheap[1:])) > 4


@given(st.lists(st.sampled_from("abc"), max_size=100))
def test_everything_is_parsed_once_and_each_caller_in_order(arrivals: list[str]) -> None:
    found = [one for turn in asyncio.run(_parsed(arrivals)) for one in turn]
    assert sorted(found, key=lambda one: one[1]) == [(caller, number) for number, caller in enumerate(arrivals)]
    for caller in "abc":
        numbers = [number for name, number in found if name == caller]
        assert numbers == sorted(numbers)
