"""`crash.strace` reads what strace wrote of a process."""

from pathlib import Path

from tests.crash.strace import Call, calls_in

_TRACE = """\
101   write(7</data/staging/x>, "PK"..., 5000) = 5000
101   pwrite64(5</data/catalog.sqlite-journal>, "\\331\\325"..., 512, 0 <unfinished ...>
102   +++ exited with 0 +++
102   fsync(9</data/blobs> <unfinished ...>
101   <... pwrite64 resumed>)                 = -1 ENOSPC (No space left on device) (INJECTED)
102   <... fsync resumed>)                    = 0
101   rename("/data/staging/x", "/data/blobs/ab") = 0
"""


def test_calls_that_another_thread_interrupts_are_read(tmp_path: Path) -> None:
    """A call whose line strace split, because another thread was heard in between, is one call, at its end."""
    (tmp_path / "trace").write_text(_TRACE)
    assert calls_in(tmp_path / "trace") == [
        Call(101, "write", "/data/staging/x", "", "", injected=False),
        Call(101, "pwrite64", "/data/catalog.sqlite-journal", "", "ENOSPC", injected=True),
        Call(102, "fsync", "/data/blobs", "", "", injected=False),
        Call(101, "rename", "/data/staging/x", "/data/blobs/ab", "", injected=False),
    ]
