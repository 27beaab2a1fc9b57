"""`prefix.streams` and rendering on a device make no thread wait for another."""

import threading
from typing import get_args

import pytest
import torch

from prefix_service.prefix.kv import PrefixKV
from prefix_service.prefix.streams import own_stream
from prefix_service.prefix.variant import DtypePair, KVDtype
from prefix_service.prefix.wire.rendering import render, to_host
from tests.missing import needs_cuda

CUDA = torch.device("cuda")


def test_on_the_cpu_there_is_no_stream() -> None:
    """On the CPU `own_stream` does nothing, and `to_host` copies no contiguous tensor."""
    tensor = torch.arange(6)
    with own_stream(tensor.device):
        assert to_host(tensor).data_ptr() == tensor.data_ptr()
        assert to_host(tensor.view(2, 3).T).is_contiguous()


@needs_cuda
@pytest.mark.parametrize("dtype", get_args(KVDtype))
def test_a_slice_of_the_device_is_that_of_the_cpu(dtype: KVDtype) -> None:
    """A slice rendered on the device equals the CPU's bit for bit and lies in pinned memory."""
    kv = PrefixKV.whole(torch.randn(4, 2, 8, 20, 64))
    host = render(kv.sliced((1, 3), (2, 7)), DtypePair.both(dtype))
    device = render(kv.to(CUDA).sliced((1, 3), (2, 7)), DtypePair.both(dtype))
    for name, buffer in host.buffers.items():
        assert device.buffers[name].is_pinned()
        assert torch.equal(buffer.view(torch.uint8), device.buffers[name].view(torch.uint8))


@needs_cuda
def test_a_rendering_does_not_wait_for_another_stream() -> None:
    """A rendering ends while a kernel of another thread's stream still runs."""
    kv = PrefixKV.whole(torch.randn(4, 2, 8, 20, 64)).to(CUDA)
    render(kv, DtypePair.both("bfloat16"))  # kernels are loaded once, which waits for the device
    busy = torch.cuda.Event()  # type: ignore[no-untyped-call]
    begun = threading.Event()

    def keep_busy() -> None:
        with own_stream(CUDA):
            torch.cuda._sleep(2_000_000_000)  # type: ignore[no-untyped-call]
            busy.record()
            begun.set()

    thread = threading.Thread(target=keep_busy)
    thread.start()
    begun.wait(60)
    rendering = render(kv, DtypePair.both("bfloat16"))
    assert not busy.query()  # type: ignore[no-untyped-call]
    thread.join()
    assert torch.equal(rendering.buffers["key_value"], kv.tensor.to(torch.bfloat16).cpu())


@needs_cuda
def test_the_end_of_the_block_is_the_end_of_its_work() -> None:
    """Any other stream can use a tensor that was computed in the block, once the block has ended."""
    with own_stream(CUDA):
        torch.cuda._sleep(100_000_000)  # type: ignore[no-untyped-call]
        made = torch.ones(1 << 20, device=CUDA)
    assert int(made.sum()) == 1 << 20
