"""Prefixes on disk outlive a worker, and are found only by their own question, service and key."""

import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from prefix_service.client import PrefixClient
from prefix_service.client.cache.disk_cache import DiskCache, Entry
from prefix_service.errors import InvalidRequest
from tests.client.conftest import GPT2, Counting
from tests.client.test_client import published
from tests.conftest import Publish, Server, running_server


@pytest.fixture(scope="module")
def adapter(server: Server) -> str:
    """Publishes an adapter, and returns its name."""
    with PrefixClient(server.url, server.admin_key) as client:
        published(client, "disk/a")
    return "disk/a"


def get(server: Server, folder: Path, reference: str, **options: Any) -> tuple[torch.Tensor, list[int]]:
    """Fetches as a worker that has just started; returns the tensor, and the statuses of its requests."""
    through = Counting()
    url, key = options.pop("url", server.url), options.pop("key", server.admin_key)
    with PrefixClient(url, key, cache_dir=folder, http=through, **options) as client:
        return client.get(reference).kv.tensor, through.statuses


def files(folder: Path) -> list[Path]:
    """Returns the files of the cache."""
    return sorted(folder.glob("*.prefix"))


def test_a_version_is_found_again_without_a_request(server: Server, adapter: str, tmp_path: Path) -> None:
    """A new worker finds a version bit for bit without a request, and each form of it on its own."""
    first, statuses = get(server, tmp_path, f"{adapter}@1")
    again, none = get(server, tmp_path, f"{adapter}@1")
    assert (statuses, none) == ([200], [])
    assert torch.equal(first, again)
    with PrefixClient(server.url, server.admin_key, cache_dir=tmp_path) as client:
        assert client.get(f"{adapter}@1", dtype="bfloat16").kv.tensor.dtype == torch.bfloat16
        assert client.get(f"{adapter}@1", layers=(1, 2)).kv.layers == (1, 2)
    assert len(files(tmp_path)) == 3


def test_what_may_move_is_revalidated(server: Server, publish: Publish, tmp_path: Path) -> None:
    """`latest` costs a 304 while it stays, and is fetched when it has moved."""
    with PrefixClient(server.url, server.admin_key) as client:
        published(client, "disk/moving")
        assert [get(server, tmp_path, "disk/moving")[1] for _ in range(2)] == [[200], [304]]
        publish("disk", "moving", GPT2)
        moved, statuses = get(server, tmp_path, "disk/moving")
        assert statuses == [200]
        assert torch.equal(moved, client.get("disk/moving@2").kv.tensor)
        assert get(server, tmp_path, "disk/moving")[1] == [304]
    assert len(files(tmp_path)) == 1


def flip_last(path: Path) -> None:
    """Flips a bit of the last byte."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def change_etag(path: Path) -> None:
    """Changes the entity tag of the same body."""
    data = path.read_bytes()
    at = data.index(b'"etag": "\\"') + len(b'"etag": "\\"')
    path.write_bytes(data[:at] + b"0" * 8 + data[at + 8 :])


def become_a_folder(path: Path) -> None:
    """Replaces the file by a folder, which the cache cannot replace."""
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": flip_last,
    "another entity tag": change_etag,
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "empty": lambda path: path.write_bytes(b""),
    "only a magic number": lambda path: path.write_bytes(path.read_bytes()[:8]),
    "a long record": lambda path: path.write_bytes(path.read_bytes()[:8] + b"\xff" * 4 + path.read_bytes()[12:]),
    "foreign": lambda path: path.write_bytes(b"something else entirely, and long enough" * 100),
    "a record that is no JSON": lambda path: path.write_bytes(path.read_bytes().replace(b'{"name"', b"[[[[[[[", 1)),
    "a folder": become_a_folder,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_fetched_again(damage: str, server: Server, adapter: str, tmp_path: Path) -> None:
    """The client fetches instead of a damaged entry, raises nothing, and replaces the entry if it can."""
    right, _ = get(server, tmp_path, f"{adapter}@1")
    (path,) = files(tmp_path)
    DAMAGE[damage](path)
    found, statuses = get(server, tmp_path, f"{adapter}@1")
    assert statuses == [200]
    assert torch.equal(found, right)
    if damage != "a folder":
        assert get(server, tmp_path, f"{adapter}@1")[1] == []


def test_a_body_is_never_paired_with_another_ones_tag(server: Server, adapter: str, tmp_path: Path) -> None:
    """An entry under another entry's name is ignored; body and tag are in one file."""
    get(server, tmp_path, f"{adapter}@1")
    (first,) = files(tmp_path)
    with PrefixClient(server.url, server.admin_key, cache_dir=tmp_path) as client:
        client.get(f"{adapter}@1", layers=(0, 1))
    (second,) = set(files(tmp_path)) - {first}
    shutil.copy(second, first)
    found, statuses = get(server, tmp_path, f"{adapter}@1")
    assert statuses == [200]
    assert found.shape[0] == 3


def test_other_callers_and_services_find_nothing(server: Server, adapter: str, tmp_path: Path) -> None:
    """An entry is found only with the URL and the key with which it was fetched."""
    get(server, tmp_path, f"{adapter}@1")
    assert get(server, tmp_path, f"{adapter}@1", key=server.key("read", "disk"))[1] == [200]
    port = server.url.rpartition(":")[2]
    assert get(server, tmp_path, f"{adapter}@1", url=f"http://localhost:{port}")[1] == [200]
    assert get(server, tmp_path, f"{adapter}@1")[1] == []
    assert server.admin_key.encode() not in b"".join(path.read_bytes() for path in files(tmp_path))


@pytest.mark.one_process("a foreign transport has one address, and the cache on disk keeps bodies by address")
def test_without_a_key_versions_are_revalidated(tmp_path: Path) -> None:
    """Without a key versions are revalidated, because an earlier `--dev` service at the address may have had others."""
    cache = tmp_path / "cache"
    with running_server(tmp_path / "one", "--dev") as first:
        port = first.url.rpartition(":")[2]
        with PrefixClient(first.url, cache_dir=cache) as client:
            published(client, "dev/a")
            client.get("dev/a@1")
        assert get(first, cache, "dev/a@1", key=None)[1] == [304]
    with running_server(tmp_path / "two", "--dev", "--port", port) as second:
        with PrefixClient(second.url) as client:
            published(client, "dev/a", GPT2)
            right = client.get("dev/a@1").kv.tensor
        found, statuses = get(second, cache, "dev/a@1", key=None)
        assert statuses == [200]
        assert torch.equal(found, right)


def test_the_folder_is_bounded(server: Server, tmp_path: Path) -> None:
    """The least recently used entry is removed, whichever process fetched it, and one that is too large is not kept."""
    with PrefixClient(server.url, server.admin_key) as client:
        for name in ("one", "two", "three"):
            published(client, f"diskbound/{name}")  # 7,680 bytes each, and a header
    budget = {"cache_dir_bytes": 20_000}
    for name in ("one", "two", "one", "three"):
        get(server, tmp_path, f"diskbound/{name}@1", **budget)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 20_000
    assert get(server, tmp_path, "diskbound/one@1", **budget)[1] == []
    assert get(server, tmp_path, "diskbound/two@1", **budget)[1] == [200]
    get(server, tmp_path / "small", "diskbound/one@1", cache_dir_bytes=5_000)
    assert files(tmp_path / "small") == []


def test_files_are_private(server: Server, adapter: str, tmp_path: Path) -> None:
    """Files have mode 0600 in a folder of 0700, and a folder that others can write to is refused."""
    get(server, tmp_path / "own", f"{adapter}@1")
    assert stat.S_IMODE((tmp_path / "own").stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in files(tmp_path / "own")] == [0o600]
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    (tmp_path / "file").write_text("")
    for folder in ("shared", "file"):
        with pytest.raises(InvalidRequest, match="cache_dir"):
            PrefixClient(server.url, cache_dir=tmp_path / folder)


def test_clear_cache_empties_the_folder_of_ours(server: Server, adapter: str, tmp_path: Path) -> None:
    """`clear_cache` removes the client's files, and no others."""
    (tmp_path / "notes.txt").write_text("keep")
    (tmp_path / ".writing-abandoned").write_text("half")
    with PrefixClient(server.url, server.admin_key, cache_dir=tmp_path) as client:
        client.get(f"{adapter}@1")
        client.clear_cache()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert get(server, tmp_path, f"{adapter}@1")[1] == [200]


def test_clear_cache_of_a_folder_that_was_removed_is_no_error(tmp_path: Path) -> None:
    """A caller who clears it, as vLLM does in `reset_prefix_cache`, wants nothing else."""
    with PrefixClient("http://127.0.0.1:1", "key", cache_dir=tmp_path / "cache") as client:
        (tmp_path / "cache").rmdir()
        client.clear_cache()


def test_a_disk_that_refuses_costs_no_fetch(
    server: Server, adapter: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """If the disk refuses, the fetch succeeds, and the log says that the prefix is not kept."""
    with PrefixClient(server.url, server.admin_key, cache_dir=tmp_path / "gone") as client:
        (tmp_path / "gone").rmdir()
        assert client.get(f"{adapter}@1").version == 1
    assert "is not kept" in caplog.text


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    """Making room removes unfinished files that are older than an hour, because younger ones may be completed."""
    old, young = tmp_path / ".writing-old", tmp_path / ".writing-young"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    DiskCache(tmp_path, 1 << 20, ("u",)).store(("k",), Entry(bytearray(b"body"), '"e"'))
    assert (old.exists(), young.exists()) == (False, True)


def old_entry(folder: Path, digit: str = "a") -> Path:
    """Writes an entry as earlier releases kept it."""
    path = folder / f"{digit * 64}.prefix"
    path.write_bytes(b"PREFIX\x00\x01" + bytes(100))
    return path


def open_again(server: Server, folder: Path) -> None:
    """Starts and ends a worker."""
    PrefixClient(server.url, server.admin_key, cache_dir=folder).close()


def make_room(_: Server, folder: Path) -> None:
    """Stores another prefix."""
    DISKS[folder].store(("k",), Entry(bytearray(b"body"), '"e"'))


def clear(_: Server, folder: Path) -> None:
    """Clears the cache."""
    DISKS[folder].clear()


DISKS: dict[Path, DiskCache] = {}


@pytest.mark.parametrize("occasion", [open_again, make_room, clear])
def test_entries_of_earlier_releases_are_removed(
    server: Server, tmp_path: Path, occasion: Callable[[Server, Path], None]
) -> None:
    """Each of these occasions removes old entries, and no other files, whatever their names or contents."""
    DISKS[tmp_path] = DiskCache(tmp_path, 1 << 20, ("u",))
    old = old_entry(tmp_path)
    others = {
        "notes.txt": b"PREFIX\x00\x01notes",
        f"{'b' * 64}.prefix": b"something else",
        f"{'c' * 64}.prefix.bak": b"PREFIX\x00\x01",
        f"{'d' * 63}.prefix": b"PREFIX\x00\x01",
    }
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / f"{'e' * 64}.prefix").mkdir()
    occasion(server, tmp_path)
    assert not old.exists()
    assert {name: (tmp_path / name).read_bytes() for name in others} == others
    assert (tmp_path / f"{'e' * 64}.prefix").is_dir()


def test_entries_of_earlier_releases_are_not_read(server: Server, adapter: str, tmp_path: Path) -> None:
    """Old entries are not read, neither under their own names nor under today's."""
    get(server, tmp_path, f"{adapter}@1")
    (path,) = files(tmp_path)
    content = path.read_bytes()
    old = content.replace(b"PREFIX\x00\x02", b"PREFIX\x00\x01", 1)
    assert old != content
    path.write_bytes(old)
    (tmp_path / path.name.replace(".v2", "")).write_bytes(old)
    assert get(server, tmp_path, f"{adapter}@1")[1] == [200]
    assert [found.read_bytes() for found in files(tmp_path)] == [content]


WORKER = """
import sys
from prefix_service.client import PrefixClient
url, key, folder = sys.argv[1:]
for turn in range(15):
    with PrefixClient(url, key, cache_dir=folder, cache_dir_bytes=20_000) as client:
        for name in ("one", "two", "three"):
            prefix = client.get(f"diskshared/{name}@1")
            assert prefix.metadata["adapter"] == name, prefix.metadata
"""


def test_threads_and_processes_share_a_folder(server: Server, tmp_path: Path) -> None:
    """With room for two of three, each thread and process gets what it asked for, and no unfinished file is left."""
    with PrefixClient(server.url, server.admin_key) as client:
        for name in ("one", "two", "three"):
            published(client, f"diskshared/{name}")
    failed: list[str] = []

    def work() -> None:
        command = [sys.executable, "-c", WORKER, server.url, server.admin_key, str(tmp_path)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            failed.append(done.stderr)

    def work_here() -> None:
        for _ in range(30):
            with PrefixClient(server.url, server.admin_key, cache_dir=tmp_path, cache_dir_bytes=20_000) as client:
                names = ("one", "two", "three")
                failed.extend(name for name in names if client.get(f"diskshared/{name}@1").metadata["adapter"] != name)

    threads = [threading.Thread(target=target) for target in (work, work, work_here, work_here)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert list(tmp_path.glob(".writing-*")) == []
    assert 0 < len(files(tmp_path)) <= 3


def test_entries_of_another_catalog_are_not_served(server: Server, adapter: str, tmp_path: Path) -> None:
    """A folder that was replaced by another keeps URL and key: once an answer has named its catalog, no entry of the
    earlier one is served, also not one that this client has in memory already."""
    get(server, tmp_path, f"{adapter}@1")
    assert get(server, tmp_path, f"{adapter}@1")[1] == []
    through = Renaming("another")
    with PrefixClient(server.url, server.admin_key, cache_dir=tmp_path, http=through) as client:
        client.get(f"{adapter}@1")
        assert through.statuses == []  # no answer has named the catalog yet
        client.whoami()
        for _ in range(2):
            client.get(f"{adapter}@1")
    assert through.statuses == [200, 200]


class Renaming(Counting):
    """Names another catalog in every answer."""

    def __init__(self, catalog: str) -> None:
        super().__init__()
        self._catalog = catalog

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Passes a request on."""
        response = super().handle_request(request)
        response.headers["Prefix-Catalog"] = self._catalog
        return response
