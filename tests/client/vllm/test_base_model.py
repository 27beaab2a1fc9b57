"""The base model of vLLM is known by vLLM's configuration and by the files that vLLM loads, where they are here."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest
import transformers
from huggingface_hub import constants

from prefix_service.checkpoints.base_models import read_fingerprint
from prefix_service.client.vllm.base_model import BaseModel
from tests.conftest import CORPUS

_BASE: Final = CORPUS / "bases" / "llama"


def _vllm(model: str, **changed: Any) -> BaseModel:
    """Returns the base model of a vLLM that was started with a folder or a name."""
    config = transformers.AutoConfig.from_pretrained(_BASE, **changed)
    found = SimpleNamespace(hf_config=config, model=model, revision=None, tokenizer=model, tokenizer_revision=None)
    return BaseModel(SimpleNamespace(model_config=found), "warn")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns the folder of a model with a tokenizer."""
    made = tmp_path / "model"
    shutil.copytree(_BASE, made)
    (made / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    return made


def test_a_folder_is_read(folder: Path) -> None:
    """Weights and tokenizer come from the folder, settings from vLLM, which may override them."""
    expected = read_fingerprint(folder)
    found = _vllm(str(folder)).fingerprint
    assert found.differences(expected) == []
    assert (found.weights_index, found.tokenizer) == (expected.weights_index, expected.tokenizer)
    assert found.tokenizer is not None
    other = _vllm(str(folder), rope_parameters={"rope_theta": 5e5, "rope_type": "default"}).fingerprint
    assert other.differences(expected) == [("rope.rope_theta", 5e5, 1e4)]


def test_a_downloaded_model_is_read_from_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name means its snapshot in the cache of Hugging Face."""
    kept = tmp_path / "hub" / "models--acme--base"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("here")
    shutil.copytree(folder, kept / "snapshots" / "here")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert _vllm("acme/base").fingerprint.weights_index == read_fingerprint(folder).weights_index


@pytest.mark.parametrize("name", ["acme/elsewhere", "s3://bucket/model", "broken"])
def test_what_cannot_be_read_is_unknown(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files elsewhere, or damaged ones, leave what vLLM's configuration says."""
    monkeypatch.chdir(folder.parent)
    shutil.copytree(folder, "broken")
    for damaged in ("model.safetensors", "tokenizer.json"):
        Path("broken", damaged).write_text("damaged")
    found = _vllm(name).fingerprint
    assert (found.architecture, found.weights_index, found.tokenizer) == ("llama", None, None)
