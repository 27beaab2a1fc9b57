"""Where an answer becomes tensors: memory for its body, and the prefix that is a view of it. Needs torch."""

import torch

from service.client.prefix import Prefix
from service.client.protocol import Buffer
from service.errors import InvalidRequest, InvalidResponse
from service.prefix.buffers import bytes_of
from service.prefix.received import read_kv, read_message


def allocate(size: int, *, pinned: bool) -> memoryview:
    """Host memory of `size` bytes, as it is found; `pinned` memory goes to a GPU without another copy.

    Raises:
        InvalidResponse: there is not as much.
        InvalidRequest: there is no GPU to pin it for.
    """
    if pinned and not torch.cuda.is_available():
        raise InvalidRequest("pin_memory=True needs a GPU that torch can use, and there is none")
    try:
        return bytes_of(torch.empty(size, dtype=torch.uint8, pin_memory=pinned))
    except (MemoryError, RuntimeError) as error:
        raise InvalidResponse(f"the answer claims {size} bytes, for which there is no memory") from error


def decode(body: Buffer) -> Prefix:
    """The prefix in a body, sharing its memory; float8 is decoded to float32.

    Raises:
        InvalidResponse: it is none.
    """
    received = read_message(body)
    return Prefix(read_kv(received), received.metadata)
