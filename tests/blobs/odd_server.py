"""An HTTP proxy in front of an S3 server, by which a test makes the server behave as odd ones do."""

import contextlib
import http.client
import http.server
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

_OF_THE_CONNECTION: Final = {"connection", "content-length", "transfer-encoding", "keep-alive"}


@dataclass
class Answer:
    """What the proxy is about to send: `announced` is the length of the body that its head promises."""

    method: str
    path: str
    status: int
    headers: dict[str, str]
    body: bytes
    announced: int


Change = Callable[[Answer], object]


@dataclass
class OddServer:
    """The proxy's address. `oddity` changes an answer before it is sent; `refusal` gives one in the server's place."""

    url: str
    oddity: Change = lambda _: None
    refusal: Callable[[str, str], tuple[int, str] | None] = lambda _method, _path: None
    asked: list[str] = field(default_factory=list)
    """The requests so far, as `METHOD /path`."""
    fields: list[dict[str, str]] = field(default_factory=list)
    """The header fields of each."""

    def refuses(self, method: str, status: int, code: str = "", times: int = 1_000_000) -> None:
        """Answers the next so many requests of a method by an S3 error."""
        left = iter(range(times))

        def refusal(asked: str, _path: str) -> tuple[int, str] | None:
            return (status, code) if asked == method and next(left, None) is not None else None

        self.refusal = refusal


@contextlib.contextmanager
def odd_server(target: str) -> Iterator[OddServer]:
    """Yields a proxy to the server at `target`, until the block ends."""
    address = urlsplit(target)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass_on(self) -> None:
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            odd.asked.append(f"{self.command} {self.path}")
            odd.fields.append(dict(self.headers))
            refused = odd.refusal(self.command, self.path)
            if refused is not None:
                status, code = refused
                shown = "<AWSAccessKeyId>the-tests</AWSAccessKeyId>"  # as AWS does in some answers
                body = f"<Error><Code>{code}</Code>{shown}</Error>".encode() if code else b""
                answer = Answer(self.command, self.path, status, {}, body, len(body))
            else:
                connection = http.client.HTTPConnection(str(address.hostname), int(address.port or 80), timeout=60)
                with contextlib.closing(connection):
                    connection.request(self.command, self.path, sent, dict(self.headers))
                    got = connection.getresponse()
                    body = got.read()
                    kept = {
                        name: value for name, value in got.headers.items() if name.lower() not in _OF_THE_CONNECTION
                    }
                    length = int(got.headers.get("Content-Length") or len(body))
                    answer = Answer(self.command, self.path, got.status, kept, body, length)
                odd.oddity(answer)
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(answer.announced))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)
                self.close_connection = len(answer.body) != answer.announced

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on  # noqa: N815 - the names of http.server

        def log_message(self, *_: object) -> None:
            """Writes no log."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        odd = OddServer(f"http://127.0.0.1:{server.server_address[1]}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield odd
        server.shutdown()
