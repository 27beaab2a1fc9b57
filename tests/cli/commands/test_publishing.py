"""`publish` and `compose` upload one adapter or hundreds of folders, and report each."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from prefix_service.checkpoints.base_models import read_fingerprint
from prefix_service.checkpoints.sources import prepare_upload
from prefix_service.client import PrefixClient
from prefix_service.errors import InvalidConfig
from tests.cli.conftest import Run, on_terminal
from tests.commands import run_command
from tests.conftest import CORPUS, Server

LLAMA = CORPUS / "cases" / "llama-n20-emb" / "adapter"
BASE = CORPUS / "bases" / "llama"
GPT2 = CORPUS / "cases" / "gpt2-n20-emb" / "adapter"


def test_publish_then_again(run: Run) -> None:
    """The first upload makes a version, and the same content again finds it."""
    first, second = run("publish", LLAMA, "cli/twice"), run("publish", LLAMA, "cli/twice")
    assert first.returncode == second.returncode == 0
    assert first.stdout.startswith("published cli/twice@1\n")
    assert second.stdout.startswith("already there as cli/twice@1\n")


def test_publish_tells_a_script(run: Run) -> None:
    """`publish --json` prints the service's answer."""
    told = json.loads(run("publish", LLAMA, "cli/json", "--json").stdout)
    assert (told["version"], told["created_now"], told["num_virtual_tokens"]) == (1, True, 20)


def test_compose(run: Run) -> None:
    """`compose` joins published prefixes, one after another, into a new version."""
    run("publish", LLAMA, "cli/part")
    done = run("compose", "cli/composed", "cli/part@1", "cli/part")
    assert done.stdout.startswith("published cli/composed@1\n"), done.stderr
    told = json.loads(run("compose", "cli/composed", "cli/part", "cli/part", "--json").stdout)
    assert (told["version"], told["created_now"], told["num_virtual_tokens"]) == (1, False, 40)
    refused = run("compose", "cli/composed", "cli/part")
    assert refused.returncode == 1
    assert "compose" in refused.stderr


def test_publish_stores_the_fingerprint_of_the_base_model(run: Run, server: Server, tmp_path: Path) -> None:
    """`--base-model` is stored with new versions and with ones that exist, of one folder and of many."""
    expected, folder = read_fingerprint(BASE), tmp_path / "based"
    shutil.copytree(LLAMA, folder)
    for words in (("cli/based",), ("cli/based", "--base-model", BASE), ("--tenant", "cli-based", "--base-model", BASE)):
        done = run("publish", folder, *words)
        assert done.returncode == 0, done.stderr
    with PrefixClient(server.url, server.admin_key) as client:
        assert client.base_model("cli/based@1") == client.base_model("cli-based/based@1") == expected
    assert expected.weights_index is not None
    shown = run("inspect", "cli/based").stdout
    assert "base model: rope" in shown
    refused = run("publish", folder, "cli/based", "--base-model", folder)
    assert refused.returncode == 1
    assert f"there is no {folder}/config.json: name the folder of a base model" in " ".join(refused.stderr.split())


def test_publish_fills_dimensions_from_the_base_model(run: Run, tmp_path: Path) -> None:
    """`--base-config` fills dimensions that the adapter's config leaves out; without it the error names them."""
    config = json.loads((LLAMA / "adapter_config.json").read_text())
    config |= {"num_layers": None, "token_dim": None, "num_attention_heads": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes((LLAMA / "adapter_model.safetensors").read_bytes())
    refused = run("publish", tmp_path, "cli/filled")
    assert refused.returncode == 1
    assert "num_layers, token_dim, num_attention_heads missing" in refused.stderr
    done = run("publish", tmp_path, "cli/filled", "--base-config", CORPUS / "bases/llama/config.json", "--json")
    assert json.loads(done.stdout)["config"]["token_dim"] == 16


def test_publish_cuts_a_full_training_checkpoint(run: Run) -> None:
    """`publish` cuts the prefix out of a training checkpoint, sends it alone, and says so."""
    done = run("publish", CORPUS / "variants/peft_full-accelerate-gpt2-proj", "cli/full")
    assert done.returncode == 0
    assert "cut out the prefix: 5 of 47 tensors (PEFT training state)" in done.stderr


@pytest.mark.parametrize("name", ["legacy_bin-gpt2-n20-emb", "hazy_cartridge-f1", "hazy_cartridge-f1/cache-step4.pt"])
def test_publish_refuses_a_pickle_and_names_the_converter(run: Run, name: str) -> None:
    """`publish` never sends adapter_model.bin or a cartridge's .pt, which has no config, and names `convert`."""
    refused = run("publish", CORPUS / "variants" / name, "cli/pickle")
    assert refused.returncode == 1
    assert "unsafe-checkpoint" in refused.stderr
    assert "prefix-service convert" in refused.stderr


def test_a_config_that_is_missing_is_told_in_the_callers_words(run: Run, tmp_path: Path) -> None:
    """The command's error names its option for a config, and the function's error does not."""
    (tmp_path / "adapter_model.safetensors").write_bytes((LLAMA / "adapter_model.safetensors").read_bytes())
    refused = run("publish", tmp_path, "cli/unconfigured")
    assert refused.returncode == 1
    assert f"there is no {tmp_path}/adapter_config.json: name the adapter's config with --config" in refused.stderr
    with pytest.raises(InvalidConfig) as told:
        prepare_upload(tmp_path)
    assert str(told.value).startswith(f"there is no {tmp_path}/adapter_config.json, the adapter's config")
    assert "--" not in str(told.value)


def test_a_new_tenant_is_mentioned_once(run: Run) -> None:
    """The publication that creates a tenant reports it, to people and to scripts; later ones do not."""
    first, second = run("publish", LLAMA, "clinew/a"), run("publish", GPT2, "clinew/a")
    assert first.stdout.splitlines()[2:] == ["made tenant clinew"]
    assert "tenant" not in second.stdout
    assert json.loads(run("publish", LLAMA, "clinewer/a", "--json").stdout)["tenant_created"] is True
    assert "tenant_created" not in json.loads(run("publish", LLAMA, "clinewer/b", "--json").stdout)
    composed = run("compose", "clinewest/a", "clinew/a@1", "clinew/a@1")
    assert "made tenant clinewest" in composed.stdout


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Returns three folders of adapters."""
    found = [tmp_path / name for name in ("one", "two", "three.x")]
    for folder in found:
        shutil.copytree(LLAMA, folder)
    return found


def listed(run: Run, tenant: str) -> list[str]:
    """Returns the adapters of a tenant."""
    items: list[dict[str, Any]] = json.loads(run("list", tenant, "--json").stdout)["items"]
    return [item["adapter"] for item in items]


def test_many_folders_are_published_by_their_names(run: Run, folders: list[Path]) -> None:
    """`publish` prints a line for each folder, in the given order, a count, and the new tenant."""
    done = run("publish", *folders, "--tenant", "climany")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "published climany/one@1",
        "published climany/two@1",
        "published climany/three.x@1",
        "3 published",
        "made tenant climany",
    ]
    assert listed(run, "climany") == ["one", "three.x", "two"]
    again = run("publish", *folders, "--tenant", "climany")
    assert again.stdout.splitlines()[-2:] == ["already there as climany/three.x@1", "3 already there"]
    told = json.loads(run("publish", folders[0], f"{folders[1]}/", "--tenant", "climany", "--json").stdout)
    assert [(item["adapter"], item["created_now"]) for item in told["items"]] == [("one", False), ("two", False)]
    assert (told["failed"], told["not_tried"]) == ([], [])


def test_the_bar_of_many_folders_stands_alone(server: Server, folders: list[Path]) -> None:
    """It shows what takes long: no other line says so too, however short a person's patience."""
    code = "from prefix_service.cli import app, console; console._SILENCE = 0.0; app.run()"
    environment = {"PREFIX_URL": server.url, "PREFIX_API_KEY": server.admin_key}
    command: list[str | Path] = [sys.executable, "-c", code, "publish", *folders, "--tenant", "clibar"]
    status, shown = on_terminal(80, command, environment)
    assert status == 0
    assert f"{len(folders)}/{len(folders)}" in shown
    assert shown.count("waiting for") <= 1  # before the first folder, until the service has answered


def test_the_folder_where_one_stands_has_its_own_name(
    run: Run, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`publish .` uses the folder's own name, and a link its own."""
    (folders[0].parent / "link").symlink_to(folders[1])
    monkeypatch.chdir(folders[0])
    done = run("publish", ".", "../link", "--tenant", "clidot")
    assert done.stdout.splitlines()[:2] == ["published clidot/one@1", "published clidot/link@1"], done.stderr


def test_a_folder_that_fails_leaves_the_others_alone(run: Run, folders: list[Path]) -> None:
    """The error names the folder, the others are published, and the status is 1."""
    (folders[1] / "adapter_model.safetensors").write_bytes(b"nothing")
    done = run("publish", *folders, "--tenant", "clibroken")
    assert done.returncode == 1
    assert done.stdout.splitlines()[:3] == [
        "published clibroken/one@1",
        "published clibroken/three.x@1",
        "2 published, 1 failed",
    ]
    assert done.stderr.startswith(f"{folders[1]}: error (invalid-checkpoint): ")
    told = json.loads(run("publish", *folders, "--tenant", "clibroken", "--json").stdout)
    assert [(one["folder"], one["code"]) for one in told["failed"]] == [(str(folders[1]), "invalid-checkpoint")]
    assert len(told["items"]) == 2


def test_an_error_that_all_would_meet_ends_it(server: Server, tmp_path: Path) -> None:
    """A key that may not publish fails for the first folders, and the rest are not tried."""
    folders = [tmp_path / f"f{number}" for number in range(40)]
    for folder in folders:
        shutil.copytree(LLAMA, folder)
    server.client().put("/v1/tenants/clireader")
    reader = {"PREFIX_URL": server.url, "PREFIX_API_KEY": server.key("read", "clireader")}
    done = run_command("publish", *folders, "--tenant", "clireader", environment=reader)
    assert done.returncode == 1
    told = done.stderr.splitlines()
    assert 1 <= len(told) <= 8
    assert all(re.fullmatch(r".*: error \(forbidden\): .* \(request [0-9a-f]{32}\)", line) for line in told)
    assert done.stdout == f"{len(told)} failed, {40 - len(told)} not tried\n"


def test_names_are_looked_at_before_anything_is_sent(run: Run, folders: list[Path], tmp_path: Path) -> None:
    """`publish` refuses impossible names, repeated names and missing folders before it sends anything."""
    (tmp_path / "My Adapter").mkdir()
    shutil.copytree(LLAMA, tmp_path / "elsewhere" / "one")
    for words, status, said in (
        ((folders[0], tmp_path / "My Adapter"), 1, "'My Adapter' is not a name"),
        ((*folders, tmp_path / "elsewhere" / "one"), 1, "would both be clinames/one"),
        ((folders[0], LLAMA / "adapter_config.json"), 2, "is no folder"),
    ):
        refused = run("publish", *words, "--tenant", "clinames")
        assert refused.returncode == status
        assert said in " ".join(refused.stderr.replace("│", " ").split())
    assert run("list", "clinames").returncode == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("{one}",), "name one SOURCE and its TENANT/ADAPTER"),
        (("{one}", "{two}", "acme/a"), "name one SOURCE and its TENANT/ADAPTER"),
        (("{one}/none", "acme/a"), "there is no"),
        (("{one}", "--tenant", "acme", "--config", "{one}/adapter_config.json"), "--config is that of one adapter"),
    ],
)
def test_wrong_use_is_status_2(run: Run, folders: list[Path], words: tuple[str, ...], said: str) -> None:
    """Wrong usage has status 2 and says how to write the command."""
    refused = run("publish", *(word.format(one=folders[0], two=folders[1]) for word in words))
    assert refused.returncode == 2
    assert said in " ".join(refused.stderr.replace("│", " ").split())


def test_publish_names_another_kind_of_adapter(run: Run, tmp_path: Path) -> None:
    """`publish` calls a LoRA folder by that name, whatever its weights, and sends nothing."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    for weights in ("adapter_model.safetensors", "adapter_model.bin"):
        (tmp_path / weights).write_bytes(b"")
        refused = run("publish", tmp_path, "cli/lora")
        assert refused.returncode == 1
        assert refused.stderr.startswith("error (invalid-config): this is a LORA adapter")
        (tmp_path / weights).unlink()


def test_publish_with_a_card_and_annotations(run: Run, tmp_path: Path) -> None:
    """`publish` sends README.md as the card, `--note` and `--annotate` as annotations; `inspect` shows them all."""
    folder = Path(shutil.copytree(LLAMA, tmp_path / "adapter"))
    (folder / "README.md").write_bytes(b"# Capitals\r\n\n[red]bold[/red] \x1b[31m\n")
    annotations = ("--annotate", "run=17", "--annotate", "metric=a=b", "--note", "less data")
    assert run("publish", folder, "cli/described", *annotations).returncode == 0
    told = json.loads(run("inspect", "cli/described", "--json").stdout)
    assert told["card"] == "# Capitals\r\n\n[red]bold[/red] \x1b[31m\n"
    assert told["annotations"] == {"metric": "a=b", "note": "less data", "run": "17"}
    shown = run("inspect", "cli/described").stdout
    assert "annotation: run" in shown
    assert "less data" in shown
    assert "# Capitals\n\n[red]bold[/red] \\u001b[31m\n" in shown


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--annotate", "run"], "--annotate takes KEY=VALUE, as in run=17, got 'run'"),
        (["--annotate", "note=x", "--note", "y"], "the annotation 'note' is given twice"),
        (["--annotate", "a b=x"], "key has 1 to 63 characters"),
    ],
)
def test_wrong_annotations_publish_nothing(run: Run, options: list[str], words: str) -> None:
    """A wrong annotation is one line of error, and nothing is published."""
    refused = run("publish", LLAMA, "cli/undescribed", *options)
    assert refused.returncode == 1
    assert words in refused.stderr
    assert run("inspect", "cli/undescribed").returncode == 1
