"""The files of the page at `/ui`, which need no key: whatever shows data asks the API for it."""

from pathlib import Path
from typing import Final

PAGE_FOLDER: Final = Path(__file__).parents[1] / "page"
_MEDIA_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}


def _path(file: Path) -> str:
    return "/ui" if file.name == "index.html" else f"/ui/{file.relative_to(PAGE_FOLDER).as_posix()}"


PAGE_FILES: Final = {
    _path(file): (file.relative_to(PAGE_FOLDER).as_posix(), _MEDIA_TYPES[file.suffix])
    for file in sorted(PAGE_FOLDER.rglob("*"))
    if file.suffix in _MEDIA_TYPES
}
"""Each file of `api/page/` that a browser loads, by its path: its place in the folder, and its media type."""
