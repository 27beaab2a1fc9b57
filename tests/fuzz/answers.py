"""Sends mutated answers of a hostile server to every method of the client."""

import random
import time
import traceback
from collections.abc import Callable
from typing import Any

from prefix_service.errors import PrefixServiceError
from tests.client.damaged import damaged
from tests.client.hostile import hostile_server, says
from tests.client.test_answers import ANSWERS
from tests.client.transport.test_deadlines import CALLS, KINDS, Call, called
from tests.fuzz.watch import Findings, rounds

_TIMEOUT = 0.2


def fuzzed(seconds: float, seed: int) -> Findings:
    """Lets every method of both clients read mutated answers for so long."""
    findings, draw = Findings(), random.Random(seed)  # noqa: S311 - reproducible, not secret
    for _ in rounds(seconds):
        kind, name = draw.choice(KINDS), draw.choice(list(CALLS))
        sent = damaged(draw, draw.choice(list(ANSWERS.values())))
        began = time.thread_time()
        with hostile_server(says(sent)) as server:
            outcome = _outcome(kind, server.url, CALLS[name])
        findings.statuses[type(outcome).__name__] += 1
        if outcome is not None and not isinstance(outcome, PrefixServiceError):
            findings.faults.setdefault("".join(traceback.format_exception(outcome)[-3:]), sent)
        if (took := time.thread_time() - began) > 1:
            findings.faults.setdefault(f"{name}: {took:.1f} seconds of processor time", sent)
    return findings


def _outcome(kind: Callable[..., Any], url: str, call: Call) -> Exception | None:
    try:
        called(kind(url, "key", timeout=_TIMEOUT), call)
    except Exception as error:  # noqa: BLE001 - the outcome is judged by the caller
        return error
    return None
