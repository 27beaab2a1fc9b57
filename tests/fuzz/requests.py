"""Sends mutated requests on bare sockets, in one piece or several."""

import contextlib
import random
import socket
from pathlib import Path
from typing import Final, Literal
from urllib.parse import urlsplit

from tests.api.helpers import CONFIG, head, upload, weights
from tests.client.damaged import damaged
from tests.conftest import Server, running_server
from tests.fuzz.watch import Findings, look_at_log, rounds, watched

_PATIENCE: Final = 0.25  # seconds for an answer: most requests that are damaged in the middle get none
_ADAPTER: Final = "/v1/tenants/acme/adapters/a"


def originals(key: str) -> list[bytes]:
    """Returns sound requests: reads, conditions, bodies of each kind, `/v2`, and two on one connection."""
    fields = {"Authorization": f"Bearer {key}"}
    mask = b'{"attention_mask":[[0,1,1],[1,1,1]],"dtype":"float16","layers":"0:1"}'
    rows = b'{"rows":["acme/a@1",null,["acme/a","acme/a"]],"dtype":"float32"}'
    infer = b'{"inputs":[{"name":"batch_size","shape":[1],"datatype":"INT32","data":[2]}],"outputs":[]}'
    parts = (b'--b\r\nContent-Disposition: form-data; name="adapter_config.json"\r\n\r\n{}\r\n--b--\r\n',)
    json_type = {**fields, "Content_Type": "application/json"}
    chunked = b"5;a=b\r\n" + mask[:5] + b"\r\n%x\r\n" % (len(mask) - 5) + mask[5:] + b"\r\n0\r\nX-Trailer: y\r\n\r\n"
    conditions = {"If_None_Match": '"x", W/"y"', "Range": "bytes=10-99", "Want_Repr_Digest": "crc32c=3, sha-256=1"}
    posts = (
        (f"{_ADAPTER}/prefix", mask, json_type),
        ("/v1/prefixes", rows, json_type),
        ("/v2/models/acme/a/infer", infer, {**json_type, "Inference_Header_Content_Length": str(len(infer))}),
        (f"{_ADAPTER}/versions", parts[0], {**fields, "Content_Type": "multipart/form-data; boundary=b"}),
        ("/v2/repository/index", b'{"ready":true}', json_type),
    )
    get = head("GET", f"{_ADAPTER}@1/prefix?batch_size=2&layout=stacked&tp=0/2", **fields, **conditions)
    return [
        get,
        get + head("GET", "/livez"),
        head("GET", f"{_ADAPTER}?limit=2&cursor=YQ", **fields),
        head("PUT", f"{_ADAPTER}/aliases/prod", Content_Length="13", If_Match='"1"', **json_type) + b'{"version":1}',
        *(head("POST", path, Content_Length=str(len(body)), **given) + body for path, body, given in posts),
        head("POST", f"{_ADAPTER}/prefix", Transfer_Encoding="chunked", **json_type) + chunked,
        head("POST", f"{_ADAPTER}/prefix", Content_Length=str(len(mask)), Expect="100-continue", **json_type) + mask,
    ]


def fuzzed(folder: Path, seconds: float, seed: int, parser: Literal["httptools", "h11"]) -> Findings:
    """Sends mutated requests for so long to a service of its own."""
    findings, draw = Findings(), random.Random(seed)  # noqa: S311 - reproducible, not secret
    environment = {"PREFIX_HTTP_PARSER": parser, "PREFIX_RECEIVE_TIMEOUT": "5"}
    with running_server(folder / parser, environment=environment) as server:
        upload(server.client(), "acme", "a", CONFIG, file=weights())
        sound = originals(server.key("write", "acme"))
        for _ in rounds(seconds):
            if server.process.poll() is not None:
                break
            sent = damaged(draw, draw.choice(sound))
            with watched(server, findings, sent):
                findings.count(_status(server, sent, draw), sent)
        look_at_log(server, findings)
    return findings


def _status(server: Server, sent: bytes, draw: random.Random) -> int | None:
    address = urlsplit(server.url)
    with (
        contextlib.suppress(OSError, ValueError, IndexError),
        socket.create_connection((address.hostname, address.port), timeout=_PATIENCE) as connection,
    ):
        cut = draw.randrange(len(sent) + 1) if draw.random() < 0.3 else 0
        for piece in (sent[:cut], sent[cut:]):
            connection.sendall(piece)
        if draw.random() < 0.1:
            connection.shutdown(socket.SHUT_WR)
        return int(connection.recv(1 << 16).split(b" ", 2)[1])
    return None
