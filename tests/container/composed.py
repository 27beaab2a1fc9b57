"""Runs the services of docker-compose.yml without an engine: the same commands, environments, names, ports, files and
health checks, with the programs of Debian and PyPI in place of the images.

Each service has a network of its own, joined by a bridge. What containers find at paths of their own is at another path
here, so those paths are replaced in commands and environments.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from tests.missing import not_tested
from tests.postgresql import binaries

ROOT: Final = Path(__file__).parents[2]
_NETWORK: Final = "10.99.0"
_DNS: Final = "127.0.0.11"
_PATIENCE: Final = 180.0  # seconds
_SWITCH: Final = """
set -e
ip link set lo up
ip link add bridge type bridge
ip addr add {network}.254/24 dev bridge
ip link set bridge up
mount --make-rprivate /
mount --bind {hosts} /etc/hosts
echo up
exec sleep infinity
"""
# It waits for its end of the cable.
_CONTAINER: Final = 'cd "$HOME" && ip link set lo up && echo up && read -r _ && exec "$@" < /dev/null > "$LOG" 2>&1'


def compose_file() -> dict[str, Any]:
    """Returns docker-compose.yml, with the defaults of its variables."""
    text = re.sub(r"\$\{\w+:?-([^}]*)\}", r"\1", (ROOT / "docker-compose.yml").read_text())
    document: dict[str, Any] = yaml.safe_load(text)
    return document


def of_the_image() -> tuple[dict[str, str], list[str]]:
    """Returns the environment and the health check that the Dockerfile gives to a container."""
    text = (ROOT / "Dockerfile").read_text()
    environment = dict(re.findall(r"(PREFIX_\w+)=(\S+)", text[text.index("\nENV PATH=") :]))
    check: list[str] = json.loads(re.findall(r"HEALTHCHECK .*\n\s+CMD (\[.*\])", text)[0])
    return environment, check


@dataclass
class Composed:
    """The running services of a profile; `secrets` are the contents of their files."""

    folder: Path
    document: dict[str, Any] = field(default_factory=compose_file)
    secrets: dict[str, str] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _switch: list[str] = field(default_factory=list)

    @property
    def services(self) -> dict[str, Any]:
        """The services that run here, in the order of the file: Grafana is in neither Debian nor PyPI."""
        found = self.document["services"].items()
        return {name: it for name, it in found if it.get("profiles") == ["fleet"] and name != "grafana"}

    def data(self, service: str, path: str = "/data") -> Path:
        """Returns where a service's path is on this machine."""
        return Path(self._paths(service)[path])

    def log(self, service: str) -> Path:
        """Returns the file with what a service printed."""
        return self.folder / f"{service}.log"

    def run(self, *command: str | Path, **environment: str) -> str:
        """Runs a command among the services, and returns what it prints."""
        own = {**self._environment(), **environment}
        done = subprocess.run([*self._switch, *map(str, command)], env=own, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @contextmanager
    def started(self) -> Iterator[None]:
        """Starts every service once those that it depends on are healthy, and ends them with the block."""
        self._prepare()
        with ExitStack() as stack:
            self._switch = stack.enter_context(self._bridge())
            for service in self.services:
                for needed in self.services[service].get("depends_on", []):
                    self._wait_for(needed)
                stack.callback(self._end, service)
                self._start(service)
            for service in self.services:
                self._wait_for(service)
            yield

    def _prepare(self) -> None:
        """Writes the files that a person makes, and those that an engine makes."""
        hosts = [f"{self._address(name)} {name}" for name in self.services]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts]) + "\n")
        for name, it in self.document["secrets"].items():
            self.secrets[name] = os.urandom(32).hex()
            path = self.folder / it["file"]
            path.parent.mkdir(exist_ok=True)
            path.write_text(self.secrets[name] + "\n")
        for service, it in self.services.items():
            for config in it.get("configs", []):
                content = self.document["configs"][config["source"]]["content"]
                (self.folder / f"config-{config['source']}").write_text(self._here(service, content))
        bin_ = self.folder / "bin"
        bin_.mkdir()
        for name, program in (("prefix-service", '-m prefix_service.cli "$@"'), ("python3", '"$@"')):
            (bin_ / name).write_text(f"#!/bin/sh\nexec {sys.executable} {program}\n")
            (bin_ / name).chmod(0o755)

    def _address(self, service: str) -> str:
        return f"{_NETWORK}.{list(self.services).index(service) + 1}"

    @contextmanager
    def _bridge(self) -> Iterator[list[str]]:
        """Yields the command prefix for the network that joins all others, with the services' names in /etc/hosts."""
        script = _SWITCH.format(network=_NETWORK, hosts=self.folder / "hosts")
        holder = subprocess.Popen(["unshare", "--net", "--mount", "sh", "-c", script], stdout=subprocess.PIPE)
        try:
            assert holder.stdout is not None
            with holder.stdout:
                if holder.stdout.readline() != b"up\n":
                    not_tested("this machine allows no bridge between network namespaces")
            yield ["nsenter", f"--net=/proc/{holder.pid}/ns/net", f"--mount=/proc/{holder.pid}/ns/mnt"]
        finally:
            holder.kill()
            holder.wait()

    def _start(self, service: str) -> None:
        it = self.services[service]
        own, _ = of_the_image() if it["image"] == "prefix-service" else ({}, [])
        environment = {**own, **it.get("environment", {})}
        words = [*it.get("entrypoint", []), *it.get("command", [])]
        if service == "postgresql":
            words, environment = self._of_postgresql(words, environment)
        elif "entrypoint" not in it:
            words = [service, *words]
        wanted = {name: self._here(service, value) for name, value in environment.items()}
        wanted = {**self._environment(), **wanted, "LOG": str(self.log(service))}
        command = [*self._switch, "unshare", "--net", "setpriv", "--pdeathsig=KILL", "sh", "-c", _CONTAINER, "sh"]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [*command, *(self._here(service, word) for word in words)], env=wanted, stdin=pipe, stdout=pipe
        )
        self.processes[service] = process
        assert process.stdin is not None
        assert process.stdout is not None
        with process.stdin, process.stdout:
            assert process.stdout.readline() == b"up\n"
            self._plug_in(service, process)
            process.stdin.write(b"\n")

    def _plug_in(self, service: str, process: subprocess.Popen[bytes]) -> None:
        cable = f"to-{service}"[:15]
        inside = f"ip addr add {self._address(service)}/24 dev eth0 && ip link set eth0 up"
        self.run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", str(process.pid))
        self.run("ip", "link", "set", cable, "master", "bridge", "up")
        self._inside(service, "sh", "-c", inside)
        if "127.0.0.11" in str(self.services[service]):
            names = [sys.executable, "-m", "tests.container.names", _DNS, str(self.folder / "hosts")]
            command = [*self._switch, f"--net=/proc/{process.pid}/ns/net", "setpriv", "--pdeathsig=KILL", *names]
            self.processes["dns"] = subprocess.Popen(command, env=self._environment(), cwd=ROOT)

    def _inside(self, service: str, *command: str) -> subprocess.CompletedProcess[str]:
        network = f"--net=/proc/{self.processes[service].pid}/ns/net"
        where = [*self._switch[:1], network, *self._switch[2:]]
        return subprocess.run([*where, *command], env=self._environment(), capture_output=True, text=True)

    def _wait_for(self, service: str) -> None:
        """Waits until the health check of a service passes."""
        it = self.services[service]
        kind, *check = it["healthcheck"]["test"] if "healthcheck" in it else ["CMD", *of_the_image()[1]]
        assert kind == "CMD"
        deadline = time.monotonic() + _PATIENCE
        while (done := self._inside(service, *(self._here(service, word) for word in check))).returncode != 0:
            has_ended = self.processes[service].poll() is not None
            if has_ended or time.monotonic() > deadline:
                said = self.log(service).read_text()[-3000:] if self.log(service).exists() else ""
                raise AssertionError(f"{service} is not healthy:\n{done.stdout}{done.stderr}\n{said}")
            time.sleep(0.2)

    def _end(self, service: str) -> None:
        for name in (service, *(["dns"] if service == "haproxy" else [])):
            process = self.processes.get(name)
            if process is not None:
                process.kill() if name == "dns" else process.terminate()
                process.wait(60)

    def _of_postgresql(self, words: list[str], environment: dict[str, str]) -> tuple[list[str], dict[str, str]]:
        """Does what the entry point of PostgreSQL's image does: makes a cluster, its user and its database."""
        data = self.data("postgresql", "/var/lib/postgresql/data")
        bin_ = binaries() or not_tested("PostgreSQL is not installed")
        for folder in (self.folder, data):
            shutil.chown(folder, "postgres")
        password = self.folder / "password"
        password.write_text(self.secrets["PGPASSWORD"])
        shutil.chown(password, "postgres")
        user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"]
        options = ["--no-sync", "--auth=trust", "--auth-host=scram-sha-256", "--encoding=UTF8"]
        own = [f"--username={environment['POSTGRES_USER']}", f"--pwfile={password}"]
        initdb = [*user, str(bin_ / "initdb"), "-D", str(data), *options, *own]
        subprocess.run(initdb, check=True, capture_output=True, cwd="/")
        with (data / "pg_hba.conf").open("a") as rules:
            rules.write("host all all all scram-sha-256\n")
        alone = [*user, str(bin_ / "postgres"), "--single", "-D", str(data), "postgres"]
        make = f"CREATE DATABASE {environment['POSTGRES_DB']}\n"
        subprocess.run(alone, check=True, capture_output=True, cwd="/", input=make.encode())
        listening = ["-c", "listen_addresses=*", "-c", "unix_socket_directories="]
        return [*user, str(bin_ / words[0]), *words[1:], *listening], {"PGDATA": str(data)}

    def _environment(self) -> dict[str, str]:
        postgresql = binaries()
        paths = [
            self.folder / "bin",
            Path(sys.executable).parent,
            postgresql,
            "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        ]
        kept = {
            name: value for name, value in os.environ.items() if not re.match("PREFIX_|AWS_|PG|.*_PROXY", name, re.I)
        }
        python = {"PYTHONPATH": f"{ROOT / 'service'}:{ROOT}"}
        return {**kept, **python, "PATH": ":".join(str(path) for path in paths if path), "HOME": str(self.folder)}

    def _paths(self, service: str) -> dict[str, str]:
        """Returns the paths that a container finds, and where they are on this machine."""
        it = self.services[service]
        found = {"/run/secrets": str(self.folder / "secrets")}
        for volume in it.get("volumes", []):
            source, target = volume.split(":")[:2]
            found[target] = str(ROOT / source) if source.startswith(".") else self._folder(f"volume-{source}")
        for mount in it.get("tmpfs", []):
            found[mount.split(":")[0]] = self._folder(f"{service}-{mount.split(':')[0].strip('/')}")
        for config in it.get("configs", []):
            found[config["target"]] = str(self.folder / f"config-{config['source']}")
        return found

    def _folder(self, name: str) -> str:
        path = self.folder / name
        path.mkdir(exist_ok=True)
        return str(path)

    def _here(self, service: str, text: str) -> str:
        """Returns a word of a command, or a value of a variable, with this machine's paths."""
        paths = self._paths(service)
        longest = "|".join(re.escape(path) for path in sorted(paths, key=len, reverse=True))
        found: Callable[[re.Match[str]], str] = lambda match: paths[match[0]]  # noqa: E731
        return re.sub(rf"(?<![\w/.-])(?:{longest})(?![\w-])", found, str(text).replace("$$", "$"))
