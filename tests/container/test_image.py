"""The image is built, and started as docker-compose.yml starts it, without an engine.

That takes minutes, root, `buildah`, `podman` and `debootstrap`, so it is done only with `PREFIX_TEST_IMAGE=1`.
"""

import ast
import configparser
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load, load_file

ROOT = Path(__file__).parents[2]
CASE = ROOT / "tests" / "data" / "corpus" / "cases" / "gpt2-n20-emb"
USER = 10001


def _run(*command: str | Path, timeout: float = 60, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env, check=False)
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@dataclass(frozen=True)
class Image:
    """A built image: the config that an engine reads, and its files, mounted."""

    config: dict[str, Any]
    root: Path

    @property
    def environment(self) -> list[str]:
        """Returns NAME=value for each variable that the image sets."""
        variables: list[str] = self.config["Env"]
        return variables


@dataclass(frozen=True)
class Container:
    """A service that runs in an image: its first process, and its URL."""

    image: Image
    url: str
    pid: int
    engine: subprocess.Popen[bytes]
    data: Path
    log: Path

    @property
    def key(self) -> str:
        """Returns the platform admin's first key."""
        return (self.data / "bootstrap.key").read_text().strip()

    def client(self) -> httpx.Client:
        """Returns an HTTP client with that key."""
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.key}"}, timeout=60)

    def exec(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs a command in the service's namespaces, as its user."""
        variables = [*self.image.environment, *(f"{name}={value}" for name, value in environment.items())]
        inside = ["nsenter", "--target", str(self.pid), "--mount", "--pid", "--root", "--wd", "--"]
        return subprocess.run(
            [*inside, *_as_user(variables), *command], capture_output=True, text=True, timeout=60, check=False
        )

    def stop(self) -> int:
        """Sends SIGTERM, and returns the exit status."""
        if self.engine.poll() is None:
            os.kill(self.pid, signal.SIGTERM)
        return self.engine.wait(timeout=40)


def _as_user(variables: list[str]) -> list[str]:
    drop = ["--clear-groups", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
    return ["setpriv", f"--reuid={USER}", f"--regid={USER}", *drop, "env", "-i", *variables]


def _why_not() -> str | None:
    if os.environ.get("PREFIX_TEST_IMAGE") != "1":
        return "building the image takes minutes: set PREFIX_TEST_IMAGE=1"
    if os.geteuid() != 0:
        return "building the image without an engine needs root"
    missing = [tool for tool in ("buildah", "podman", "debootstrap", "unshare", "nsenter") if not shutil.which(tool)]
    return f"not installed: {', '.join(missing)}" if missing else None


def _pip_configuration(path: Path) -> list[str]:
    """Writes this machine's pip configuration to `path`; returns the arguments that give it to a build."""
    shown = _run(sys.executable, "-m", "pip", "config", "list")
    found = {}
    for line in shown.splitlines():
        name, _, value = line.partition("=")
        found[name.partition(".")[2]] = str(ast.literal_eval(value))
    configuration = configparser.ConfigParser(interpolation=None)
    configuration["global"] = found
    with path.open("w") as file:
        configuration.write(file)
    words = [word for value in found.values() for word in value.split()]
    # An index in a folder has its files in that folder.
    places = {str(Path(word.removeprefix("file://")).parent) for word in words if word.startswith("file://")}
    places |= {word for word in words if word.startswith("/")}
    mounts = [f"--volume={place}:{place}:ro" for place in sorted(places)]
    own_places = {"index-url", "extra-index-url", "find-links"} & found.keys()
    return [f"--secret=id=pip.conf,src={path}", *mounts, *(["--build-arg=TORCH_INDEX="] if own_places else [])]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """Yields the image, built on a Debian of its own."""
    reason = _why_not()
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("image")
    storage = [f"--root={folder / 'storage'}", f"--runroot={folder / 'run'}"]
    # vfs needs nothing of the kernel, and much disk; set `STORAGE_DRIVER=overlay` where that works.
    environment = {"STORAGE_DRIVER": "vfs", **os.environ}

    def buildah(*arguments: str | Path) -> str:
        return _run("buildah", *storage, *arguments, timeout=1200, env=environment)

    rootfs = folder / "rootfs"
    include = "--include=python3,python3-venv,ca-certificates"
    _run("debootstrap", "--variant=minbase", include, "bookworm", rootfs, timeout=600)
    _run("tar", "-C", rootfs, "-cf", folder / "base.tar", ".", timeout=300)
    _run("podman", *storage, "import", folder / "base.tar", "localhost/python:base", timeout=600, env=environment)
    options = ["--isolation=chroot", "--format=docker", "--build-arg=BASE_IMAGE=localhost/python:base"]
    try:
        buildah("bud", *options, *_pip_configuration(folder / "pip.conf"), "-t", "localhost/prefix-service:test", ROOT)
        config = json.loads(buildah("inspect", "--type", "image", "localhost/prefix-service:test"))["Docker"]["config"]
        container = buildah("from", "localhost/prefix-service:test").strip()
        yield Image(config, Path(buildah("mount", container).strip()))
    finally:
        buildah("rm", "--all")
        shutil.rmtree(folder)


# The engine's part of docker-compose.yml: a root that cannot be written, a volume, a /tmp in memory, a first
# process of its own. The network is the machine's.
_ENGINE = """
set -e
root=$1 data=$2
shift 2
mount --make-rprivate /
mount --bind "$root" "$root"
mount --bind "$data" "$root/data"
mount -t tmpfs tmpfs "$root/tmp"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -o remount,bind,ro "$root"
cd "$root"
exec chroot . "$@"
"""


@contextmanager
def _started(image: Image, folder: Path) -> Iterator[Container]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data = folder / "data"
    data.mkdir(exist_ok=True)
    os.chown(data, USER, USER)
    namespaces = ["unshare", "--mount", "--pid", "--fork", "sh", "-c", _ENGINE, "engine"]
    variables = [*image.environment, f"PREFIX_PORT={port}"]
    command = [*_as_user(variables), *image.config["Entrypoint"], *image.config["Cmd"]]
    log = folder / "log"
    with log.open("wb") as output:
        engine = subprocess.Popen([*namespaces, image.root, data, *command], stdout=output, stderr=output)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(url, engine, log)
        (pid,) = _children(engine)
        yield Container(image, url, pid, engine, data, log)
    finally:
        # The first process takes its namespace along; the engine ends after it.
        for pid in _children(engine):
            os.kill(pid, signal.SIGKILL)
        engine.wait(timeout=40)


def _children(engine: subprocess.Popen[bytes]) -> list[int]:
    if engine.poll() is not None:
        return []
    return [int(pid) for pid in Path(f"/proc/{engine.pid}/task/{engine.pid}/children").read_text().split()]


def _wait_until_ready(url: str, engine: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and engine.poll() is None:
        try:
            if httpx.get(f"{url}/readyz").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise RuntimeError(f"the container is not ready (status {engine.returncode}):\n{log.read_text()}")


@pytest.fixture(scope="module")
def container(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    """Yields one container for the tests that leave it running."""
    with _started(image, tmp_path_factory.mktemp("container")) as running:
        yield running


def _publish(container: Container) -> None:
    names = ["adapter_config.json", "adapter_model.safetensors"]
    files = {name: (CASE / "adapter" / name).read_bytes() for name in names}
    with container.client() as client:
        made = client.post("/v1/tenants/acme/adapters/summarize/versions", files=files)
    assert made.status_code == 201, f"{made.text}\n{container.log.read_text()}"


def _fetched(container: Container) -> bytes:
    with container.client() as client:
        return client.get("/v1/tenants/acme/adapters/summarize/prefix").raise_for_status().content


def test_the_service_has_no_privileges(container: Container) -> None:
    """The image's user has a number and is not root, and the service runs as that user without capabilities."""
    assert container.image.config["User"] == f"{USER}:{USER}"
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{container.pid}/status").read_text().splitlines())
    assert set(status["Uid"].split()) == {str(USER)}
    assert set(status["Gid"].split()) == {str(USER)}
    assert int(status["CapPrm"], 16) == int(status["CapBnd"], 16) == 0


def test_the_service_needs_to_write_nowhere_but_to_its_volume(container: Container) -> None:
    """The volume /data belongs to the image's user, and the rest of the running root is read-only."""
    assert container.image.config["Volumes"].keys() == {"/data"}
    owned = (container.image.root / "data").stat()
    assert (owned.st_uid, owned.st_gid, owned.st_mode & 0o777) == (USER, USER, 0o700)
    assert "Read-only file system" in container.exec("touch", "/venv/x").stderr
    assert container.exec("touch", "/data/x").returncode == 0


def test_the_health_check_tells_ready_from_not(container: Container) -> None:
    """The image's health check passes on the running service, and fails where none answers."""
    kind, *check = container.image.config["Healthcheck"]["Test"]
    assert kind == "CMD"
    assert container.exec(*check, PREFIX_PORT=container.url.rpartition(":")[2]).returncode == 0
    assert container.exec(*check, PREFIX_PORT="1").returncode != 0


def test_keys_are_had_from_the_container(container: Container) -> None:
    """`cat` prints the first key, and `key create` makes others, as docker-compose.yml says."""
    assert container.exec("cat", "/data/bootstrap.key").stdout.strip() == container.key
    made = container.exec(
        "prefix-service", "key", "create", "--data-dir", "/data", "--tenant", "acme", "--scope", "read"
    )
    assert made.returncode == 0, made.stderr
    headers = {"Authorization": f"Bearer {made.stdout.strip()}"}
    assert httpx.get(f"{container.url}/v1/tenants/acme/adapters", headers=headers).status_code == 200


def test_the_image_holds_the_service_and_no_more(image: Image) -> None:
    """The image has no tests, sources, installer or pip configuration, and the pinned torch."""
    (packages,) = image.root.glob("venv/lib/python3.*/site-packages")
    assert (packages / "prefix_service" / "py.typed").exists()
    assert len(list(packages.glob("torch-2.13.0*.dist-info"))) == 1
    left = [packages / "pip", packages / "tests", image.root / "source", image.root / "etc" / "pip.conf"]
    assert [path for path in left if path.exists()] == []
    assert not any(name.startswith("PIP_") for name in image.environment)


def test_data_outlives_the_container(image: Image, tmp_path: Path) -> None:
    """SIGTERM ends the service with 0, and a second container serves the same bytes from the volume."""
    with _started(image, tmp_path) as first:
        _publish(first)
        body = _fetched(first)
        assert first.stop() == 0
    expected = load_file(CASE / "expected.safetensors")
    tensors = load(body)
    for layer in range(sum(name.endswith(".key") for name in tensors)):
        for part in ("key", "value"):
            served = tensors[f"past_key_values.{layer}.{part}"]
            assert served.equal(expected[f"b1.layers.{layer}.{part}"])
    with _started(image, tmp_path) as second:
        assert _fetched(second) == body
