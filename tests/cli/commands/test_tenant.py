"""`tenant` sets quotas and shows usage, and `audit` shows who changed what."""

import json
from typing import Any

import pytest

from prefix_service.system.sizes import human_bytes
from tests.cli.conftest import Run
from tests.commands import run_command
from tests.conftest import CORPUS, Server

LLAMA = CORPUS / "cases" / "llama-n20-emb" / "adapter"


def told(run: Run, *arguments: str) -> Any:
    """Returns what a command prints for a script."""
    return json.loads(run(*arguments, "--json").stdout)


def test_set_makes_a_tenant_and_keeps_what_is_not_given(run: Run) -> None:
    """`set` changes each quota alone, `none` lifts it, and without quotas only makes the tenant."""
    quotas = ("max_adapters", "max_bytes", "requests_per_second")

    def after(*options: str) -> list[int | None]:
        item = told(run, "tenant", "set", "quotas", *options)
        return [item[quota] for quota in quotas]

    assert after("--max-bytes", "10GiB", "--requests-per-second", "50") == [None, 10 << 30, 50]
    assert after("--max-adapters", "7") == [7, 10 << 30, 50]
    assert after("--max-bytes", "none") == [7, None, 50]
    assert after() == [7, None, 50]
    actions = [entry["action"] for entry in told(run, "audit", "quotas")["items"]]
    assert actions == ["tenant.changed", "tenant.changed", "tenant.created"]


def test_tables_show_usage_beside_quotas(run: Run) -> None:
    """`show` and `list` print the same usage, next to its quota if there is one."""
    run("tenant", "set", "usage", "--max-bytes", "1MiB")
    run("publish", LLAMA, "usage/one")
    shown = run("tenant", "show", "usage").stdout
    assert "of 1.0 MiB" in shown
    row = next(line for line in run("tenant", "list").stdout.splitlines() if line.split()[:1] == ["usage"])
    used = told(run, "tenant", "show", "usage")["bytes"]
    assert row.split()[3:] == ["1", *human_bytes(used).split(), "of", "1.0", "MiB", "no", "limit"]
    assert "uncollected" in shown
    assert "usage" in [item["tenant"] for item in told(run, "tenant", "list")["items"]]


def test_what_is_no_quota_is_told(run: Run) -> None:
    """The error names a size or number that cannot be read, or that the service refuses."""
    for option, value, words in (
        ("--max-bytes", "plenty", "'plenty' is not a size"),
        ("--max-adapters", "7.5", "'7.5' is not a number"),
        ("--requests-per-second", "0", "requests_per_second"),
    ):
        failed = run("tenant", "set", "wrong", option, value)
        assert failed.returncode == 1
        assert failed.stderr.startswith("error (invalid-")
        assert words in failed.stderr
    assert run("tenant", "show", "wrong").returncode == 1


def test_rm_says_what_would_go(run: Run) -> None:
    """On a terminal `rm` asks with figures; without one it needs `--yes`."""
    run("publish", LLAMA, "leaving/one")
    refused = run("tenant", "rm", "leaving")
    assert refused.returncode == 1
    assert "add --yes" in refused.stderr
    kept = run("tenant", "rm", "leaving", typed="n\n")
    assert "delete tenant leaving with its keys, 1 adapters and " in kept.stderr
    assert run("tenant", "show", "leaving").returncode == 0
    assert run("tenant", "rm", "leaving", "--yes").stdout == "deleted tenant leaving\n"
    assert run("tenant", "show", "leaving").returncode == 1


def test_audit_is_a_table_of_who_did_what(run: Run, server: Server) -> None:
    """`audit` lists the newest first, up to `--limit`: a tenant's admin its own entries, the platform's all."""
    run("publish", LLAMA, "audited/one")
    run("alias", "set", "audited/one", "prod", "1")
    items = told(run, "audit", "audited")["items"]
    assert [item["action"] for item in items] == ["alias.moved", "version.published", "tenant.created"]
    assert told(run, "audit", "--limit", "1")["items"] == items[:1]
    shown = run("audit", "audited", "--limit", "1").stdout
    assert items[0]["key_name"] == "bootstrap"
    for words in ("platform bootstrap", items[0]["key_id"], "alias.moved", "audited/one@prod", "version=1"):
        assert words in shown
    assert "version.published" not in shown
    customer = {"PREFIX_URL": server.url, "PREFIX_API_KEY": server.key("admin", "audited")}
    own = run_command("audit", "audited", environment=customer)
    assert own.returncode == 0
    assert run_command("audit", environment=customer).stdout == own.stdout


@pytest.mark.parametrize(
    ("nbytes", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (10 << 30, "10.0 GiB"), (3 << 50, "3072.0 TiB")],
)
def test_sizes_as_they_are_shown(nbytes: int, shown: str) -> None:
    """Sizes are shown in binary units up to TiB."""
    assert human_bytes(nbytes) == shown
