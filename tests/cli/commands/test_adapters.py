"""`list`, `versions`, `inspect`, `diff` and `rm` print tables for a person and JSON for a script."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Run
from tests.commands import run_command
from tests.conftest import CORPUS, Server

LLAMA = CORPUS / "cases" / "llama-n20-emb" / "adapter"
GPT2 = CORPUS / "cases" / "gpt2-n20-emb" / "adapter"


def test_versions(run: Run) -> None:
    """`versions` lists the newest first, with whole digests, and the aliases of each."""
    for case in ("llama-n20-emb", "llama-n20-proj"):
        run("publish", CORPUS / "cases" / case / "adapter", "cli/versions")
    run("alias", "set", "cli/versions", "prod", "1")
    told = json.loads(run("versions", "cli/versions", "--json").stdout)["items"]
    assert [(item["version"], item["aliases"]) for item in told] == [(2, []), (1, ["prod"])]
    shown = run("versions", "cli/versions").stdout
    assert all(item["digest"] in shown for item in told)
    assert "there is no cli/none" in run("versions", "cli/none").stderr


def test_list_is_a_table_and_json(run: Run) -> None:
    """`list` prints a row for each adapter, and `--json` prints the same for scripts."""
    run("publish", LLAMA, "clilist/one")
    shown, told = run("list", "clilist"), run("list", "clilist", "--json")
    assert "Adapters of clilist" in shown.stdout
    assert "bases/llama" in shown.stdout
    assert [item["adapter"] for item in json.loads(told.stdout)["items"]] == ["one"]


def test_inspect_tells_what_float8_costs(run: Run) -> None:
    """`inspect --float8` reports float8's errors and bytes, for a person and for a script."""
    run("publish", LLAMA, "cli/float8")
    shown = run("inspect", "cli/float8", "--float8").stdout
    assert "float8: error of keys" in shown
    assert "instead of" in shown
    told = json.loads(run("inspect", "cli/float8", "--float8", "--json").stdout)["float8"]
    assert 0 < told["values"]["mean_relative"] < 1 / 16
    assert told["bfloat16_nbytes"] == 2 * 20 * 3 * 2 * 2 * 8
    assert "float8" not in json.loads(run("inspect", "cli/float8", "--json").stdout)


def test_inspect_shows_counts_and_digest(run: Run) -> None:
    """`inspect` shows what the service knows of a version, with the whole digest."""
    run("publish", LLAMA, "cli/inspected")
    told = json.loads(run("inspect", "cli/inspected", "--json").stdout)
    shown = run("inspect", "cli/inspected@1").stdout
    assert told["digest"] in shown
    assert told["trainable_parameters"] == 20 * 3 * 2 * 16


def test_rm_asks_on_a_terminal(run: Run) -> None:
    """On a terminal `rm` says how much would be deleted, and deletes only after a yes."""
    run("publish", LLAMA, "cli/asked")
    kept = run("rm", "cli/asked", typed="n\n")
    assert kept.returncode == 1
    assert "delete cli/asked with all its versions?" in kept.stderr
    assert run("inspect", "cli/asked").returncode == 0
    gone = run("rm", "cli/asked", typed="y\n")
    assert (gone.returncode, gone.stdout) == (0, "deleted cli/asked\n")
    assert run("inspect", "cli/asked").returncode == 1


def test_rm_without_a_terminal_needs_yes(run: Run) -> None:
    """Without a terminal `rm` needs `--yes`, and deletes a version by its number, never by an alias."""
    run("publish", LLAMA, "cli/scripted")
    refused = run("rm", "cli/scripted@1")
    assert refused.returncode == 1
    assert "add --yes" in refused.stderr
    moving = run("rm", "cli/scripted@latest", "--yes")
    assert moving.returncode == 1
    assert "by version number or digest" in moving.stderr
    assert run("rm", "cli/scripted@1", "--yes").stdout == "deleted cli/scripted@1\n"
    assert "error (not-found)" in run("rm", "cli/scripted@1", "--yes").stderr


def test_errors_are_a_sentence_and_status_1(run: Run) -> None:
    """A mistake that a person can correct is one line with status 1, and no traceback."""
    for arguments in (("inspect", "cli/none"), ("inspect", "nothing"), ("list", "nobody")):
        failed = run(*arguments)
        assert failed.returncode == 1
        assert failed.stderr.startswith("error (")
        assert "Traceback" not in failed.stderr


def test_a_service_that_is_not_there(tmp_path: Path) -> None:
    """The error names the URL that was tried."""
    failed = run_command("list", "acme", environment={"PREFIX_URL": "http://prefix.invalid"})
    assert failed.returncode == 1
    assert "http://prefix.invalid cannot be reached" in failed.stderr


def test_wrong_usage_is_status_2() -> None:
    """An unknown command or a missing argument has status 2, which tells it apart from a failure."""
    assert run_command("frobnicate").returncode == run_command("publish").returncode == 2


def told(run: Run, *arguments: str) -> list[str]:
    """Returns the adapters of `list --json`, with their tenants."""
    done = run("list", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return [f"{item['tenant']}/{item['adapter']}" for item in json.loads(done.stdout)["items"]]


@pytest.fixture(scope="module", autouse=True)
def adapters(server: Server) -> None:
    """Publishes adapters of two tenants: `big` with two versions, each of the others with one."""
    environment = {"PREFIX_URL": server.url, "PREFIX_API_KEY": server.admin_key}
    for folder, adapter in (
        (LLAMA, "clisort-a/small"),
        (LLAMA, "clisort-a/s_all"),
        (LLAMA, "clisort-b/big"),
        (GPT2, "clisort-b/big"),
        (GPT2, "clisort-b/smaller"),
    ):
        assert run_command("publish", folder, adapter, environment=environment).returncode == 0


def test_list_searches_sorts_and_ends(run: Run) -> None:
    """`list` filters by a part of the name or the base model, sorts, and obeys a limit."""
    assert told(run, "clisort-b", "--sort", "-bytes") == ["clisort-b/big", "clisort-b/smaller"]
    assert told(run, "clisort-b", "--sort", "-created", "--limit", "1") in (["clisort-b/smaller"], ["clisort-b/big"])
    assert told(run, "clisort-a", "--search", "_") == ["clisort-a/s_all"]
    assert told(run, "clisort-a", "--limit", "1") == ["clisort-a/s_all"]
    assert told(run, "clisort-b", "--base-model", "bases/llama") == []
    assert told(run, "clisort-b", "--sort", "-used") == ["clisort-b/big", "clisort-b/smaller"]
    assert "requests" in run("list", "clisort-b", "--sort", "-used").stdout
    assert run("list", "clisort-a", "--sort", "bytes").returncode == 2
    assert run("list", "clisort-a", "--limit", "0").returncode == 2


def test_list_all_is_one_listing_of_all_tenants(run: Run) -> None:
    """`list --all` sorts and limits all tenants' adapters as one listing, and its table names the tenant."""
    everything = [name for name in told(run, "--all") if name.startswith("clisort")]
    assert everything == ["clisort-a/s_all", "clisort-a/small", "clisort-b/big", "clisort-b/smaller"]
    found = told(run, "--all", "--search", "small", "--limit", "999")  # other tests publish too
    assert [name for name in found if name.startswith("clisort")] == ["clisort-a/small", "clisort-b/smaller"]
    by_bytes = json.loads(run("list", "--all", "--sort", "-bytes", "--json").stdout)["items"]
    assert [item["bytes"] for item in by_bytes] == sorted((item["bytes"] for item in by_bytes), reverse=True)
    newest = json.loads(run("list", "--all", "--sort", "-created", "--json").stdout)["items"]
    moments = [item["latest"]["created"] for item in newest]
    assert moments == sorted(moments, reverse=True)
    assert len(told(run, "--all", "--limit", "3", "--sort", "-bytes")) == 3
    shown = run("list", "--all", "--search", "smaller").stdout
    assert "Adapters of all tenants" in shown
    assert "clisort-b/smaller" in shown


def test_list_takes_one_tenant_or_all(run: Run, server: Server) -> None:
    """`list` refuses neither and both of a tenant and `--all`; only the platform admin can list all."""
    for arguments in ((), ("clisort-a", "--all")):
        refused = run("list", *arguments)
        assert refused.returncode == 1
        assert "`list --all`" in refused.stderr
    reader = {"PREFIX_URL": server.url, "PREFIX_API_KEY": server.key("read", "clisort-a")}
    assert "error (forbidden)" in run_command("list", "--all", environment=reader).stderr
    assert run_command("list", "clisort-a", environment=reader).returncode == 0


def test_diff_measures_each_layer(run: Run, tmp_path: Path) -> None:
    """`diff` shows the config and sizes that differ, and compares keys and values as torch does."""
    weights = load_file(LLAMA / "adapter_model.safetensors")
    ((name, tensor),) = weights.items()
    changed = tensor.clone()
    # The tensor is flat, [tokens, layers x (key, value) x heads x size]: the values of layer 1 are doubled.
    width = tensor.shape[1] // 6
    changed[:, 3 * width : 4 * width] *= 2
    save_file({name: changed}, tmp_path / "adapter_model.safetensors")
    config = json.loads((LLAMA / "adapter_config.json").read_text()) | {"revision": "main"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    run("publish", LLAMA, "clidiff/a")
    run("publish", tmp_path, "clidiff/b")
    found = json.loads(run("diff", "clidiff/a", "clidiff/b", "--json").stdout)
    assert [found[side]["version"] for side in ("first", "second")] == ["clidiff/a@1", "clidiff/b@1"]
    assert found["changed"]["config: revision"] == [None, "main"]
    assert (
        {"digest", "weights", "config: revision"}
        <= found["changed"].keys()
        <= {"created", "digest", "weights", "config: revision", "bytes of weights"}
    )
    same = {"max_absolute": 0.0, "relative": 0.0, "cosine": 1.0}
    layers = found["layers"]
    assert [layer["layer"] for layer in layers] == [0, 1, 2]
    assert [layers[0]["keys"], layers[0]["values"], layers[1]["keys"], layers[2]["values"]] == [same] * 4
    doubled = layers[1]["values"]
    assert doubled["relative"] == pytest.approx(0.5)
    assert doubled["cosine"] == pytest.approx(1.0)
    assert doubled["max_absolute"] == pytest.approx(float(tensor[:, 3 * width : 4 * width].abs().max()))
    shown = run("diff", "clidiff/a", "clidiff/b").stdout
    rows = [line.split() for line in shown.splitlines()]
    assert ["1", "0", "1.000000", "0.5", "1.000000"] in rows
    assert any(row[:2] == ["config:", "revision"] and "main" in row for row in rows)


def test_diff_of_equal_and_of_incomparable_versions(run: Run) -> None:
    """`diff` reports equal content as equal, and of other shapes compares everything but keys and values."""
    for folder, adapter in ((LLAMA, "clidiff/c"), (LLAMA, "clidiff/d"), (GPT2, "clidiff/gpt2")):
        run("publish", folder, adapter)
    same = run("diff", "clidiff/c", "clidiff/d@1").stdout
    assert same.startswith("clidiff/c@1 and clidiff/d@1 have the same content: sha256:")
    other = run("diff", "clidiff/c", "clidiff/gpt2")
    assert other.returncode == 0
    assert "keys and values of different shapes are not compared: 3 layers of 2 heads" in other.stdout
    assert "config: base_model_name_or_path" in other.stdout
    found: dict[str, Any] = json.loads(run("diff", "clidiff/c", "clidiff/gpt2", "--json").stdout)
    assert found["layers"] is None
    assert found["reason"].startswith("keys and values of different shapes")
    assert "error (not-found)" in run("diff", "clidiff/c", "clidiff/none").stderr


def test_a_key_of_a_tenant_needs_not_name_it(run: Run, server: Server) -> None:
    """Lists, usage and audit are of its own tenant; a key of the platform says whose adapters it wants."""
    run("publish", LLAMA, "cliown/a")
    own = {"PREFIX_URL": server.url, "PREFIX_API_KEY": server.key("admin", "cliown")}
    for command, title in (("list", "Adapters of"), ("usage", "Usage of"), ("audit", "Changes of")):
        shown, named = run_command(command, environment=own), run_command(command, "cliown", environment=own)
        assert shown.stdout.startswith(f"{title} cliown"), shown.stderr
        assert shown.stdout == named.stdout
    failed = run("list")
    assert "a key of the platform has no tenant of its own: `list TENANT`, or `list --all`" in failed.stderr
    assert "list --all" in run("list", "cliown", "--all").stderr
