"""`python -m tests.container.names ADDRESS HOSTS` answers DNS from a file like /etc/hosts, as an engine does for its
containers.
"""

import socket
import sys
from pathlib import Path
from typing import Final

_ADDRESS: Final = b"\xc0\x0c\x00\x01\x00\x01\x00\x00\x00\x05\x00\x04"  # an A record of the question's name, for 5 s
_NONE, _UNKNOWN = b"\x81\x80", b"\x81\x83"


def answer(query: bytes, hosts: dict[str, str]) -> bytes:
    """Returns the answer to one question: an IPv4 address, nothing, or that there is no such name."""
    labels, at = [], 12
    while query[at]:
        labels.append(query[at + 1 : at + 1 + query[at]].decode())
        at += 1 + query[at]
    question = query[12 : at + 5]
    address = hosts.get(".".join(labels))
    is_found = address is not None and query[at + 1 : at + 3] == b"\x00\x01"
    flags = _UNKNOWN if address is None else _NONE
    head = query[:2] + flags + b"\x00\x01" + (b"\x00\x01" if is_found else b"\x00\x00") + bytes(4)
    return head + question + (_ADDRESS + socket.inet_aton(address) if is_found and address else b"")


def main(address: str, hosts: Path) -> None:
    """Answers until the process is ended."""
    names = {name: ip for ip, name in (line.split() for line in hosts.read_text().splitlines())}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((address, 53))
        while True:
            query, sender = server.recvfrom(512)
            server.sendto(answer(query, names), sender)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
