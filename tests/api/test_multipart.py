"""HARDENING.md 62: multipart bodies as RFC 2046 allows them, however they are cut into pieces."""

import json
from collections.abc import Iterable

import httpx
import pytest

from service.api.multipart import MultipartReader, Part
from service.errors import InvalidRequest
from tests.api.helpers import CONFIG, problem, upload, versions_path, weights

TENANT = "multipart"
WEIGHTS_HEAD = 'Content-Disposition: form-data; name="adapter_model.safetensors"; filename="a b"'
BODY = (
    b"preamble\r\n --x\r\n--x \t\r\n"
    b'Content-Disposition:\r\n form-data;\r\n\tname="first"\r\n\r\n'
    b"\r\n--xy\r\n--\r\r\n--x -\r\n --x\r\n--x\n\r\n--x   \t\r\n"
    b"Content-Type: text/plain\r\nCONTENT-DISPOSITION: form-data; name=second\r\n\r\n"
    b"\r\n--x--  \r\nepilogue\r\n--x\r\n"
)
PARTS = [("first", b"\r\n--xy\r\n--\r\r\n--x -\r\n --x\r\n--x\n"), ("second", b"")]


def parts_of(pieces: Iterable[bytes]) -> list[tuple[str, bytes]]:
    """Names and contents of a whole body with the boundary `x`."""
    reader, found = MultipartReader("multipart/form-data; boundary=x"), list[tuple[str, bytes]]()
    for piece in pieces:
        for event in reader.read(piece):
            if isinstance(event, Part):
                found.append((event.name, b""))
            else:
                found[-1] = (found[-1][0], found[-1][1] + event)
    assert reader.is_complete
    return found


def test_62_the_pieces_of_a_body_do_not_matter() -> None:
    """Two pieces, three, or a byte at a time: the parts are the same, byte for byte."""
    assert parts_of([BODY]) == PARTS
    assert parts_of(BODY[at : at + 1] for at in range(len(BODY))) == PARTS
    for first in range(len(BODY)):
        for second in (first, first + 1, first + 7):
            assert parts_of([BODY[:first], BODY[first:second], BODY[second:]]) == PARTS


def test_62_preamble_folded_fields_and_blanks_are_accepted(admin: httpx.Client) -> None:
    """An upload that uses all that RFC 2046 allows is the version that a plain one is."""
    config = json.dumps(CONFIG).encode()
    folded = WEIGHTS_HEAD.replace("; ", ";\r\n\t").encode()
    for number, body in enumerate(
        (
            b"This is a message in MIME format.\r\n\r\n--x\r\n%s\r\n\r\n%s\r\n--x\r\n%s\r\n\r\n%s\r\n--x--",
            b"--x \r\n%s\r\n\r\n%s\r\n--x\t \r\n%s\r\n\r\n%s\r\n--x-- \t\r\n",
            b"\r\n\r\n--x\r\n%s\r\n\r\n%s\r\n--x\r\n%s\r\n\r\n%s\r\n--x--\r\n\r\n--x\r\n",
        )
    ):
        head = b'Content-Disposition: form-data;\r\n name="adapter_config.json"'
        content = body % (head, config, folded, weights())
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        made = admin.post(versions_path(TENANT, f"rfc-{number}"), content=content, headers=headers)
        assert made.status_code == 201, made.text
        assert made.json()["digest"] == upload(admin, TENANT, "plain").json()["digest"]


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"--x\r\n\r\nhello\r\n--x--\r\n", id="no head"),
        pytest.param(b"--x\r\nA: b\r\n\r\nhello\r\n--x--\r\n", id="no Content-Disposition"),
        pytest.param(b"--x\r\nhello\r\n\r\nhello\r\n--x--\r\n", id="no field"),
        pytest.param(b"--x\r\n folded: a\r\n\r\nhello\r\n--x--\r\n", id="a folded first line"),
        pytest.param(b"--x\r\nContent-Disposition: form-data; name=a\nB: c\r\n\r\n\r\n--x--\r\n", id="a bare LF"),
        pytest.param(b"--x\r\n" + 2 * b"Content-Disposition: form-data; name=a\r\n" + b"\r\n\r\n--x--", id="two names"),
        pytest.param(b"--x\r\nA: " + b"b" * (16 << 10) + b"\r\n\r\n\r\n--x--\r\n", id="a long head"),
        pytest.param(b"--x\r\nContent-Disposition: form-data; name*=utf-16''%ff\r\n\r\n\r\n--x--", id="a strange name"),
        pytest.param(b"--y\r\nContent-Disposition: form-data; name=a\r\n\r\n\r\n--y--\r\n", id="another boundary"),
        pytest.param(b"--x--\r\n", id="no part"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_62_malformed_bodies_are_refused(admin: httpx.Client, body: bytes) -> None:
    """422 with a reason, and nothing is published."""
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    answer = admin.post(versions_path(TENANT, "malformed"), content=body, headers=headers)
    problem(answer, 422, "invalid-request")
    problem(admin.get(f"/v1/tenants/{TENANT}/adapters/malformed"), 404)


@pytest.mark.parametrize("boundary", ["", ";boundary=", ";boundary=\xe9", ";boundary*=utf-8''%C3%A9"])
def test_62_a_boundary_is_needed(boundary: str) -> None:
    """A Content-Type without one, or with one that no line can have."""
    with pytest.raises(InvalidRequest, match="boundary"):
        MultipartReader(f"multipart/form-data{boundary}")
