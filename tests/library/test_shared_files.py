"""`library.shared_files`: what a process keeps there, and what others may not do to it."""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from prefix_service.errors import InvalidInput
from prefix_service.library.shared_files import SharedFiles, sweep
from prefix_service.prefix.kv import PrefixKV
from prefix_service.prefix.variant import DtypePair, Identity, Variant
from prefix_service.prefix.wire.prefix_file import PrefixFile
from prefix_service.prefix.wire.received import read_kv, read_prefix_file
from prefix_service.prefix.wire.rendering import Rendering, render

IDENTITY = Identity("acme", "a", 1, "sha256:" + "0" * 64, "PREFIX_TUNING", None, 5, 3, 2, 8)
KV = PrefixKV.whole(torch.randn(3, 2, 2, 5, 8, generator=torch.Generator().manual_seed(0)))
FILE = PrefixFile(IDENTITY, Variant(DtypePair.both("float32"), 4, (0, 3), (0, 2), "layers", expand=True), {})


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[SharedFiles]:
    """A process's files, at most two."""
    with contextlib.closing(SharedFiles(tmp_path / "shared", most=2)) as files:
        yield files


def placed(shared: SharedFiles) -> tuple[Rendering, Path]:
    """A rendering that lies in a file."""
    rendering = shared.share(FILE, render(KV, DtypePair.both("float32")))
    assert rendering.file is not None
    return rendering, Path(rendering.file)


def test_a_rendering_lies_in_its_file(shared: SharedFiles) -> None:
    """Its tensors are those that were rendered; the file is whole, and read as an answer is. Every file is made of
    it as before."""
    rendering, file = placed(shared)
    assert torch.equal(rendering.buffers["key_value"], KV.tensor)
    assert torch.equal(read_kv(read_prefix_file(bytearray(file.read_bytes()))).tensor, KV.tensor)
    assert b"".join(FILE.chunks(rendering)) == b"".join(FILE.chunks(render(KV, DtypePair.both("float32"))))


def test_float8_with_its_scales(shared: SharedFiles) -> None:
    """Both lie there."""
    file = PrefixFile(IDENTITY, Variant(DtypePair.both("float8_e4m3fn"), 1, (0, 3), (0, 2), "layers", expand=True), {})
    private = render(KV, DtypePair.both("float8_e4m3fn"))
    rendering = shared.share(file, private)
    assert torch.equal(rendering.buffers["key_value_scale"], private.buffers["key_value_scale"])
    assert torch.equal(rendering.buffers["key_value"].view(torch.uint8), private.buffers["key_value"].view(torch.uint8))


def test_what_the_process_writes_stays_its_own(shared: SharedFiles) -> None:
    """A mistake in the service does not change what workers have mapped."""
    rendering, file = placed(shared)
    before = file.read_bytes()
    rendering.buffers["key_value"].zero_()
    assert file.read_bytes() == before


def test_a_file_goes_with_its_last_reader(shared: SharedFiles) -> None:
    """Not before; what is beyond the number of files a process may have stays in private memory until then."""
    rendering, file = placed(shared)
    reader, (kept, _) = rendering, placed(shared)
    assert shared.share(FILE, render(KV, DtypePair.both("float32"))).file is None
    del rendering
    assert file.exists()
    del reader
    assert not file.exists()
    placed(shared)
    del kept


def test_an_end_leaves_the_mappings(tmp_path: Path) -> None:
    """Whoever reads goes on reading."""
    shared = SharedFiles(tmp_path)
    rendering, file = placed(shared)
    shared.close()
    assert not file.parent.exists()
    assert torch.equal(rendering.buffers["key_value"], KV.tensor)


def test_processes_that_start_at_once_do_not_sweep_each_other(tmp_path: Path) -> None:
    """A folder is its process's from the moment that it is returned, whoever sweeps meanwhile."""
    made: list[bool] = []
    ended = threading.Event()

    def sweeping() -> None:
        while not ended.is_set():
            sweep(tmp_path)

    sweepers = [threading.Thread(target=sweeping) for _ in range(3)]
    for thread in sweepers:
        thread.start()
    for _ in range(300):
        with contextlib.closing(SharedFiles(tmp_path)) as shared:
            made.append(shared.share(FILE, render(KV, DtypePair.both("float32"))).file is not None)
    ended.set()
    for thread in sweepers:
        thread.join()
    assert made == [True] * 300
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives folders away")
@pytest.mark.parametrize("foreign", ["", "a", "a/b"])
def test_a_folder_below_somebody_elses_is_refused(tmp_path: Path, foreign: str) -> None:
    """Its owner could put another in its place; root may do everything anyway."""
    folder = tmp_path / "a" / "b" / "shared"
    folder.parent.mkdir(parents=True)
    os.chown(tmp_path / foreign, 12345, -1)
    for _ in range(2):
        with pytest.raises(InvalidInput, match="belongs to user 12345, who could replace what the service shares"):
            sweep(folder)
    os.chown(tmp_path / foreign, 0, -1)
    sweep(folder)
    os.chown(folder, 12345, -1)
    with pytest.raises(InvalidInput, match="12345"):
        SharedFiles(folder)


def test_a_sweep_touches_nothing_else(tmp_path: Path) -> None:
    """Neither other names, nor what a link points to."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").touch()
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "process-link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "shared" / "mine").mkdir()
    (tmp_path / "shared" / "process-file").touch()
    (tmp_path / "shared" / "process-left").mkdir()
    sweep(tmp_path / "shared")
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == ["mine", "process-file", "process-link"]
    assert (tmp_path / "elsewhere" / "file").exists()
