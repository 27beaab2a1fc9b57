"""`compile` makes folders that `publish` takes, and checks everything it can before the model is loaded."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from prefix_service.checkpoints.base_models import read_fingerprint
from prefix_service.client import PrefixClient
from prefix_service.client.transformers import compile_prefix, text_tokens
from tests.cli.conftest import Run, on_terminal
from tests.client.transformers.test_texts import CHATML, TEXT, tokenizer
from tests.commands import PREFIX_SERVICE
from tests.conftest import CORPUS, Server


def test_a_text_is_compiled_and_published(server: Server, run: Run, model: Path, tmp_path: Path) -> None:
    """The folder holds what `compile_prefix` returns, and says the names of text and model, not where they were."""
    (tmp_path / "rules.txt").write_text(TEXT)
    done = run("compile", "--model", model, "--text", tmp_path / "rules.txt", tmp_path / "rules", "--for", "compiled")
    assert done.returncode == 0, done.stderr
    expected = compile_prefix(
        transformers.AutoModelForCausalLM.from_pretrained(model), text=TEXT, tokenizer=tokenizer(CHATML)
    )
    assert done.stdout.startswith(f"compiled {len(expected.token_ids or ())} tokens to {tmp_path / 'rules'}: ")
    found = load_file(tmp_path / "rules" / "adapter_model.safetensors")["prompt_embeddings"]
    assert found.equal(expected.flat)
    config = json.loads((tmp_path / "rules" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == model.name
    published = run("publish", tmp_path / "rules", "compiled/rules")
    assert published.returncode == 0, published.stderr
    with PrefixClient(server.url, server.admin_key) as client:
        annotations = client.annotations("compiled/rules@1")
        assert client.base_model("compiled/rules@1") == expected.base_model
        assert expected.base_model.differences(read_fingerprint(model)) == []
    assert annotations["compiled/file"] == "rules.txt"
    assert annotations["compiled/role"] == "system"
    assert annotations["compiled/tokens-sha256"] == expected.recipe["compiled/tokens-sha256"]
    assert annotations["compiled/template-sha256"] == expected.recipe["compiled/template-sha256"]


def test_a_folder_of_documents_becomes_a_folder_of_prefixes(run: Run, model: Path, tmp_path: Path) -> None:
    """Each file becomes an adapter of its name; `--json` lists them."""
    documents = tmp_path / "documents"
    documents.mkdir()
    for name in ("a", "b"):
        (documents / f"{name}.txt").write_text(f"{TEXT} {name}\n")
    done = run("compile", "--model", model, "--text", documents, tmp_path / "out", "--as", "plain", "--json")
    assert done.returncode == 0, done.stderr
    items = json.loads(done.stdout)["items"]
    expected = {name: text_tokens(tokenizer(), f"{TEXT} {name}\n", "plain") for name in ("a", "b")}
    assert {item["folder"]: item["num_virtual_tokens"] for item in items} == {
        str(tmp_path / "out" / name): len(tokens) for name, tokens in expected.items()
    }
    assert (tmp_path / "out" / "b" / "adapter_config.json").exists()


@pytest.mark.parametrize("ids", ["[1, 5, 6]", "1 5\n6"])
def test_token_ids_are_compiled(run: Run, model: Path, tmp_path: Path, ids: str) -> None:
    """A file of ids is a JSON list, or numbers between blanks."""
    (tmp_path / "ids").write_text(ids)
    done = run("compile", "--model", model, "--tokens", tmp_path / "ids", tmp_path / "out", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert "compiled 3 tokens" in done.stdout
    assert json.loads((tmp_path / "out" / "prefix_recipe.json").read_text())["compiled/dtype"] == "bfloat16"


def test_a_terminal_shows_progress(model: Path, tmp_path: Path) -> None:
    """A person sees what is read."""
    (tmp_path / "ids").write_text("1 5 6")
    typed = ["compile", "--model", str(model), "--tokens", str(tmp_path / "ids"), str(tmp_path / "out")]
    status, shown = on_terminal(200, [*PREFIX_SERVICE, *typed])
    assert status == 0, shown
    assert f"reading {tmp_path / 'ids'}" in shown
    assert "3/3" in shown


def test_room_is_checked_before_the_model_is_loaded(
    server: Server, run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prefix that the quota or the service's bound would refuse is not computed."""
    (tmp_path / "ids").write_text("1 5 6")
    with PrefixClient(server.url, server.admin_key) as client:
        client.put_tenant("compiled-small", {"max_bytes": 1000})

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the model must not be loaded")

    monkeypatch.setattr("prefix_service.cli.commands.compiling.load_model", never)
    typed = ("compile", "--model", model, "--tokens", tmp_path / "ids", tmp_path / "out", "--for")
    refused = run(*typed, "compiled-small")
    assert refused.returncode == 1
    assert "error (quota-exceeded): tenant 'compiled-small' has 0 of 1000 bytes, and what was named" in refused.stderr
    monkeypatch.setattr(PrefixClient, "whoami", lambda _: {"tenant": None, "max_upload_bytes": 1000})
    refused = run(*typed, "compiled-small")
    assert "error (too-large): the prefix of " in refused.stderr
    assert "would have 1152 bytes, and the service accepts 1000 in one upload" in refused.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ("compile --model {model} {folder}/out", 2, "name one ADAPTER_FOLDER"),
        ("compile --model {model} a b {folder}/out", 2, "name one ADAPTER_FOLDER"),
        ("compile --model {folder}/none --tokens {folder}/ids {folder}/out", 1, "none cannot be loaded: there is no "),
        ("compile --model ./no-such-folder --tokens {folder}/ids {folder}/out", 1, "there is no such folder"),
        (f"compile --model ./{'n' * 300} --tokens {{folder}}/ids {{folder}}/out", 1, "there is no such folder"),
        ("compile --model ~/none --tokens {folder}/ids {folder}/out", 1, "there is no such folder"),
        ("compile --model {model} --tokens {folder}/words {folder}/out", 1, "must have token ids"),
        ("compile --model {model} --tokens {folder}/deep {folder}/out", 1, "must have token ids"),
        ("compile --model {model} --tokens {folder}/ids {folder}/out --task 1", 2, "--task 1 belongs to an ADAPTER_"),
        ("compile --model {model} --text {folder}/binary {folder}/out", 1, "is not UTF-8: look at byte 0"),
        ("compile --model {model} --text {folder}/words {folder}/out --as plain", 1, "words: the end of the text"),
        ("compile --model {model} --text {folder}/empty {folder}/out", 1, "there are no files in "),
        ("compile --model {model} --tokens {folder}/ids {folder}", 1, "choose an empty folder"),
        ("compile --model {model} --tokens {folder}/ids {folder}/out --device nowhere", 1, "cannot be loaded"),
        ("compile --model {model} {folder} {folder}/out", 1, "is a prefix already: publish it as it is"),
        ("compile --model {t5} --tokens {folder}/ids {folder}/out", 1, "t5 is an encoder-decoder model, in which text"),
        ("compile --model {model} {folder}/tasks {folder}/out", 1, "needs a task: this one has 0 to 2, and none was"),
        ("compile --model {model} {folder}/tasks {folder}/out --task 3", 1, "this one has 0 to 2, and got 3: "),
    ],
)
def test_what_cannot_be_compiled_is_said(
    run: Run, model: Path, tmp_path: Path, words: str, status: int, message: str
) -> None:
    """Each error is one line that says what was wrong, and nothing is written."""
    (tmp_path / "ids").write_text("1 5 6")
    (tmp_path / "words").write_text("Hello.")
    (tmp_path / "deep").write_text("[" * 100_000)
    (tmp_path / "binary").write_bytes(b"\xff")
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "CARTRIDGE", "num_virtual_tokens": 1}')
    (tmp_path / "tasks").mkdir()
    tasks = '{"peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": 2}'
    (tmp_path / "tasks" / "adapter_config.json").write_text(tasks)
    weights = {"prompt_embeddings": torch.zeros(2, 32), "prefix_task_cols": torch.zeros(3, 2, 1)}
    save_file(weights, tmp_path / "tasks" / "adapter_model.safetensors")
    done = run(*words.format(model=model, folder=tmp_path, t5=CORPUS / "bases" / "t5").split())
    assert done.returncode == status, done.stderr
    assert message in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()
