"""`fetch` saves tensors as PEFT computes them, and `pull` the folder that was published."""

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from prefix_service.checkpoints.base_models import read_fingerprint
from prefix_service.cli.commands import fetching
from prefix_service.cli.commands.fetching import pull
from prefix_service.client import PrefixClient
from prefix_service.errors import Conflict, InvalidResponse
from tests.api.helpers import upload_directory
from tests.cli.conftest import Run
from tests.conftest import CORPUS, Server

LLAMA = CORPUS / "cases" / "llama-n20-emb" / "adapter"
FILES = ("adapter_config.json", "adapter_model.safetensors")


def test_fetch_saves_what_peft_computes(run: Run, tmp_path: Path) -> None:
    """`fetch` saves a row for each of the batch, equal to PEFT's bit for bit."""
    run("publish", LLAMA, "cli/fetched")
    done = run("fetch", "cli/fetched", "--batch-size", "3", "-o", tmp_path / "out.safetensors")
    assert done.returncode == 0
    assert "past_key_values.0.key" in done.stdout
    saved, expected = (
        load_file(path) for path in (tmp_path / "out.safetensors", CORPUS / "cases/llama-n20-emb/expected.safetensors")
    )
    assert torch.equal(saved["past_key_values.2.value"], expected["b3.layers.2.value"])
    assert saved["attention_mask"].shape == (3, 20)


def test_fetch_takes_two_dtypes(run: Run, tmp_path: Path) -> None:
    """Each half is rounded to its own dtype and saved in float32, and the saved metadata says so."""
    run("publish", LLAMA, "cli/fetched")
    done = run(
        "fetch", "cli/fetched", "--dtype", "float16", "--key-dtype", "bfloat16", "-o", tmp_path / "two", "--json"
    )
    assert json.loads(done.stdout)["key_dtype"] == "bfloat16", done.stderr
    expected = load_file(CORPUS / "cases/llama-n20-emb/expected.safetensors")
    with safe_open(tmp_path / "two", "pt") as saved:
        for part, dtype in (("key", torch.bfloat16), ("value", torch.float16)):
            found, exact = saved.get_tensor(f"past_key_values.1.{part}"), expected[f"b1.layers.1.{part}"]
            assert torch.equal(found, exact.to(dtype).float())
        about = json.loads(saved.metadata()["prefix"])
        assert (about["dtype"], "key_dtype" in about) == ("float32", False)


def test_fetch_refuses_a_dtype_that_is_none(run: Run) -> None:
    """The error lists the dtypes that the service can send."""
    refused = run("fetch", "cli/fetched", "--value-dtype", "int4")
    assert refused.returncode == 1
    assert "value_dtype must be one of float32, float16, bfloat16, float8_e4m3fn" in " ".join(refused.stderr.split())


@pytest.mark.parametrize("case", sorted(path.name for path in (CORPUS / "cases").iterdir()))
def test_pull_writes_the_folder_again(server: Server, tmp_path: Path, case: str) -> None:
    """`pull` writes PEFT's files byte for byte and no others, and publishing them again finds the same version."""
    source, folder = CORPUS / "cases" / case / "adapter", tmp_path / "deep" / "folder"
    name = case.lower().replace("_", "-")
    upload_directory(server.client(), "clipull", name, source)
    pull(f"clipull/{name}@1", str(folder), server.url, server.admin_key)
    assert sorted(path.name for path in folder.iterdir()) == list(FILES)
    for file in FILES:
        assert (folder / file).read_bytes() == (source / file).read_bytes(), file
    assert upload_directory(server.client(), "clipull", name, folder)["version"] == 1


def test_pull_writes_what_publish_read(server: Server, tmp_path: Path) -> None:
    """`pull` keeps the config's order, blanks and numbers, the weights' metadata and the model card byte for byte.
    Publishing a reformatted copy does not change them.
    """
    source, folder = tmp_path / "source", tmp_path / "pulled"
    source.mkdir()
    config = json.loads((LLAMA / "adapter_config.json").read_text())
    text = json.dumps({"z": [1.50, "é"], **dict(reversed(config.items()))}, indent=5, ensure_ascii=False)
    (source / "adapter_config.json").write_bytes(text.replace("\n", " \r\n").encode() + b"\n\n")
    save_file(load_file(LLAMA / "adapter_model.safetensors"), source / "adapter_model.safetensors", {"format": "pt"})
    (source / "README.md").write_bytes("---\r\nlicense: mit\r\n---\r\n# É\r\n".encode())
    with PrefixClient(server.url, server.admin_key) as client:
        client.publish("clipull/unusual", source)
        assert client.publish("clipull/unusual", _reformatted(source, tmp_path / "again"))[1] is False
    pull("clipull/unusual", str(folder), server.url, server.admin_key)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", *FILES]
    for path in source.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_pulled_folder_has_the_fingerprint_of_its_base_model(server: Server, tmp_path: Path) -> None:
    """`pull` writes it as `compile` does, so that a version published of the pulled folder has it too."""
    expected = read_fingerprint(CORPUS / "bases" / "llama")
    with PrefixClient(server.url, server.admin_key) as client:
        client.publish("clipull/based", LLAMA, base_model=expected)
        pull("clipull/based@1", str(tmp_path), server.url, server.admin_key)
        assert sorted(path.name for path in tmp_path.iterdir()) == [*FILES, "prefix_base_model.json"]
        client.publish("clipull/based-again", tmp_path)
        assert client.base_model("clipull/based-again@1") == expected
    (tmp_path / FILES[0]).unlink()
    (tmp_path / FILES[1]).unlink()
    with pytest.raises(Conflict, match=r"prefix_base_model\.json exists"):
        pull("clipull/based@1", str(tmp_path), server.url, server.admin_key)


def test_a_pulled_folder_has_the_recipe_of_a_compiled_prefix(server: Server, tmp_path: Path) -> None:
    """`pull` writes the recipe as `compile` does, so that a version published of the pulled folder has it too; other
    annotations are not part of it."""
    recipe = {"compiled/base": "llama", "compiled/from": "text"}
    with PrefixClient(server.url, server.admin_key) as client:
        client.publish("clipull/compiled", LLAMA, annotations={"run": "17", **recipe})
        pull("clipull/compiled@1", str(tmp_path), server.url, server.admin_key)
        assert sorted(path.name for path in tmp_path.iterdir()) == [*FILES, "prefix_recipe.json"]
        client.publish("clipull/compiled-again", tmp_path)
        assert client.annotations("clipull/compiled-again@1") == recipe


def _reformatted(source: Path, folder: Path) -> Path:
    """Returns a copy of the folder with its config in another form."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_pull_says_what_it_wrote(run: Run, tmp_path: Path) -> None:
    """`pull` prints the version, the folder and the digest, for a person and for a script."""
    run("publish", LLAMA, "clipull/json")
    shown = run("pull", "clipull/json", tmp_path / "shown").stdout.splitlines()
    told = json.loads(run("pull", "clipull/json@1", tmp_path, "--json").stdout)
    assert shown == [f"pulled clipull/json@1 to {tmp_path / 'shown'}", f"digest {told['digest']}"]
    assert (told["version"], told["folder"]) == (1, str(tmp_path))
    assert told["digest"] == json.loads(run("inspect", "clipull/json", "--json").stdout)["digest"]


def test_pull_overwrites_nothing_and_leaves_nothing(run: Run, tmp_path: Path) -> None:
    """`pull` refuses existing files, a missing version, and a folder that cannot be made, and leaves nothing."""
    run("publish", LLAMA, "clipull/kept")
    (tmp_path / "adapter_config.json").write_text("mine")
    (tmp_path / "file").write_text("")
    for reference, folder, words in (
        ("clipull/kept", tmp_path, "error (conflict)"),
        ("clipull/none", tmp_path / "a", "error (not-found)"),
        ("clipull/kept", tmp_path / "file" / "b", "error (storage-failed)"),
    ):
        failed = run("pull", reference, folder)
        assert failed.returncode == 1
        assert words in failed.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "file"]
    assert (tmp_path / "adapter_config.json").read_text() == "mine"


def test_weights_come_in_pieces_and_are_verified(
    run: Run, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pull` never holds a large file whole; it refuses and removes bytes that are not the version's."""
    run("publish", LLAMA, "clipull/pieces")
    monkeypatch.setattr(fetching, "_PIECE", 1000)
    pull("clipull/pieces", str(tmp_path / "good"), server.url, server.admin_key)
    for name in FILES:
        assert (tmp_path / "good" / name).read_bytes() == (LLAMA / name).read_bytes()
    sound = PrefixClient.parameters

    def damaged(client: PrefixClient, reference: str, first: int, stop: int) -> bytes:
        return bytes(stop - first) if first else bytes(sound(client, reference, first, stop))

    monkeypatch.setattr(PrefixClient, "parameters", damaged)
    with pytest.raises(InvalidResponse, match="the weights that came"):
        pull("clipull/pieces", str(tmp_path / "bad"), server.url, server.admin_key)
    assert list((tmp_path / "bad").iterdir()) == []


def test_fetch_keeps_the_metadata(run: Run, tmp_path: Path) -> None:
    """The saved file names its version and its form, as the service's answer does."""
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
    """A missing folder, a folder, a device, and a full disk are one line of error each, and nothing is left behind."""
    run("publish", LLAMA, "cli/unwritten")
    (tmp_path / "old").write_text("old")
    os.mkfifo(tmp_path / "pipe")  # no regular file, as a device is none
    for output, words in (
        (tmp_path / "none" / "out", f"cannot write {tmp_path}/none/out: there is no folder {tmp_path}/none"),
        (tmp_path, f"cannot write {tmp_path}: it is a folder"),
        (tmp_path / "pipe", f"cannot write {tmp_path}/pipe: it is no regular file"),
    ):
        refused = run("fetch", "cli/unwritten", "-o", output)
        assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)
        assert refused.stderr.startswith(f"error (invalid-request): {words}")
    (tmp_path / "pipe").unlink()
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
