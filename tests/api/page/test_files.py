"""The files of the page: copies are what the registry has, and nothing is loaded from elsewhere."""

import gzip
import re
from hashlib import sha256
from pathlib import Path
from typing import Final

import httpx

from prefix_service import errors
from prefix_service.api.http.page_files import PAGE_FILES, PAGE_FOLDER
from prefix_service.api.http.public_pages import CONTENT_SECURITY_POLICY
from tests.conftest import Server

VENDOR: Final = PAGE_FOLDER / "vendor"
IMPORTS: Final = re.compile(r"""(?:^import[^;]*?from|^export[^;]*?from|[;}]import[^;]*?from)\s*"([^"]+)";?""", re.M)
LATER: Final = re.compile(r'import\(\s*"([^"]+)"')
REWRITTEN: Final = {"./preact.js": "preact", "./hooks.js": "preact/hooks", "./signals-core.js": "@preact/signals-core"}


def test_copies_are_what_the_registry_has() -> None:
    """Each file of the folder is listed with its hash, the way back from relative specifiers taken."""
    listed = dict(
        re.findall(r"^\| `(.+?)` \| .+ \| `([0-9a-f]{64})` \|$", (VENDOR / "README.md").read_text(), re.MULTILINE)
    )
    copies = {}
    for file in VENDOR.iterdir():
        if file.name != "README.md":
            data = file.read_bytes()
            for ours, theirs in REWRITTEN.items():
                data = data.replace(f'from"{ours}"'.encode(), f'from"{theirs}"'.encode())
            copies[file.name] = sha256(data).hexdigest()
    assert copies == listed


def test_every_import_is_a_file_of_the_page() -> None:
    """Specifiers are relative, and lead to what the service serves: a browser would ask for nothing else."""
    found = 0
    for file in PAGE_FOLDER.rglob("*.js"):
        text = file.read_text()
        for specifier in (*IMPORTS.findall(text), *LATER.findall(text)):
            assert specifier.startswith("."), (file, specifier)
            target = (file.parent / specifier).resolve().relative_to(PAGE_FOLDER.resolve()).as_posix()
            assert f"/ui/{target}" in PAGE_FILES, (file, specifier)
            found += 1
    assert found > 20


def test_no_script_writes_markup_or_text_as_code() -> None:
    """Our own scripts contain nothing that turns text into markup or code."""
    forbidden = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|localStorage")
    for file in (*PAGE_FOLDER.glob("*.js"), *PAGE_FOLDER.glob("views/*.js")):
        assert forbidden.search(file.read_text()) is None, file


def test_every_error_has_words() -> None:
    """Now says of each code that the service can answer with what it means, and what to do."""
    of_clients = {"error", "base-model-mismatch", "dimension-mismatch", "invalid-response", "connection-failed"}
    codes = {getattr(errors, name).code for name in errors.__all__} - of_clients
    words = re.findall(
        r'^  "([a-z-]+)": \["(?:warn|bad)?", "', (PAGE_FOLDER / "views" / "problems.js").read_text(), re.M
    )
    assert set(words) == codes | {"method-not-allowed", "aborted"}


def test_every_action_of_the_audit_is_offered() -> None:
    """The view's filter has each action that the service records."""
    folders = (PAGE_FOLDER.parents[1] / wing for wing in ("catalog", "library"))
    sources = "".join(file.read_text() for folder in folders for file in folder.glob("*.py"))
    recorded = set(re.findall(r'"((?:adapter|alias|key|residency|tenant|version)\.[a-z]+)"', sources))
    routes = (PAGE_FOLDER.parent / "routes" / "descriptions.py").read_text()
    recorded |= {f"{what}.changed" for what in re.findall(r'\(tenant, ref\), "([a-z-]+)"', routes)}
    listed = (PAGE_FOLDER / "views" / "audit.js").read_text().partition("];")[0]
    assert set(re.findall(r'"([a-z-]+\.[a-z]+)"', listed)) == recorded
    assert len(recorded) > 10


def test_they_are_served_under_the_strict_policy(server: Server) -> None:
    """Every file, as it is in the package; compressed for a browser, with an entity tag."""
    with httpx.Client(base_url=server.url) as client:
        for path, (file, media_type) in PAGE_FILES.items():
            answer = client.get(path)
            assert answer.status_code == 200, path
            assert answer.headers["content-type"] == media_type
            assert answer.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
            assert answer.headers["content-encoding"] == "gzip"
            assert answer.content == (PAGE_FOLDER / file).read_bytes()
            plain = client.get(path, headers={"Accept-Encoding": "identity"})
            assert "content-encoding" not in plain.headers
            assert plain.content == answer.content
            assert plain.headers["etag"] != answer.headers["etag"]
            assert client.get(path, headers={"If-None-Match": answer.headers["etag"]}).status_code == 304


def _imported(file: Path) -> set[Path]:
    """A file, and all that it imports before it runs."""
    found, left = set[Path](), [file]
    while left:
        if (file := left.pop()) not in found:
            found.add(file)
            left += [(file.parent / name).resolve() for name in IMPORTS.findall(file.read_text())]
    return found


def test_the_first_view_is_small() -> None:
    """With its curves, it is below 80 kB as it is sent."""
    files = {PAGE_FOLDER / "index.html", PAGE_FOLDER / "style.css", PAGE_FOLDER / "icon.svg", VENDOR / "uplot.css"}
    for script in (PAGE_FOLDER / "app.js", PAGE_FOLDER / "views" / "now.js", VENDOR / "uplot.js"):
        files |= _imported(script.resolve())
    sizes = {file.name: len(gzip.compress(file.read_bytes())) for file in files}
    assert {"signals-core.js", "chart.js", "signin.js"} < sizes.keys()
    assert "adapter.js" not in sizes
    assert sum(sizes.values()) < 80_000, sizes
