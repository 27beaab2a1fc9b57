"""CUDA streams per thread, so that a thread does not wait for the work of others."""

import contextlib
import threading
from collections.abc import Iterator

import torch

_of_thread = threading.local()


@contextlib.contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Runs the block's kernels and copies on a stream of the calling thread, and waits for them at its end.

    Nothing is pending when the block has ended, so memory that it used can be freed, or used on any other stream. On
    the CPU this does nothing.
    """
    if device.type != "cuda":
        yield
        return
    stream = _stream(device)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        # A blocking event lets the thread sleep while it waits.
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record(stream)
        done.synchronize()


def _stream(device: torch.device) -> torch.cuda.Stream:
    streams: dict[torch.device, torch.cuda.Stream] = _of_thread.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return streams[device]
