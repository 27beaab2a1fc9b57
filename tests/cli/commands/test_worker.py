"""`publish`, `fetch`, `list`, `inspect`, `rm`: what a person sees, and what a script reads."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.conftest import Run, run_command
from tests.conftest import CORPUS

LLAMA = CORPUS / "cases" / "llama-n20-emb" / "adapter"


def test_publish_then_again(run: Run) -> None:
    """The first upload makes a version, the same content again is that version."""
    first, second = run("publish", LLAMA, "cli/twice"), run("publish", LLAMA, "cli/twice")
    assert first.returncode == second.returncode == 0
    assert first.stdout.startswith("published cli/twice@1\n")
    assert second.stdout.startswith("already there as cli/twice@1\n")


def test_publish_tells_a_script(run: Run) -> None:
    """--json prints what the service said."""
    told = json.loads(run("publish", LLAMA, "cli/json", "--json").stdout)
    assert (told["version"], told["created_now"], told["num_virtual_tokens"]) == (1, True, 20)


def test_publish_with_a_card_and_annotations(run: Run, tmp_path: Path) -> None:
    """The folder's README.md is the card, --note and --annotate are annotations; `inspect` shows all of them."""
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
    """One line says what is wrong."""
    refused = run("publish", LLAMA, "cli/undescribed", *options)
    assert refused.returncode == 1
    assert words in refused.stderr
    assert run("inspect", "cli/undescribed").returncode == 1


def test_versions(run: Run) -> None:
    """Newest first, with digests that are not cropped, and the aliases of each."""
    for case in ("llama-n20-emb", "llama-n20-proj"):
        run("publish", CORPUS / "cases" / case / "adapter", "cli/versions")
    run("alias", "set", "cli/versions", "prod", "1")
    told = json.loads(run("versions", "cli/versions", "--json").stdout)["items"]
    assert [(item["version"], item["aliases"]) for item in told] == [(2, []), (1, ["prod"])]
    shown = run("versions", "cli/versions").stdout
    assert all(item["digest"] in shown for item in told)
    assert "there is no cli/none" in run("versions", "cli/none").stderr


def test_compose(run: Run) -> None:
    """Published prefixes, one behind the other, are a new version."""
    run("publish", LLAMA, "cli/part")
    done = run("compose", "cli/composed", "cli/part@1", "cli/part")
    assert done.stdout.startswith("published cli/composed@1\n"), done.stderr
    told = json.loads(run("compose", "cli/composed", "cli/part", "cli/part", "--json").stdout)
    assert (told["version"], told["created_now"], told["num_virtual_tokens"]) == (1, False, 40)
    refused = run("compose", "cli/composed", "cli/part")
    assert refused.returncode == 1
    assert "compose" in refused.stderr


def test_publish_fills_dimensions_from_the_base_model(run: Run, tmp_path: Path) -> None:
    """--base-config fills what the adapter's config leaves out; without it the error says what is missing."""
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
    """The prefix alone travels, and the command says so."""
    done = run("publish", CORPUS / "variants/peft_full-accelerate-gpt2-proj", "cli/full")
    assert done.returncode == 0
    assert "cut out the prefix: 5 of 47 tensors (PEFT training state)" in done.stderr


def test_publish_refuses_a_pickle_and_names_the_converter(run: Run) -> None:
    """adapter_model.bin is never sent."""
    refused = run("publish", CORPUS / "variants/legacy_bin-gpt2-n20-emb", "cli/pickle")
    assert refused.returncode == 1
    assert "unsafe-checkpoint" in refused.stderr
    assert "prefix-service convert" in refused.stderr


def test_fetch_saves_what_peft_computes(run: Run, tmp_path: Path) -> None:
    """The saved file holds a row for each of the batch, bit for bit."""
    run("publish", LLAMA, "cli/fetched")
    done = run("fetch", "cli/fetched", "--batch-size", "3", "-o", tmp_path / "out.safetensors")
    assert done.returncode == 0
    assert "past_key_values.0.key" in done.stdout
    saved, expected = (
        load_file(path) for path in (tmp_path / "out.safetensors", CORPUS / "cases/llama-n20-emb/expected.safetensors")
    )
    assert torch.equal(saved["past_key_values.2.value"], expected["b3.layers.2.value"])
    assert saved["attention_mask"].shape == (3, 20)


def test_fetch_refuses_a_dtype_that_is_none(run: Run) -> None:
    """A dtype that does not travel is an error with the list of those that do."""
    refused = run("fetch", "cli/fetched", "--dtype", "int4")
    assert refused.returncode == 1
    assert "float8_e4m3fn" in refused.stderr


def test_list_is_a_table_and_json(run: Run) -> None:
    """A row for each adapter; --json for scripts."""
    run("publish", LLAMA, "clilist/one")
    shown, told = run("list", "clilist"), run("list", "clilist", "--json")
    assert "Adapters of clilist" in shown.stdout
    assert "bases/llama" in shown.stdout
    assert [item["adapter"] for item in json.loads(told.stdout)["items"]] == ["one"]


def test_inspect_tells_what_float8_costs(run: Run) -> None:
    """Its errors and its bytes, for a person and for a script; not unless it is asked for."""
    run("publish", LLAMA, "cli/float8")
    shown = run("inspect", "cli/float8", "--float8").stdout
    assert "float8: error of keys" in shown
    assert "instead of" in shown
    told = json.loads(run("inspect", "cli/float8", "--float8", "--json").stdout)["float8"]
    assert 0 < told["values"]["mean_relative"] < 1 / 16
    assert told["bfloat16_nbytes"] == 2 * 20 * 3 * 2 * 2 * 8
    assert "float8" not in json.loads(run("inspect", "cli/float8", "--json").stdout)


def test_inspect_shows_counts_and_digest(run: Run) -> None:
    """What the service knows, whole digests included."""
    run("publish", LLAMA, "cli/inspected")
    told = json.loads(run("inspect", "cli/inspected", "--json").stdout)
    shown = run("inspect", "cli/inspected@1").stdout
    assert told["digest"] in shown
    assert told["trainable_parameters"] == 20 * 3 * 2 * 16


def test_rm_asks_on_a_terminal(run: Run) -> None:
    """Only a yes deletes; the question says how much would go."""
    run("publish", LLAMA, "cli/asked")
    kept = run("rm", "cli/asked", typed="n\n")
    assert kept.returncode == 1
    assert "delete cli/asked with all its versions?" in kept.stderr
    assert run("inspect", "cli/asked").returncode == 0
    gone = run("rm", "cli/asked", typed="y\n")
    assert (gone.returncode, gone.stdout) == (0, "deleted cli/asked\n")
    assert run("inspect", "cli/asked").returncode == 1


def test_rm_without_a_terminal_needs_yes(run: Run) -> None:
    """A script says it, or nothing happens; a version goes by its number, never by an alias."""
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
    """No traceback for what a person can mend."""
    for arguments in (("inspect", "cli/none"), ("inspect", "nothing"), ("list", "nobody")):
        failed = run(*arguments)
        assert failed.returncode == 1
        assert failed.stderr.startswith("error (")
        assert "Traceback" not in failed.stderr


def test_a_service_that_is_not_there(tmp_path: Path) -> None:
    """The URL that was tried is named."""
    failed = run_command("list", "acme", environment={"PREFIX_URL": "http://prefix.invalid"})
    assert failed.returncode == 1
    assert "http://prefix.invalid cannot be reached" in failed.stderr


def test_wrong_usage_is_status_2() -> None:
    """An unknown command or a missing argument is told apart from a failure."""
    assert run_command("frobnicate").returncode == run_command("publish").returncode == 2
