"""`publish`, `fetch`, `list`, `inspect`, `rm`: what a person sees, and what a script reads."""

import json
import re
import resource
from pathlib import Path

import torch
from safetensors import safe_open
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


def test_publish_names_another_kind_of_adapter(run: Run, tmp_path: Path) -> None:
    """A LoRA folder is called that, whatever its weights are, and nothing is sent."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    for weights in ("adapter_model.safetensors", "adapter_model.bin"):
        (tmp_path / weights).write_bytes(b"")
        refused = run("publish", tmp_path, "cli/lora")
        assert refused.returncode == 1
        assert refused.stderr.startswith("error (invalid-config): this is a LORA adapter")
        (tmp_path / weights).unlink()


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


def test_fetch_keeps_the_metadata(run: Run, tmp_path: Path) -> None:
    """The file says which version it holds and in which form, as the service's own answer does."""
    run("publish", LLAMA, "cli/metadata")
    saved = tmp_path / "out.safetensors"
    assert run("fetch", "cli/metadata", "--batch-size", "2", "--dtype", "bfloat16", "-o", saved).returncode == 0
    with safe_open(saved, "pt") as file:
        found = json.loads(file.metadata()["prefix"])
        assert str(file.get_tensor("past_key_values.0.key").dtype) == "torch.bfloat16"
    expected = {"tenant": "cli", "adapter": "metadata", "version": 1, "batch_size": 2, "dtype": "bfloat16"}
    assert found.items() >= {**expected, "layout": "layers", "expand": True}.items()
    assert [path.name for path in tmp_path.iterdir()] == ["out.safetensors"]


def test_fetch_names_a_file_that_cannot_be_written(run: Run, tmp_path: Path) -> None:
    """A missing folder, a folder, and a disk that is full: one line, and nothing is left behind."""
    run("publish", LLAMA, "cli/unwritten")
    (tmp_path / "old").write_text("old")
    for output, words in (
        (tmp_path / "none" / "out", f"cannot write {tmp_path}/none/out: there is no folder {tmp_path}/none"),
        (tmp_path, f"cannot write {tmp_path}: it is a folder"),
    ):
        refused = run("fetch", "cli/unwritten", "-o", output)
        assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)
        assert refused.stderr.startswith(f"error (invalid-request): {words}")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # inherited: as a disk with so much space
    try:
        full = run("fetch", "cli/unwritten", "-o", tmp_path / "old")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (full.returncode, full.stdout, full.stderr.count("\n")) == (1, "", 1)
    assert full.stderr == f"error (out-of-space): cannot write {tmp_path}/old: File too large\n"
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_text() == "old"


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


def test_errors_of_the_service_name_the_request(run: Run) -> None:
    """By the id under which its log has the request."""
    failed = run("inspect", "cli/none")
    assert re.fullmatch(r"error \(not-found\): .* \(request [0-9a-f]{32}\)\n", failed.stderr)


def test_json_holds_for_errors_too(run: Run) -> None:
    """Standard output has one document, also where the usage is wrong; standard error has what it always has."""
    for arguments, status, code, words in (
        (("inspect", "cli/none"), 1, "not-found", "there is no cli/none"),
        (("inspect", "nothing"), 1, "invalid-reference", "nothing"),
        (("inspect",), 2, "wrong-usage", "Missing argument"),
        (("inspect", "cli/none", "--colour"), 2, "wrong-usage", "--colour"),
        (("frobnicate",), 2, "wrong-usage", "frobnicate"),
    ):
        failed = run(*arguments, "--json")
        error = json.loads(failed.stdout)["error"]
        assert (failed.returncode, error["code"]) == (status, code)
        assert words in error["detail"]
        assert words in failed.stderr
        assert (error["request_id"] is not None) == (code == "not-found")


def test_json_holds_for_deletions_too(run: Run) -> None:
    """One document says what is gone."""
    run("publish", LLAMA, "clijson/a")
    run("alias", "set", "clijson/a", "prod", "1")
    for arguments, document in (
        (("residency", "unload", "clijson/a"), {"unloaded": "clijson/a"}),
        (("alias", "rm", "clijson/a", "prod"), {"deleted": "clijson/a@prod"}),
        (("rm", "clijson/a", "--yes"), {"deleted": "clijson/a"}),
        (("tenant", "rm", "clijson", "--yes"), {"deleted": "clijson"}),
    ):
        assert json.loads(run(*arguments, "--json").stdout) == document


def test_a_service_that_is_not_there(tmp_path: Path) -> None:
    """The URL that was tried is named."""
    failed = run_command("list", "acme", environment={"PREFIX_URL": "http://prefix.invalid"})
    assert failed.returncode == 1
    assert "http://prefix.invalid cannot be reached" in failed.stderr


def test_wrong_usage_is_status_2() -> None:
    """An unknown command or a missing argument is told apart from a failure."""
    assert run_command("frobnicate").returncode == run_command("publish").returncode == 2
