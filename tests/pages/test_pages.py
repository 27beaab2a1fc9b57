"""The pages have the right size and order, links that lead somewhere, and tables that are true."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import urldefrag

import pytest

from prefix_service import errors
from prefix_service.api.http.problems import STATUSES
from tests.pages.markdown import PACKAGE, PAGES, README, ROOT, anchors, links, snippets

OF_CLIENT: Final = {errors.BaseModelMismatch, errors.DimensionMismatch, errors.InvalidResponse, errors.ConnectionFailed}
"""The errors that only the client raises."""
API: Final = PACKAGE / "api" / "README.md"
HEADINGS: Final = [
    "Run it",
    "Words",
    "First request",
    "Connect a worker",
    "vLLM",
    "Four numbers",
    "Where to read on",
    "Install it on a worker",
    "Security",
    "Contributing",
]
ASKED: Final = {
    "publish my adapter": (PACKAGE / "checkpoints" / "README.md", "publish-my-adapter"),
    "transformers": (PACKAGE / "client" / "transformers" / "README.md", "generate"),
    "vLLM": (PACKAGE / "client" / "vllm" / "README.md", "the-server"),
    "Triton's client": (PACKAGE / "api" / "open_inference" / "README.md", "tritons-client"),
    "other languages": (API, "from-nodejs-go-java-and-the-shell"),
    "one machine": (PACKAGE / "deploy" / "README.md", "one-machine"),
    "systemd": (PACKAGE / "deploy" / "README.md", "systemd"),
    "container": (PACKAGE / "deploy" / "README.md", "container"),
    "Kubernetes": (PACKAGE / "deploy" / "README.md", "kubernetes"),
    "TLS behind nginx": (PACKAGE / "deploy" / "README.md", "tls-behind-nginx"),
    "a tenant and its key": (PACKAGE / "cli" / "README.md", "a-tenant-and-its-key"),
    "rotate a key": (PACKAGE / "cli" / "README.md", "rotate-a-key"),
    "roll back": (PACKAGE / "cli" / "README.md", "roll-out-and-roll-back"),
    "size the budgets": (PACKAGE / "deploy" / "README.md", "size-the-budgets"),
    "what happens when something is away": (PACKAGE / "deploy" / "README.md", "what-happens-when-something-is-away"),
    "upgrade and the way back": (PACKAGE / "deploy" / "README.md", "upgrade-and-the-way-back"),
    "Prometheus": (PACKAGE / "deploy" / "README.md", "prometheus"),
}


def test_the_front_page_is_short() -> None:
    """The front page has 8 to 10 kB, in the order in which a reader needs them."""
    text = README.read_text()
    assert 8_000 <= len(text.encode()) <= 10_000
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == HEADINGS


def test_the_commands_come_first() -> None:
    """The first two commands come first, after a picture of at most twelve lines of 80 columns."""
    picture, install, gate, *_ = snippets(README)
    assert picture.language == "text"
    assert picture.text.count("\n") <= 12
    assert max(map(len, picture.text.splitlines())) <= 80
    assert (install.text.count("\n"), gate.text) == (1, "bash tests/run\n")


@pytest.mark.parametrize("question", ASKED)
def test_every_question_has_its_place(question: str) -> None:
    """A section of at most 45 lines, on a page that the front page links to, answers each question."""
    page, anchor = ASKED[question]
    assert anchor in anchors(page)
    assert str(page.relative_to(ROOT)) in {urldefrag(link).url for link in links(README)}
    sections = re.split(r"^(?=#+ )", page.read_text(), flags=re.MULTILINE)
    (found,) = (part for part in sections if part.startswith("#") and _anchor(part) == anchor)
    assert found.count("\n") <= 45


def _anchor(section: str) -> str:
    heading = section.splitlines()[0].lstrip("# ")
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """A link leads to a file of this repository and a heading in it; the test follows no link to the internet."""
    for link in links(page):
        if "://" in link:
            continue
        path, fragment = urldefrag(link)
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT)
        if fragment:
            assert fragment in anchors(target), link


@pytest.mark.parametrize(
    ("page", "heading"),
    [
        (ROOT / ".github" / "SECURITY.md", "| who | may | and cannot |"),
        (PACKAGE / "deploy" / "README.md", "| away | then | held by |"),
    ],
    ids=["security", "outages"],
)
def test_every_promise_names_its_test(page: Path, heading: str) -> None:
    """Each row of the tables of promises, on callers and on outages, links to the test that holds it."""
    table = page.read_text().partition(f"{heading}\n")[2].partition("\n\n")[0]
    rows = table.splitlines()[1:]
    assert len(rows) > 6
    assert [row for row in rows if not re.search(r"\]\((\.\./)+tests/\S+\)", row)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_fit(page: Path) -> None:
    """Lines have at most 120 columns, except a table's rows and commands of one line."""
    assert [
        line
        for line in page.read_text().splitlines()
        if len(line) > 120 and not line.startswith(("|", "python3 -m venv", "old="))
    ] == []


def test_the_table_of_errors_is_complete() -> None:
    """The table has every code with its status, and no other code."""
    rows = re.findall(r"^\| (`[a-z-]+`(?:, `[a-z-]+`)*) \| (\d{3}) \|", API.read_text(), re.MULTILINE)
    listed = {code: int(status) for codes, status in rows for code in re.findall(r"`([a-z-]+)`", codes)}
    of_service = {kind for kind in _kinds(errors.PrefixServiceError) if kind not in OF_CLIENT}
    statuses = {kind.code: next(STATUSES[base] for base in kind.__mro__ if base in STATUSES) for kind in of_service}
    assert listed == {**statuses, "method-not-allowed": 405}


def _kinds(base: type[errors.PrefixServiceError]) -> Iterator[type[errors.PrefixServiceError]]:
    for kind in base.__subclasses__():
        yield kind
        yield from _kinds(kind)
