"""Real servers lose no acknowledged change when they are killed, their disks fail, or blobs are damaged or lost."""

import json
import random
import re
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from prefix_service.blobs.folder import FolderBlobStore
from prefix_service.catalog.catalog import Catalog
from prefix_service.data_folder.opening import blob_folder
from prefix_service.prefix.references import parse_reference
from tests.api.helpers import CONFIG, accepted, problem, upload, versions_path, weights
from tests.conftest import Server, running_server
from tests.crash import strace
from tests.crash.folder import serving
from tests.processes import eventually


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Returns the path of a data folder to be made."""
    return tmp_path / "data"


def body(response: httpx.Response) -> bytes:
    """Returns the body of an answer that must have status 200."""
    assert response.status_code == 200, response.text
    return response.content


def test_hardening_45_kill_a_server_in_the_middle_of_uploads(data_dir: Path) -> None:
    """A server that is killed again and again, during several uploads, has every version that it answered with 201."""
    moments = random.Random(45)  # noqa: S311 - the same moments each time
    acknowledged: dict[str, tuple[bytes, bytes]] = {}

    def upload_on(client: httpx.Client, adapter: str, first_seed: int) -> None:
        for seed in range(first_seed, first_seed + 1000):
            try:
                answer = upload(client, "acme", adapter, file=(sent := weights(seed)))
                if answer.status_code == 201:
                    where = answer.headers["Location"]
                    acknowledged[where] = sent, body(accepted(lambda: client.get(f"{where}/prefix")))  # noqa: B023
            except httpx.TransportError:
                return

    def check(client: httpx.Client) -> None:
        for where, (sent, prefix) in acknowledged.items():
            assert body(accepted(lambda: client.get(f"{where}/parameters"))) == sent  # noqa: B023
            assert body(accepted(lambda: client.get(f"{where}/prefix"))) == prefix  # noqa: B023

    for attempt in range(4):
        with running_server(data_dir) as server, ThreadPoolExecutor(4) as pool:
            check(server.client())
            for number in range(4):
                pool.submit(upload_on, server.client(), f"a{number}", 10_000 * attempt + 1000 * number)
            enough = len(acknowledged) + 3
            eventually(lambda enough=enough: len(acknowledged) >= enough)  # type: ignore[misc]
            time.sleep(moments.uniform(0, 1))
            server.process.kill()
    with running_server(data_dir) as server:
        check(server.client())
        newest = [int(where.rpartition("@")[2]) for where in acknowledged if "/a0@" in where]
        answer = upload(server.client(), "acme", "a0", file=weights(99_999))
        assert answer.json()["version"] > max(newest, default=0)


@contextmanager
def largest_file(server: Server, nbytes: int) -> Iterator[None]:
    """Limits the size of the server's files until the block ends."""
    before = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, before)


@contextmanager
def failing(server: Server, tmp_path: Path, fault: str) -> Iterator[None]:
    """Makes calls of the server fail until the block ends; the limit on files needs no strace."""
    if fault == "limit":
        with largest_file(server, 100):
            yield
    else:
        strace.require()
        with strace.traced(server.process.pid, tmp_path / "trace", fault):
            yield


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        ("limit", 507, "out-of-space"),
        ("fsync:error=ENOSPC", 507, "out-of-space"),
        ("fsync:error=EDQUOT", 507, "out-of-space"),
        ("pwrite64:error=ENOSPC", 507, "out-of-space"),
        ("fsync:error=EIO", 503, "storage-failed"),
        ("fdatasync:error=EIO", 503, "storage-failed"),
        ("rename:error=EIO", 503, "storage-failed"),
    ],
)
def test_hardening_47_a_full_or_broken_disk_over_http(
    server: Server, tmp_path: Path, fault: str, status: int, code: str
) -> None:
    """The service answers 507 on a full disk and 503 on a broken one, for blobs and catalog alike; nothing is visible,
    it serves other versions meanwhile, and accepts the upload once the disk works again.
    """
    client, tenant = server.client(), f"disk-{status}-{re.sub('[^a-z0-9]', '-', fault.lower())}"
    before = upload(client, tenant, "a").headers["Location"]
    kept = body(client.get(f"{before}/parameters"))
    with failing(server, tmp_path, fault):
        # With every call traced a slow machine may need longer for the catalog than requests wait, which is a 503 too.
        refused = upload(client, tenant, "b") if status == 503 else accepted(lambda: upload(client, tenant, "b"))
        problem(refused, status, code)
        assert accepted(lambda: client.get(f"/v1/tenants/{tenant}/adapters/b")).status_code == 404
        assert body(accepted(lambda: client.get(f"{before}/parameters"))) == kept
    # A failure that took long is repeated to everybody for a second.
    assert accepted(lambda: upload(client, tenant, "b")).status_code == 201


def file_of(data_dir: Path, digest: str) -> Path:
    """Returns a blob's file."""
    return FolderBlobStore(blob_folder(data_dir)).path(digest)


def damage(path: Path) -> None:
    """Flips one bit of a file."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def blobs_of(data_dir: Path, reference: str) -> tuple[Path, Path]:
    """Returns the files of a version's weights and of its keys and values."""
    with serving(data_dir) as service:
        tenant, _, rest = reference.partition("/")
        version = Catalog(service.database).resolve(tenant, parse_reference(rest))
    return file_of(data_dir, version.weights), file_of(data_dir, version.key_values)


def test_hardening_48_bit_rot_of_keys_and_values_heals(server: Server) -> None:
    """The service quarantines damaged keys and values, and makes the same bytes again within the request."""
    client, base = server.client(), "/v1/tenants/rot/adapters"
    upload(client, "rot", "a", file=weights(481))
    upload(client, "rot", "b", file=weights(482))
    prefix = body(client.get(f"{base}/a@1/prefix"))
    _, key_values = blobs_of(server.data_dir, "rot/a@1")
    client.delete(f"{base}/a@1/residency")
    damage(key_values)
    assert body(client.get(f"{base}/a@1/prefix")) == prefix
    assert (blob_folder(server.data_dir) / "quarantine" / key_values.name).exists()
    assert key_values.exists()
    assert client.get(f"{base}/b@1/prefix").status_code == 200


def test_hardening_48_bit_rot_of_weights_heals_by_publishing_again(server: Server) -> None:
    """Damaged weights are quarantined and answered with 503, for one version; uploading them again heals it."""
    client, base = server.client(), "/v1/tenants/rotten/adapters"
    upload(client, "rotten", "a", file=(sent := weights(483)))
    upload(client, "rotten", "b", file=(other := weights(484)))
    stored, _ = blobs_of(server.data_dir, "rotten/a@1")
    damage(stored)
    for _ in range(2):
        problem(client.get(f"{base}/a@1/parameters"), 503, "corrupt-blob")
    assert (blob_folder(server.data_dir) / "quarantine" / stored.name).exists()
    assert client.get(f"{base}/a@1/prefix").status_code == 200
    assert body(client.get(f"{base}/b@1/parameters")) == other
    again = upload(client, "rotten", "a", file=sent)
    assert (again.status_code, again.json()["version"]) == (200, 1)
    assert body(client.get(f"{base}/a@1/parameters")) == sent


def log_line(server: Server, *words: str) -> str:
    """Waits for the line of a server's log that holds all these words, and returns it."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for line in server.log.read_text().splitlines():
            if all(word in line for word in words):
                return line
        time.sleep(0.1)
    raise AssertionError(f"no line with {words} in:\n{server.log.read_text()}")


def test_hardening_49_reconciled_at_start(data_dir: Path) -> None:
    """A start logs versions whose blobs are gone. Lost keys and values are made again when a client reads them, lost
    weights come back when they are published again. A blob that no version names is collected and logged; other files
    stay.
    """
    base = "/v1/tenants/acme/adapters"
    with running_server(data_dir) as server:
        for adapter, seed in (("a", 1), ("b", 2), ("c", 3)):
            upload(server.client(), "acme", adapter, file=weights(seed))
        prefix = body(server.client().get(f"{base}/b@1/prefix"))
    (weights_of_a, _), (_, key_values_of_b) = (blobs_of(data_dir, f"acme/{name}@1") for name in "ab")
    weights_of_a.unlink()
    key_values_of_b.unlink()
    orphan = FolderBlobStore(blob_folder(data_dir)).stage()
    orphan.write(b"nobody's")
    lonely = file_of(data_dir, orphan.commit())
    foreign = lonely.with_name("not a blob")
    foreign.touch()
    with running_server(data_dir, environment={"PREFIX_GARBAGE_GRACE": "1"}) as server:
        client = server.client()
        assert "key_values" not in log_line(server, "blobs lost", "acme/a@1")
        assert "weights" not in log_line(server, "blobs lost", "acme/b@1")
        log_line(server, "garbage collected")
        assert not lonely.exists()
        assert foreign.exists()
        told = [line for line in server.log.read_text().splitlines() if "blobs lost" in line]
        assert not any("acme/c@1" in line for line in told)
        assert body(client.get(f"{base}/b@1/prefix")) == prefix
        problem(client.get(f"{base}/a@1/parameters"), 503, "corrupt-blob")
        assert upload(client, "acme", "a", file=weights(1)).status_code == 200
        assert body(client.get(f"{base}/a@1/parameters")) == weights(1)
        assert client.get(f"{base}/c@1/prefix").status_code == 200


def test_hardening_42_collections_during_an_upload(data_dir: Path) -> None:
    """An upload that outlasts the grace period, while collections run, becomes a whole version."""
    with running_server(data_dir, environment={"PREFIX_GARBAGE_GRACE": "1"}) as server:
        client, sent = server.client(), weights(42)
        files = {"adapter_config.json": json.dumps(CONFIG).encode(), "adapter_model.safetensors": sent}
        whole = client.build_request("POST", versions_path("acme", "a"), files=files)
        content = whole.read()

        def slowly() -> Iterator[bytes]:
            step = len(content) // 8 + 1
            for start in range(0, len(content), step):
                yield content[start : start + step]
                time.sleep(0.5)

        headers = {"Content-Type": whole.headers["Content-Type"]}
        answer = accepted(lambda: client.post(whole.url, content=slowly(), headers=headers))
        assert answer.status_code == 201
        time.sleep(3)  # collections
        assert body(client.get("/v1/tenants/acme/adapters/a@1/parameters")) == sent
        client.delete("/v1/tenants/acme/adapters/a@1/residency")
        assert client.get("/v1/tenants/acme/adapters/a@1/prefix").status_code == 200
