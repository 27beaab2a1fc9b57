"""One service and one browser for all tests of the page: Debian's Chromium, driven by Playwright."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect, sync_playwright

from tests.api.helpers import CONFIG, weights
from tests.conftest import Server, running_server
from tests.missing import not_tested

HOSTILE = '<script>window.pwned=1</script><svg onload="pwned=1"> [x](javascript:pwned=1) \u202egnp.exe'
LONG = "x" * 4096
PATIENCE = 60_000  # milliseconds that a test waits for what must come


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service with a tenant whose adapter has three versions, and another with texts that mean harm."""
    with running_server(tmp_path_factory.mktemp("page") / "data") as running:
        admin = running.client()
        for seed in range(3):
            publish(admin, "summarize", {**CONFIG, "revision": f"r{seed}"}, seed, "# Summaries", {"author": "Ada"})
        hostile = {**CONFIG, "base_model_name_or_path": HOSTILE, "revision": HOSTILE + "y" * 20_000}
        card = f"# {HOSTILE}\n" + "z" * 200_000
        publish(admin, "hostile", {**CONFIG, "inference_mode": False}, 8, "", {})
        publish(admin, "hostile", hostile, 9, card, {"note": HOSTILE, "long": LONG})
        admin.put("/v1/tenants/acme/adapters/summarize/aliases/prod", json={"version": 1})
        admin.post("/v1/tenants/acme/keys", json={"scope": "read", "name": HOSTILE})
        for _ in range(20):
            assert admin.get("/v1/tenants/acme/adapters/summarize@prod/prefix").status_code == 200
            assert admin.get("/v1/tenants/acme/adapters/none").status_code == 404
        yield running


def publish(
    client: httpx.Client, name: str, config: dict[str, Any], seed: int, card: str, annotations: dict[str, str]
) -> None:
    """Publish a version with its card and annotations."""
    files = {"adapter_config.json": json.dumps(config).encode(), "README.md": card.encode()}
    files |= {"annotations": json.dumps(annotations).encode(), "adapter_model.safetensors": weights(seed)}
    answer = client.post(f"/v1/tenants/acme/adapters/{name}/versions", files=files)
    assert answer.status_code == 201, answer.text


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = shutil.which("chromium")
    if found is None:
        not_tested("Chromium is not installed")
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])  # it refuses root with one
        yield browser
        browser.close()


@dataclass
class Seen:
    """A tab, with what went wrong in it."""

    page: Page
    url: str
    errors: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    def open(self, view: str, title: str) -> None:
        """Go to a view, and wait for its heading."""
        self.page.goto(f"{self.url}/ui#/{view}")
        self.page.get_by_role("heading", level=1, name=title, exact=True).wait_for()

    def sign_in(self, key: str) -> None:
        self.page.goto(f"{self.url}/ui")
        self.page.get_by_label("Key", exact=True).fill(key)
        self.page.get_by_role("button", name="Sign in").click()
        self.page.get_by_role("navigation").wait_for()

    def expect_refusal(self, status: int) -> None:
        """Take the one error that a browser itself writes of a refused call."""
        (error,) = self.errors
        assert f"status of {status} " in error
        self.errors.clear()


@pytest.fixture
def seen(service: Server, browser: Browser) -> Iterator[Seen]:
    """A browser that has not signed in. In the end nothing was asked of another origin, and nothing failed."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(PATIENCE)
    seen = Seen(context.new_page(), service.url)
    _watch(context, seen)
    yield seen
    context.close()
    assert seen.foreign == []
    assert seen.errors == []


def _watch(context: BrowserContext, seen: Seen) -> None:
    def guard(route: Route) -> None:
        seen.foreign.append(route.request.url)
        route.abort()

    context.route(lambda url: not url.startswith((f"{seen.url}/", "data:")), guard)
    told = "addEventListener('securitypolicyviolation', (event) => console.error(`CSP: ${event.violatedDirective}`))"
    context.add_init_script(told)
    seen.page.on("console", lambda told: seen.errors.append(told.text) if told.type == "error" else None)
    seen.page.on("pageerror", lambda error: seen.errors.append(str(error)))
    seen.page.on("dialog", lambda dialog: seen.errors.append(dialog.message))


@pytest.fixture
def admin_page(service: Server, seen: Seen) -> Seen:
    """A browser in which the platform's admin has signed in."""
    seen.sign_in(service.admin_key)
    return seen


@pytest.fixture
def adapter_folder(tmp_path: Path) -> Path:
    """A folder as PEFT writes it."""
    folder = tmp_path / "dropped"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    (folder / "adapter_model.safetensors").write_bytes(weights(77))
    (folder / "README.md").write_text("# Dropped")
    return folder
