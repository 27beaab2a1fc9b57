"""Local servers: a hub that speaks the endpoints of the Hugging Face Hub, and whatever a redirect leads to."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final
from urllib.parse import unquote

COMMIT: Final = hashlib.sha1(b"the only commit").hexdigest()  # noqa: S324 - as git names a commit


@dataclass
class Seen:
    """The requests that a server received: method, path, and headers with names in lower case."""

    url: str
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)

    def paths(self, method: str) -> list[str]:
        """Returns the paths of the requests of one method, in order."""
        return [path for each, path, _ in self.requests if each == method]

    def authorizations(self) -> set[str | None]:
        """Returns the values of `Authorization` that came."""
        return {headers.get("authorization") for _, _, headers in self.requests}


class Handler(BaseHTTPRequestHandler):
    """Records each request, and answers by the functions of its server."""

    protocol_version = "HTTP/1.1"
    seen: Seen

    def do_GET(self) -> None:
        """Answers a request, whose body it drops."""
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.seen.requests.append((self.command, self.path, headers))
        status, fields, body = self.answer(unquote(self.path.partition("?")[0]), headers)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **fields}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 - the base class's names

    def answer(self, path: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        """Returns status, header fields and body."""
        raise NotImplementedError

    def log_message(self, *_: object) -> None:
        """Writes nothing."""


@contextlib.contextmanager
def serving(handler: type[Handler]) -> Iterator[Seen]:
    """Serves until the block ends; yields the address, and what comes."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.seen = Seen(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield handler.seen
    finally:
        server.shutdown()
        thread.join(30)
        server.server_close()


def hub_handler(repositories: dict[str, dict[str, bytes]], storage: str, sizes: dict[str, int]) -> type[Handler]:
    """Returns a hub of repositories that needs the token `hf_secret`, and sends large files from `storage`.

    `sizes` are announced in place of the real ones. A repository whose name ends with `-gated` is gated.
    """

    class Hub(Handler):
        def answer(self, path: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
            if headers.get("authorization") != "Bearer hf_secret":
                return _error(401, "RepoNotFound")
            is_api = path.startswith("/api/models/")
            owner, name, *rest = path.removeprefix("/api/models").strip("/").split("/")
            repository = f"{owner}/{name}"
            files = repositories.get(repository)
            if files is None:
                return _error(404, "RepoNotFound")
            if repository.endswith("-gated"):
                return _error(403, "GatedRepo")
            revision = rest[1] if len(rest) > 1 else "main"
            if revision not in ("main", "v1", COMMIT):
                return _error(404, "RevisionNotFound")
            if is_api:
                siblings = [
                    {"rfilename": file, "size": sizes.get(file, len(data)), "blobId": _etag(data)}
                    for file, data in files.items()
                ]
                described = {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings}
                return 200, {"Content-Type": "application/json"}, json.dumps(described).encode()
            file = "/".join(rest[2:])
            if file not in files:
                return _error(404, "EntryNotFound")
            data = files[file]
            fields = {"X-Repo-Commit": COMMIT, "ETag": f'"{_etag(data)}"'}
            if not file.endswith((".safetensors", ".pt")):
                return 200, fields, data
            linked = {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{_etag(data)}"'}
            return 302, {**fields, **linked, "Location": f"{storage}/{repository}/{file}?signature=secret"}, b""

    return Hub


def storage_handler(files: dict[str, bytes]) -> type[Handler]:
    """Returns a server of large files by path, to which others redirect."""

    class Storage(Handler):
        def answer(self, path: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
            data = files.get(path.strip("/"))
            return (404, {}, b"") if data is None else (200, {"ETag": f'"{_etag(data)}"'}, data)

    return Storage


def _error(status: int, code: str) -> tuple[int, dict[str, str], bytes]:
    return status, {"X-Error-Code": code}, b"{}"


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
