"""Multipart bodies as RFC 2046 allows them, however they are cut into pieces."""

import json
from collections.abc import Iterable

import httpx
import pytest

from prefix_service.api.dependencies.multipart import MultipartReader, Part
from prefix_service.errors import InvalidRequest
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


def test_the_pieces_of_a_body_do_not_matter() -> None:
    """Two pieces, three, or a byte at a time: the parts are the same, byte for byte."""
    assert parts_of([BODY]) == PARTS
    assert parts_of(BODY[at : at + 1] for at in range(len(BODY))) == PARTS
    for first in range(len(BODY)):
        for second in (first, first + 1, first + 7):
            assert parts_of([BODY[:first], BODY[first:second], BODY[second:]]) == PARTS


def test_preamble_folded_fields_and_blanks_are_accepted(admin: httpx.Client) -> None:
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
def test_malformed_bodies_are_refused(admin: httpx.Client, body: bytes) -> None:
    """422 with a reason, and nothing is published."""
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    answer = admin.post(versions_path(TENANT, "malformed"), content=body, headers=headers)
    problem(answer, 422, "invalid-request")
    problem(admin.get(f"/v1/tenants/{TENANT}/adapters/malformed"), 404)


@pytest.mark.parametrize("boundary", ["", ";boundary=", ";boundary=\xe9", ";boundary*=utf-8''%C3%A9"])
def test_a_boundary_is_needed(boundary: str) -> None:
    """A Content-Type without one, or with one that no line can have."""
    with pytest.raises(InvalidRequest, match="boundary"):
        MultipartReader(f"multipart/form-data{boundary}")


def names_of(disposition: bytes) -> list[str]:
    """The names of the parts of a body that has one part, with this Content-Disposition."""
    return [name for name, _ in parts_of([b"--x\r\nContent-Disposition: " + disposition + b"\r\n\r\n\r\n--x--"])]


@pytest.mark.parametrize(
    "disposition",
    [
        pytest.param(b'form-data; name="n"; filename="a b.bin"', id="curl"),
        pytest.param(b'form-data; name="n"; filename="a%22b;c=\xc3\xa9.bin"', id="a browser"),
        pytest.param(b"form-data; name=\"n\"; filename*=utf-8''a%20%C3%A9.bin", id="requests, in Python"),
        pytest.param(b'form-data; name="n"; filename="a\\"b\\\\; name=z"', id="Go"),
        pytest.param(b'form-data; filename="name=z"; name="n"', id="another order"),
        pytest.param(b"form-data;name=n;filename=a/b=c:d\xe9", id="unquoted"),
        pytest.param(b'form-data ;; Name\t = "\\n" ; ', id="blanks and nothing"),
        pytest.param(b"form-data; name*=z; name=n; name*0=z", id="beside RFC 2231"),
    ],
)
def test_parameters_are_read_as_clients_send_them(disposition: bytes) -> None:
    """The name is `n`, whatever the other parameters are."""
    assert names_of(disposition) == ["n"]


@pytest.mark.parametrize("boundary", ["----=_Part_0/1:2", '"a b"', '"\\a\\ b"', "a; charset=utf-8"])
def test_boundaries_are_read_as_clients_send_them(boundary: str) -> None:
    """Quoted, escaped, or with characters that should be quoted."""
    plain = "a" if ";" in boundary else boundary.replace('"', "").replace("\\", "")
    reader = MultipartReader(f"multipart/form-data; boundary={boundary}")
    head = b"Content-Disposition: form-data; name=n\r\n\r\n"
    assert list(reader.read(b"--%b\r\n%b\r\n--%b--" % (plain.encode(), head, plain.encode()))) == [Part("n")]


HOSTILE = [
    pytest.param("{}*%s=x" % ("1" * 5000), id="a number of 5000 digits"),
    pytest.param("{}*=a; {}*0=b", id="RFC 2231 in two ways"),
    pytest.param("{}*=nonsense''a%ff", id="an unknown character set"),
    pytest.param('a="' + ";" * 7_000, id="7,000 semicolons in an open quote"),
    pytest.param(';a="";b="' * 800, id="800 quotes"),
    pytest.param('{}="x', id="an open quote"),
    pytest.param('{}="x\\"', id="an escaped end of a quote"),
    pytest.param('{}="x"y', id="something behind a quote"),
    pytest.param("{}=x y", id="something behind a token"),
    pytest.param("{}", id="no value"),
    pytest.param("=x", id="no name"),
    pytest.param("{}=x; {}=x", id="twice"),
    pytest.param("{}=x; A=b; a=c", id="another parameter twice, with other letters"),
]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_parameters_are_refused(admin: httpx.Client, hostile: str) -> None:
    """422 with a reason, in the Content-Type and in a Content-Disposition."""
    path = versions_path(TENANT, "hostile")
    headers = {"Content-Type": "multipart/form-data; " + hostile.replace("{}", "boundary")}
    problem(admin.post(path, content=b"--x\r\n", headers=headers), 422, "invalid-request")
    head = f"--x\r\nContent-Disposition: form-data; {hostile.replace('{}', 'name')}\r\n\r\n--x--"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    problem(admin.post(path, content=head.encode(), headers=headers), 422, "invalid-request")


def test_field_values_are_bounded() -> None:
    """A value of 4 KiB is read, and one that is longer is not, so that no value takes long."""
    start = "multipart/form-data; boundary=x; a="
    MultipartReader(start + "b" * (4096 - len(start)))
    with pytest.raises(InvalidRequest, match="4097 characters, more than 4096"):
        MultipartReader(start + "b" * (4097 - len(start)))
