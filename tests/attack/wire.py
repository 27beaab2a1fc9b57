"""Requests as an attacker sends them: over bare connections, in pieces, without reading the answers."""

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

CUT: Final = "cut off"
"""The answer of a connection that ended before a status came."""
OPEN: Final = "no answer"
"""The answer of a connection that was still open, without a status, when the attack ended."""


@dataclass(frozen=True, slots=True)
class Target:
    """The service under attack, the attacker's keys, and how long the attack lasts."""

    host: str
    port: int
    keys: Mapping[str, str]
    seconds: float


@dataclass
class Connection:
    """One connection of an attacker."""

    target: Target
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    answers: "Answers"

    async def send(self, *pieces: bytes) -> None:
        """Send as much as the service takes; a connection that it ended is no error."""
        with contextlib.suppress(OSError):
            for piece in pieces:
                self.writer.write(piece)
                await self.writer.drain()

    async def status(self) -> tuple[int, int] | None:
        """Read the head of one answer and count its status. Returns it with the length of the body, which nobody has
        read; None if the connection ended before."""
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
        except (OSError, asyncio.IncompleteReadError):
            self.answers.count(CUT)
            return None
        except asyncio.CancelledError:
            self.answers.count(OPEN)
            raise
        status = int(head.split(b" ", 2)[1])
        self.answers.count(str(status))
        fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:] if b":" in line)
        return status, int(fields.get(b"content-length", b"0"))

    async def answer(self) -> int | None:
        """Read one answer and count its status; None if the connection ended before."""
        if (found := await self.status()) is None:
            return None
        status, left = found
        while left > 0 and (piece := await self.reader.read(min(left, 1 << 16))):
            left -= len(piece)
        return status


@dataclass
class Answers:
    """What an attacker got, by status."""

    by_status: Counter[str] = field(default_factory=Counter)

    def count(self, status: str) -> None:
        """Count one."""
        self.by_status[status] += 1


def head(target: Target, method: str, path: str, key: str | None, **fields: str) -> bytes:
    """Returns the head of a request; `key` is the scope of the attacker's key, and underscores are hyphens."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {target.host}:{target.port}"]
    if key is not None:
        lines.append(f"Authorization: Bearer {target.keys.get(key, key)}")
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
    return "\r\n".join([*lines, "", ""]).encode()


def request(target: Target, method: str, path: str, key: str | None, body: bytes = b"", **fields: str) -> bytes:
    """Returns a whole request."""
    if body:
        fields = {"Content_Type": "application/json", "Content_Length": str(len(body)), **fields}
    return head(target, method, path, key, **fields) + body


def as_json(value: object) -> bytes:
    """Returns JSON without blanks."""
    return json.dumps(value, separators=(",", ":")).encode()


def form(parts: Mapping[str, bytes]) -> tuple[bytes, str]:
    """Returns a multipart body and its content type."""
    boundary = "attack"
    pieces = []
    for name, content in parts.items():
        pieces.append(f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode())
        pieces += [content, b"\r\n"]
    pieces.append(f"--{boundary}--\r\n".encode())
    return b"".join(pieces), f"multipart/form-data; boundary={boundary}"


@contextlib.asynccontextmanager
async def connected(target: Target, answers: Answers) -> AsyncIterator[Connection | None]:
    """Yields a connection, or None where the service takes no more."""
    try:
        reader, writer = await asyncio.open_connection(target.host, target.port, limit=1 << 17)
    except OSError:
        answers.count(CUT)
        yield None
        return
    try:
        yield Connection(target, reader, writer, answers)
    finally:
        writer.transport.abort()


Step = Callable[[Connection], Awaitable[object]]


async def repeatedly(target: Target, answers: Answers, connections: int, step: Step) -> None:
    """Take `step` again and again on so many connections, until the attack ends; an ended one is opened again."""
    until = time.monotonic() + target.seconds

    async def one() -> None:
        while time.monotonic() < until:
            async with connected(target, answers) as connection:
                while connection is not None and time.monotonic() < until:
                    if await step(connection) is None:
                        break
                else:
                    await asyncio.sleep(0.01)

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(target.seconds), asyncio.TaskGroup() as tasks:
            for _ in range(connections):
                tasks.create_task(one())


async def once_each(target: Target, answers: Answers, connections: int, step: Step) -> None:
    """Take `step` once on each of so many connections, which stay open until the attack ends."""

    async def one() -> None:
        async with connected(target, answers) as connection:
            if connection is not None:
                await step(connection)
                await asyncio.sleep(target.seconds)

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(target.seconds), asyncio.TaskGroup() as tasks:
            for _ in range(connections):
                tasks.create_task(one())
