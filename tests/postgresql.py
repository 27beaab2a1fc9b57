"""Starts a PostgreSQL server for the tests, and makes fresh databases on it."""

import contextlib
import getpass
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psycopg

_TEMPLATE: Final = "template"
_SUPERUSER: Final = "postgres"


def binaries() -> Path | None:
    """Returns the folder of `initdb` and `postgres`: from PATH, else the newest that Debian installs outside of it."""
    on_path = shutil.which("initdb")
    if on_path is not None:
        return Path(on_path).resolve().parent
    installed = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    return max((found.parent for found in installed), key=lambda bin_: int(bin_.parent.name), default=None)


class PostgreSQL:
    """A server on a Unix socket in a temporary folder, and on a TCP port with TLS; it has a language's sort order and a
    time zone of its own. `authority` is the file of the authority of its certificate, for `localhost`.
    """

    def __init__(self, bin_: Path, port: int) -> None:
        self._bin, self._port = bin_, port
        # This is not pytest's folder, which is the owner's alone: PostgreSQL refuses to run as root.
        self._folder = Path(tempfile.mkdtemp(prefix="prefix-pg-"))
        self._user = _SUPERUSER if os.getuid() == 0 else getpass.getuser()
        shutil.chown(self._folder, self._user)
        self._count = itertools.count()
        language = ("--encoding=UTF8", "--locale=C.UTF-8", "--locale-provider=icu", "--icu-locale=en-US")
        options = (f"--username={_SUPERUSER}", "--auth=trust", "--no-sync", "--no-instructions", *language)
        subprocess.run(self._command("initdb", *options), check=True, capture_output=True, cwd=self._folder)
        self.authority, key = self._folder / "server.pem", self._folder / "server.key"
        request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
        request += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(self.authority)]
        subprocess.run(request, check=True, capture_output=True)
        shutil.chown(key, self._user)
        self._tls = ("ssl=on", f"ssl_cert_file={self.authority}", f"ssl_key_file={key}")
        self.start()

    def start(self) -> None:
        """Starts the server, and waits until it answers."""
        socket = ("-k", str(self._folder), "-p", str(self._port), "-c", "listen_addresses=127.0.0.1")
        settings = (*self._tls, "fsync=off", "max_connections=200", "timezone=Asia/Tokyo", "deadlock_timeout=50ms")
        options = (*(word for setting in settings for word in ("-c", setting)), *socket)
        with self.log.open("ab") as log:
            command = self._command("postgres", *options)
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self._folder)
        deadline = time.monotonic() + 60
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start:\n{self.log.read_text()}")
            time.sleep(0.05)

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Stops the server, which breaks off every session, until the block ends."""
        self._stop()
        try:
            yield
        finally:
            self.start()

    @contextlib.contextmanager
    def killed(self) -> Iterator[None]:
        """Kills every process of the server until the block ends."""
        for pid in self._pids():
            os.kill(pid, signal.SIGKILL)
        self._process.wait(30)
        try:
            yield
        finally:
            self.start()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Stops every process of the server, whose kernel goes on to accept connections, until the block ends."""
        pids = self._pids()
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    def _pids(self) -> list[int]:
        """Returns the processes of the server, the first of which starts the others."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        return [self._process.pid, *map(int, children.read_text().split())]

    @property
    def log(self) -> Path:
        """The file that the server writes its log to."""
        return self._folder / "log"

    @property
    def port(self) -> int:
        """The TCP port of the server."""
        return self._port

    def cut_notifications_off(self, database: str) -> None:
        """Makes NOTIFY by `pg_notify` do nothing in a database, for connections that begin from now on."""
        self.execute("CREATE FUNCTION public.pg_notify(text, text) RETURNS void LANGUAGE sql AS 'SELECT'", database)
        self.execute(f"ALTER DATABASE {database} SET search_path = public, pg_catalog")

    def let_notifications_through(self, database: str) -> None:
        """Makes NOTIFY work again, for connections that begin from now on."""
        self.execute(f"ALTER DATABASE {database} RESET search_path")
        self.execute("DROP FUNCTION public.pg_notify(text, text)", database)

    def end_sessions(self, database: str) -> None:
        """Breaks off every session of a database."""
        query = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database}'"  # noqa: S608
        self.execute(query)

    def remove(self) -> None:
        """Stops the server, and removes its folder."""
        self._stop()
        shutil.rmtree(self._folder)

    def url(self, database: str) -> str:
        """Returns the URL of a database."""
        return f"postgresql+psycopg://{_SUPERUSER}@/{database}?host={self._folder}&port={self._port}"

    def tls_url(self, database: str) -> str:
        """Returns the URL of a database over TCP, which demands TLS of no authority yet."""
        return f"postgresql+psycopg://{_SUPERUSER}@localhost:{self._port}/{database}?sslmode=verify-full"

    def new_database(self, template: str = "template0") -> str:
        """Makes a database as a copy of another one, and returns its name."""
        name = f"test_{next(self._count)}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY")  # quick without fsync
        return name

    def drop(self, database: str) -> None:
        """Drops a database, whoever is still connected."""
        self.execute(f"DROP DATABASE {database} WITH (FORCE)")

    def execute(self, statement: str, database: str = "postgres") -> None:
        """Runs a statement as the superuser."""
        with self._connect(database) as connection:
            connection.execute(statement.encode())

    def _stop(self) -> None:
        self._process.send_signal(signal.SIGINT)
        self._process.wait(30)

    def _connect(self, database: str) -> psycopg.Connection:
        return psycopg.connect(
            host=str(self._folder), port=self._port, user=_SUPERUSER, dbname=database, autocommit=True
        )

    def _answers(self) -> bool:
        try:
            self._connect("postgres").close()
        except psycopg.OperationalError:
            return False
        return True

    def _command(self, name: str, *options: str) -> list[str]:
        # The server ends with these tests, even if they are killed.
        setpriv = ["setpriv", "--pdeathsig=INT"]
        if self._user != getpass.getuser():
            setpriv += [f"--reuid={self._user}", f"--regid={self._user}", "--init-groups"]
        return [*setpriv, str(self._bin / name), "-D", str(self._folder / "data"), *options]
