"""Work on a CUDA device that does not wait for other threads' work."""

import contextlib
import threading
from collections.abc import Iterator

import torch

_of_thread = threading.local()


@contextlib.contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Run the block's kernels and copies on a stream of the calling thread, and wait for these alone in the end.

    So nothing is under way when the block has ended, and what it used may be freed, or used on any other stream,
    without more ado. On the CPU it does nothing.
    """
    if device.type != "cuda":
        yield
        return
    stream = _stream(device)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        # The thread sleeps meanwhile.
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record(stream)
        done.synchronize()


def _stream(device: torch.device) -> torch.cuda.Stream:
    streams: dict[torch.device, torch.cuda.Stream] = _of_thread.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return streams[device]
