"""`python -m tests.tables` writes the tables of the pages that are made from code. A test compares them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from pydantic import BeforeValidator

from prefix_service.settings import Settings, variable
from prefix_service.system.sizes import written_bytes

ROOT: Final = Path(__file__).parents[1]
_BEGIN: Final = "<!-- {name}: made by `python -m tests.tables` -->\n"
_END: Final = "<!-- end -->\n"


def settings() -> str:
    """Returns the table of all settings, in the order of `Settings`."""
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = _written(field.default, is_size=any(isinstance(part, BeforeValidator) for part in field.metadata))
        rows.append(f"| `{variable(name)}` | {default} | {field.description} |")
    return "\n".join(rows) + "\n"


def _written(default: Any, *, is_size: bool) -> str:
    """Returns a default as an environment variable would hold it."""
    if default is None:
        return "none"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"`{written_bytes(default) if is_size else default}`"


TABLES: Final[dict[str, tuple[Path, Callable[[], str]]]] = {
    "settings": (ROOT / "service" / "prefix_service" / "deploy" / "README.md", settings),
}
"""Each table: the page that has it, and how it is made."""


def filled(name: str) -> str:
    """Returns the page of a table with the table as it should be."""
    page, make = TABLES[name]
    begin = _BEGIN.format(name=name)
    before, found, rest = page.read_text().partition(begin)
    _, ended, after = rest.partition(_END)
    if not found or not ended:
        raise ValueError(f"{page} has no place for the table of {name}: {begin.strip()} … {_END.strip()}")
    return before + begin + "\n" + make() + "\n" + _END + after


def main() -> None:
    """Writes every table into its page."""
    for name, (page, _) in TABLES.items():
        page.write_text(filled(name))


if __name__ == "__main__":
    main()
