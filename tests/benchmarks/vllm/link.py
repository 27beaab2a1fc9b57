"""A link of 10 Gbit/s: loopback, slowed down by tc(8), in a network namespace of this command's own.

A network between machines is slower than loopback, but loopback takes processor time from the worker.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_INSIDE: Final = "PREFIX_BENCHMARK_LINK"
_RATE: Final = ["tbf", "rate", "10gbit", "burst", "2mb", "latency", "20ms"]
_OWN: Final = ["unshare", "--net", "--map-root-user"]
_UP: Final = ["ip", "link", "set", "lo", "up"]
_SLOW: Final = ["tc", "qdisc", "add", "dev", "lo", "root", *_RATE]


def enter() -> None:
    """Runs this command again in a network namespace of its own, unless it is in one; writes to standard error if the
    machine cannot make one, and the link is left out."""
    if _INSIDE in os.environ:
        return
    trial = [*_OWN, "sh", "-c", f"{' '.join(_UP)} && {' '.join(_SLOW)}"]
    try:
        subprocess.run(trial, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", b"").decode() or error
        sys.stderr.write(f"LEFT OUT: the link of 10 Gbit/s, which needs unshare(1), ip(8) and tc(8): {reason}\n")
        return
    again = [*_OWN, "sh", "-c", f'{" ".join(_UP)} && exec "$@"', "sh", *sys.orig_argv]
    os.execvpe(again[0], again, {**os.environ, _INSIDE: "1"})  # noqa: S606


def is_there() -> bool:
    """Returns whether this command can slow its loopback down."""
    return _INSIDE in os.environ


@contextmanager
def slow() -> Iterator[None]:
    """Makes loopback a link of 10 Gbit/s while the block runs."""
    subprocess.run(_SLOW, check=True)
    try:
        yield
    finally:
        subprocess.run(["tc", "qdisc", "del", "dev", "lo", "root"], check=True)
