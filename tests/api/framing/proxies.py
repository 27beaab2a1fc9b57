"""Real proxies in front of a service. Each keeps one connection to the service, and uses it for all callers."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from tests.benchmarks.speed.peers import started
from tests.conftest import free_port
from tests.missing import not_tested

_NGINX: Final = """
daemon off;
{user}
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 64; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    map $http_upgrade $connection_upgrade {{ default upgrade; '' ''; }}
    upstream service {{ server {service}; keepalive 1; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://service;
            client_max_body_size 0;
            proxy_request_buffering {buffering};
            {connection}
        }}
    }}
}}
"""
_KEPT: Final = """
            proxy_http_version 1.1;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection $connection_upgrade;
"""
_CLOSED: Final = "proxy_http_version 1.0; proxy_set_header Connection close;"
_HAPROXY: Final = """
defaults
    mode http
    timeout connect 10s
    timeout client 10s
    timeout server 10s
    option http-keep-alive
    http-reuse always
frontend callers
    bind 127.0.0.1:{port}
    default_backend service
backend service
    server service {service}
"""


@contextmanager
def nginx(url: str, folder: Path, *, buffering: bool = False, kept: bool = True) -> Iterator[str]:
    """Yields the URL of nginx in front of the service at `url`. With `buffering` it sends a request on once it has the
    whole body. It forwards `Upgrade`; unless connections are `kept`, it asks in HTTP/1.0 with a connection for each
    request, as nginx does by default."""
    words = {"buffering": "on" if buffering else "off", "user": "user root;" if os.geteuid() == 0 else ""}
    words["connection"] = _KEPT if kept else _CLOSED
    with _proxy([_program("nginx"), "-p", str(folder), "-c"], _NGINX, url, folder, **words) as found:
        yield found


@contextmanager
def haproxy(url: str, folder: Path) -> Iterator[str]:
    """Yields the URL of HAProxy in front of the service at `url`."""
    with _proxy([_program("haproxy"), "-db", "-f"], _HAPROXY, url, folder) as found:
        yield found


@contextmanager
def _proxy(command: list[str], template: str, url: str, folder: Path, **words: str) -> Iterator[str]:
    folder.mkdir(parents=True, exist_ok=True)
    port, file = free_port(), folder / "proxy.conf"
    file.write_text(template.format(folder=folder, port=port, service=urlsplit(url).netloc, **words))
    with started([*command, str(file)], port):
        yield f"http://127.0.0.1:{port}"


def _program(name: str) -> str:
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    return path or not_tested(f"{name} is not installed")
