"""Checks that the installed uvicorn and h11 have the private parts that this package overrides or uses."""

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from prefix_service.errors import InvalidInput
from prefix_service.system.source_probe import Touched, missing

WORKING: Final = {"uvicorn": "0.53 to 0.54", "h11": "0.16"}
"""The versions that pass the tests, which pyproject.toml demands. Earlier ones answer HTTP/1.0 without saying that the
connection ends (uvicorn 0.52), or accept malformed chunks (h11 0.15, CVE-2025-43859).
"""

_NEWEST: Final = {name: versions.rpartition(" ")[2] for name, versions in WORKING.items()}

_PROTOCOL: Final = {
    "__init__": ("config", "server_state", "app_state"),
    "connection_made": ("transport",),
    "connection_lost": ("exc",),
    "data_received": ("data",),
    **dict.fromkeys(
        (
            "pause_writing", "resume_writing", "on_response_complete", "shutdown", "_unset_keepalive_if_required",
            "loop", "transport", "flow", "cycle", "client", "server_state", "app_state", "timeout_keep_alive_task",
        ),
        (),
    ),
}  # fmt: skip
_CYCLE: Final = {
    "send": ("message",),
    **dict.fromkeys(
        (
            "scope", "disconnected", "keep_alive", "waiting_for_100_continue", "body", "more_body", "message_event",
            "response_started", "response_complete",
        ),
        (),
    ),
}  # fmt: skip

TOUCHED: Final[dict[str, Touched]] = {
    "uvicorn": {
        "protocols/http/httptools_impl.py": {
            "HttpToolsProtocol": {
                **_PROTOCOL,
                "on_header": ("name", "value"),
                "on_headers_complete": (),
                "on_body": ("body",),
                "on_message_complete": (),
                **dict.fromkeys(("parser", "url", "headers", "expect_100_continue", "pipeline"), ()),
            },
            "RequestResponseCycle": {**_CYCLE, "chunked_encoding": (), "expected_content_length": ()},
        },
        "protocols/http/h11_impl.py": {
            "H11Protocol": {**_PROTOCOL, "handle_events": (), "send_400_response": ("msg",), "conn": ()},
            "RequestResponseCycle": _CYCLE,
        },
        "protocols/http/flow_control.py": {
            "FlowControl": dict.fromkeys(("drain", "pause_reading", "write_paused"), ())
        },
        "server.py": {
            "Server": {"startup": ("sockets",), "shutdown": ("sockets",), "config": (), "server_state": ()},
            "ServerState": {"default_headers": ()},
        },
    },
    "h11": {
        "_receivebuffer.py": {
            "ReceiveBuffer": {
                "_extract": ("count",),
                "maybe_extract_lines": (),
                "maybe_extract_next_line": (),
                "_data": (),
                "_multiple_lines_search": (),
            }
        },
        "_connection.py": {
            "Connection": {
                "__init__": ("our_role", "max_incomplete_event_size"),
                "next_event": (),
                "send": ("event",),
                "send_with_data_passthrough": ("event",),
                "their_state": (),
                "_receive_buffer": (),
                "_reader": (),
            }
        },
        "_readers.py": {"ChunkedReader": {"_bytes_in_chunk": ()}},
    },
}


def require_parsers() -> None:
    """Checks the uvicorn and the h11 that are installed.

    Raises:
        InvalidInput: one of them lacks a part.
        ModuleNotFoundError: one of them is not installed.
    """
    for name in TOUCHED:
        spec = find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        check(name, version(name), Path(spec.submodule_search_locations[0]))


def check(name: str, found: str, package: Path) -> None:
    """Checks uvicorn or h11 by its version and its folder.

    Raises:
        InvalidInput: it lacks a part.
    """
    if lacks := missing(name, package, TOUCHED[name]):
        newest = f"{name}[standard]" if name == "uvicorn" else name
        raise InvalidInput(
            f"this prefix-service works with {name} {WORKING[name]}; {name} {found}, which is installed, lacks parts "
            f"that its connections are built on: {', '.join(lacks)}. Run pip install '{newest}=={_NEWEST[name]}.*', or "
            f"install a prefix-service that works with {name} {found}"
        )
