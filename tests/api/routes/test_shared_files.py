"""Workers on the same host map renderings in shared files, which the service names, bounds and removes."""

import os
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from prefix_service.api.app import create_app
from prefix_service.data_folder.opening import bootstrap_file, opened
from prefix_service.settings import Settings
from tests.api.apps import served
from tests.api.helpers import CONFIG, MEDIA_TYPE, adapter_of, upload, upload_directory
from tests.conftest import Server, running_server
from tests.forked import run_forked
from tests.missing import not_tested
from tests.processes import eventually
from tests.sharing import shared_dir, shared_files, sharing_server

SHARED = "application/vnd.prefix-service.shared-file+json"
BOTH = {"Accept": f"{SHARED}, {MEDIA_TYPE}"}
USUAL = "layout=stacked&expand=false"
# 4 layers, 4 heads of 64, 128 tokens, float32: 1 MiB.
LARGE: dict[str, Any] = {**CONFIG, "num_virtual_tokens": 128, "num_layers": 4, "num_attention_heads": 4}
LARGE["token_dim"] = 256


@dataclass(frozen=True)
class Sharing:
    """A service that shares, its folder, and an HTTP client on its socket."""

    server: Server
    folder: Path
    client: httpx.Client

    def named(self, path: str, **headers: str) -> Path:
        """Returns the file that the service names for a prefix."""
        answer = self.client.get(path, headers=BOTH | headers)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == SHARED
        told = answer.json()
        assert told["bytes"] == Path(told["file"]).stat().st_size
        return Path(told["file"])


@pytest.fixture(scope="module")
def sharing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sharing]:
    """Yields one service for the tests that leave it running."""
    folder = tmp_path_factory.mktemp("sharing")
    with sharing_server(folder) as server:
        yield Sharing(server, folder, server.client())


def path_of(adapter: str, query: str = USUAL) -> str:
    """Returns the path of version 1 of an adapter of the tenant `acme`."""
    return f"/v1/tenants/acme/adapters/{adapter}@1/prefix?{query}"


@pytest.mark.parametrize("case", ["llama-n20-proj", "t5-n20-emb", "llama-n20-emb-stored_bf16-on_fp32"])
@pytest.mark.parametrize("form", ["", "&dtype=bfloat16", "&dtype=float8_e4m3fn", "&layers=1:2&kv_heads=0:1"])
def test_a_file_is_the_body_that_others_receive(sharing: Sharing, case: str, form: str) -> None:
    """The file is the body byte for byte, in every dtype and range, and a requested digest is its own."""
    name = case.replace("_", "-").lower()
    upload_directory(sharing.client, "acme", name, adapter_of(case))
    path = path_of(name, USUAL + form)
    received = sharing.client.get(path)
    assert received.headers["content-type"] == MEDIA_TYPE
    assert sharing.named(path).read_bytes() == received.content
    told = sharing.client.get(path, headers=BOTH | {"Want-Repr-Digest": "sha-256"}).json()
    assert told["repr_digest"] == received.headers["repr-digest"]
    assert "repr_digest" not in sharing.client.get(path, headers=BOTH).json()


def test_other_forms_go_on_from_the_same_memory(sharing: Sharing) -> None:
    """A batch, one tensor a layer, and a posted mask are sent as bytes, and make no other file."""
    upload(sharing.client, "acme", "forms")
    first = sharing.named(path_of("forms"))
    others = ["", "layout=stacked", "layout=stacked&batch_size=1", "expand=false", f"{USUAL}&batch_size=2"]
    for query in [*others, f"{USUAL}&mask_dtype=bool"]:
        answer = sharing.client.get(path_of("forms", query), headers=BOTH)
        assert answer.headers["content-type"] == MEDIA_TYPE
    posted = sharing.client.post(path_of("forms"), json={"attention_mask": [[1]]}, headers=BOTH)
    assert posted.status_code == 422  # options belong into the body
    posted = sharing.client.post(path_of("forms", ""), json={"layout": "stacked", "expand": False}, headers=BOTH)
    assert posted.headers["content-type"] == MEDIA_TYPE
    assert posted.content == first.read_bytes()
    assert sharing.named(path_of("forms", f"{USUAL}&batch_size=1&dtype=float32")) == first


def test_who_may_open_a_file(sharing: Sharing) -> None:
    """Only their owner lists the folders, names have 128 random bits, and nobody can write."""
    upload(sharing.client, "acme", "modes")
    file = sharing.named(path_of("modes"))
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (file, file.parent, file.parent.parent)]
    assert [oct(mode) for mode in modes] == ["0o440", "0o710", "0o711"]
    assert file.parent.parent == shared_dir(sharing.folder)
    assert len(bytes.fromhex(file.stem)) == 16


@pytest.mark.parametrize(
    "accept", ["", "*/*", MEDIA_TYPE, "application/*", f"{MEDIA_TYPE}, {SHARED};q=0", f"{SHARED}x, {MEDIA_TYPE}"]
)
def test_only_who_asks_is_told(sharing: Sharing, accept: str) -> None:
    """A client that does not accept the type gets the bytes, with `Vary`."""
    upload(sharing.client, "acme", "accept")
    sharing.named(path_of("accept"))
    answer = sharing.client.get(path_of("accept"), headers={"Accept": accept})
    assert (answer.status_code, answer.headers["content-type"]) == (200, MEDIA_TYPE)
    assert answer.headers["vary"] == "Accept"


def test_the_bytes_must_be_acceptable_too(sharing: Sharing) -> None:
    """A client that does not accept the bytes gets 406, because there may be no file."""
    upload(sharing.client, "acme", "accept")
    assert sharing.client.get(path_of("accept"), headers={"Accept": SHARED}).status_code == 406


def test_entity_tags_of_both(sharing: Sharing) -> None:
    """File and bytes have their own entity tags, the file's a weak one, and both are answered with 304."""
    upload(sharing.client, "acme", "tags")
    path = path_of("tags")
    told, received = sharing.client.get(path, headers=BOTH), sharing.client.get(path)
    assert told.headers["vary"] == received.headers["vary"] == "Accept"
    assert told.headers["etag"].startswith('W/"')
    assert told.headers["etag"].removeprefix("W/") != received.headers["etag"]
    for name in ("prefix-version", "prefix-digest", "cache-control"):
        assert told.headers[name] == received.headers[name]
    for etag in (told.headers["etag"], received.headers["etag"]):
        answer = sharing.client.get(path, headers=BOTH | {"If-None-Match": etag})
        assert (answer.status_code, answer.headers["etag"], answer.content) == (304, etag, b"")
    assert sharing.client.get(path, headers={"If-None-Match": told.headers["etag"]}).status_code == 200
    assert sharing.client.get(path, headers=BOTH | {"If-None-Match": '"x"'}).headers["etag"] == told.headers["etag"]


def test_head(sharing: Sharing) -> None:
    """HEAD has the headers of the answer that GET would give."""
    upload(sharing.client, "acme", "head")
    got, head = (sharing.client.request(method, path_of("head"), headers=BOTH) for method in ("GET", "HEAD"))
    assert head.content == b""
    varying = {"x-request-id", "date"}
    assert {*got.headers.items()} - {*head.headers.items()} <= {(name, got.headers[name]) for name in varying}


def test_a_file_goes_with_its_rendering(sharing: Sharing) -> None:
    """A file is removed with its rendering, and readers that have opened it still read all of it. A new rendering has
    another file, and the same entity tag.
    """
    upload(sharing.client, "acme", "leaving", file=None)
    path = path_of("leaving")
    etag = sharing.client.get(path, headers=BOTH).headers["etag"]
    file, content = sharing.named(path), sharing.client.get(path).content
    with file.open("rb") as held:
        assert sharing.client.delete("/v1/tenants/acme/adapters/leaving@1/residency").status_code == 204
        until = time.monotonic() + 60
        while file.exists() and time.monotonic() < until:
            time.sleep(0.01)
        assert not file.exists()
        assert held.read() == content
    assert sharing.named(path) != file
    assert sharing.client.get(path, headers=BOTH).headers["etag"] == etag


def test_eviction_removes_files(tmp_path: Path) -> None:
    """The budget of renderings bounds the files in the folder."""
    with sharing_server(tmp_path, environment={"PREFIX_RENDERING_BYTES": str(5 << 20)}) as server:
        client = server.client()
        for number in range(12):
            made = client.post(f"/v1/tenants/acme/adapters/a{number}/versions", json={"config": LARGE, "seed": number})
            assert made.status_code == 201, made.text
            told = client.get(path_of(f"a{number}"), headers=BOTH).json()
            assert Path(told["file"]).exists()
            eventually(lambda: len(shared_files(tmp_path)) <= 5)
        files = shared_files(tmp_path)
        assert len(files) == 5
        assert sum(file.stat().st_blocks for file in files) * 512 < 6 << 20


def test_nobody_is_told_over_tcp(tmp_path: Path) -> None:
    """Over TCP the same app answers with bytes."""
    settings = Settings(data_dir=tmp_path / "data", uds=tmp_path / "s", shared_dir=tmp_path / "shared")
    with opened(settings), served(create_app(settings)) as url:
        headers = {"Authorization": f"Bearer {bootstrap_file(settings.data_dir).read_text().strip()}"}
        with httpx.Client(base_url=url, headers=headers) as client:
            upload(client, "acme", "tcp")
            answer = client.get(path_of("tcp"), headers=BOTH)
            assert answer.headers["content-type"] == MEDIA_TYPE
            assert "vary" not in answer.headers
        assert len(shared_files(tmp_path)) == 1  # it is there, and not told
    assert list(shared_dir(tmp_path).iterdir()) == []


def test_nobody_is_told_without_the_setting(tmp_path: Path) -> None:
    """A Unix socket without the setting shares nothing."""
    socket = tmp_path / "s"
    with running_server(tmp_path / "data", "--uds", str(socket), uds=socket) as server:
        client = server.client()
        upload(client, "acme", "none")
        answer = client.get(path_of("none"), headers=BOTH)
        assert answer.headers["content-type"] == MEDIA_TYPE
        assert "vary" not in answer.headers


def test_it_needs_a_socket(tmp_path: Path) -> None:
    """`serve` refuses the setting without a socket."""
    refused = run_forked("serve", "--data-dir", tmp_path, environment={"PREFIX_SHARED_DIR": str(tmp_path / "shared")})
    assert refused.returncode == 1
    assert "set PREFIX_UDS or --uds too" in refused.stderr


def test_a_folder_that_others_may_change_is_refused(tmp_path: Path) -> None:
    """`serve` refuses a folder that others can write to, unless it is sticky, like /dev/shm."""
    shared = tmp_path / "shared"
    shared.mkdir()
    for mode in (0o777, 0o770):
        shared.chmod(mode)
        refused = run_forked(
            "serve",
            "--uds",
            tmp_path / "s",
            "--data-dir",
            tmp_path / "d",
            environment={"PREFIX_SHARED_DIR": str(shared)},
        )
        assert refused.returncode == 1
        assert f"other users can replace the contents of {shared}" in " ".join(refused.stderr.split())
    shared.chmod(0o1777)
    with sharing_server(tmp_path):
        assert len(list(shared.iterdir())) == 1


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    """`serve` says at its start that it cannot make the folder."""
    (tmp_path / "file").touch()
    environment = {"PREFIX_SHARED_DIR": str(tmp_path / "file" / "shared")}
    refused = run_forked("serve", "--uds", tmp_path / "s", "--data-dir", tmp_path / "d", environment=environment)
    assert refused.returncode == 1
    assert "cannot share files in" in refused.stderr


def test_files_belong_to_the_folders_group(tmp_path: Path) -> None:
    """In a set-group-id folder the folder's group reads the files, which may be the workers' own."""
    if os.geteuid() != 0:
        not_tested("only root gives a folder to another group")
    shared_dir(tmp_path).mkdir()
    os.chown(shared_dir(tmp_path), -1, 12345)
    shared_dir(tmp_path).chmod(0o2711)
    with sharing_server(tmp_path) as server:
        client = server.client()
        upload(client, "acme", "group")
        assert client.get(path_of("group"), headers=BOTH).headers["content-type"] == SHARED
        (file,) = shared_files(tmp_path)
        assert (file.stat().st_gid, file.parent.stat().st_gid) == (12345, 12345)
        assert stat.S_IMODE(file.parent.stat().st_mode) == 0o2710


def test_an_end_in_order_leaves_nothing(tmp_path: Path) -> None:
    """SIGTERM removes the process's folder and its files."""
    with sharing_server(tmp_path) as server:
        client = server.client()
        upload(client, "acme", "end")
        client.get(path_of("end"), headers=BOTH)
        assert len(shared_files(tmp_path)) == 1
    assert list(shared_dir(tmp_path).iterdir()) == []


def test_a_start_sweeps_what_a_killed_process_left(tmp_path: Path) -> None:
    """A start removes the folder of a killed process, and not that of a running one."""
    with sharing_server(tmp_path) as killed:
        client = killed.client()
        upload(client, "acme", "killed")
        client.get(path_of("killed"), headers=BOTH)
        killed.process.kill()
        killed.process.wait()
    left = shared_files(tmp_path)
    assert len(left) == 1
    other = tmp_path / "other"
    other.mkdir()
    environment = {"PREFIX_SHARED_DIR": str(shared_dir(tmp_path))}
    with sharing_server(other, environment=environment) as living:
        assert not left[0].parent.exists()
        client = living.client()
        upload(client, "acme", "lives")
        client.get(path_of("lives"), headers=BOTH)
        (tmp_path / "s.sock").unlink()
        with sharing_server(tmp_path):
            assert len(shared_files(tmp_path)) == 1
            assert len(list(shared_dir(tmp_path).iterdir())) == 2


def test_two_workers(tmp_path: Path) -> None:
    """Each process has a folder of its own and names existing files; both folders are removed in the end."""
    with sharing_server(tmp_path, "--workers", "2") as server:
        upload(server.client(), "acme", "two")
        named: set[Path] = set()
        until = time.monotonic() + 60
        while len(named) < 2 and time.monotonic() < until:
            answer = server.client().get(path_of("two"), headers=BOTH)
            assert answer.headers["content-type"] == SHARED
            named.add(Path(answer.json()["file"]))
        assert len({file.parent for file in named}) == 2
        assert len({file.read_bytes() for file in named}) == 1
    assert list(shared_dir(tmp_path).iterdir()) == []


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """Yields a folder whose `shared` is a tmpfs of 1.5 MiB."""
    place = shared_dir(tmp_path)
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1536k,mode=711", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        not_tested("no tmpfs can be mounted here (not root?)")
    yield tmp_path
    subprocess.run(["umount", str(place)], check=True)


def test_a_tmpfs_that_is_full(tiny: Path) -> None:
    """A rendering without room stays in private memory and is sent as bytes, with one line in the log."""
    with sharing_server(tiny) as server:
        client = server.client()
        for number in range(2):
            client.post(f"/v1/tenants/acme/adapters/a{number}/versions", json={"config": LARGE, "seed": number})
        assert client.get(path_of("a0"), headers=BOTH).headers["content-type"] == SHARED
        for _ in range(3):
            answer = client.get(path_of("a1"), headers=BOTH)
            assert (answer.status_code, answer.headers["content-type"]) == (200, MEDIA_TYPE)
        assert answer.headers["vary"] == "Accept"
        assert len(shared_files(tiny)) == 1
        line = "a rendering is not shared: No space left on device"
        eventually(lambda: server.log.read_text().count(line) == 1)
        assert client.delete("/v1/tenants/acme/adapters/a0@1/residency").status_code == 204
        assert client.delete("/v1/tenants/acme/adapters/a1@1/residency").status_code == 204
        eventually(lambda: not shared_files(tiny))
        again = client.get(path_of("a1"), headers=BOTH)
        assert again.headers["content-type"] == SHARED
        assert Path(again.json()["file"]).read_bytes() == answer.content
