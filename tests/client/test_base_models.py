"""Both clients compare the base model of a version with the model that its prefix is given to."""

import copy
import itertools
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
import torch
import transformers

from prefix_service.checkpoints.base_models import read_fingerprint
from prefix_service.client import BaseModelWarning, Fingerprint, PrefixClient
from prefix_service.client.transformers import compile_prefix
from prefix_service.errors import BaseModelMismatch, InvalidRequest, NotFound, PrefixServiceError
from tests.client.conftest import LLAMA, Counting
from tests.conftest import CORPUS, Server

_BASE: Final = CORPUS / "bases" / "llama"
_OTHER: Final = "sampled-bfloat16-sha256:0"
_IDS: Final = torch.ones(1, 2, dtype=torch.int64)
_names = itertools.count()


@pytest.fixture(scope="module")
def model() -> Any:
    """Returns the base model of the adapters."""
    return transformers.AutoModelForCausalLM.from_pretrained(_BASE)


def _published(client: Any, **changed: Any) -> str:
    """Publishes an adapter whose base model's fingerprint has changed fields; returns its name."""
    name = f"bases/a{next(_names)}"
    client.publish(name, LLAMA, base_model=replace(read_fingerprint(_BASE), **changed))
    return name


def test_its_own_base_model_is_silent(connect: Callable[..., Any], server: Server, model: Any) -> None:
    """The model that the fingerprint was made of is no other one, whatever the client does with others."""
    client = connect(server.url, base_model_check="refuse")
    prefix = client.get(_published(client))
    assert prefix.base_model == read_fingerprint(_BASE)
    assert prefix.base_model.weights_index is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error", BaseModelWarning)
        prefix.to_cache(model)
        prefix.to_cache(model.config)
        prefix.generate(model, _IDS, max_new_tokens=1, pad_token_id=0)


def test_another_one_is_a_warning(connect: Callable[..., Any], server: Server, model: Any) -> None:
    """By default the caller is warned, with the field that differs and both values, and served."""
    client = connect(server.url)
    name = _published(client, weights_index=_OTHER)
    here = read_fingerprint(_BASE).weights_index
    words = f"{name}@1 was made for another base model: weights_index is '{here}' here, and was '{_OTHER}'. Use it with"
    with pytest.warns(BaseModelWarning, match=words) as seen:
        client.get(name).to_cache(model)
    assert [each.filename for each in seen] == [__file__]
    with pytest.warns(BaseModelWarning, match=words):
        client.get(name).generate(model, _IDS, max_new_tokens=1, pad_token_id=0)
    with pytest.warns(BaseModelWarning, match=words):
        client.get_many([name, None]).to_cache(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", BaseModelWarning)
        client.get(name).to_cache(model.config)  # which says nothing of weights


def test_a_fine_tuned_variant_is_told_apart_and_a_copy_is_not(server: Server, model: Any, tmp_path: Path) -> None:
    """A prefix compiled with a base model is refused by its instruct variant, which differs in weights alone, and
    accepted by the same base model in another folder.
    """
    compile_prefix(model, token_ids=[5, 6]).save(tmp_path / "prefix")
    instruct = copy.deepcopy(model)
    for parameter in instruct.parameters():
        parameter.data += 0.01 * parameter.data.abs().mean()
    instruct.save_pretrained(tmp_path / "instruct")
    shutil.copytree(_BASE, tmp_path / "copy")
    variants = {
        name: transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("instruct", "copy")
    }
    with PrefixClient(server.url, server.admin_key, base_model_check="refuse") as client:
        client.publish("bases/variants", tmp_path / "prefix")
        prefix = client.get("bases/variants")
    with pytest.raises(
        BaseModelMismatch, match=r"another base model: weights_index is '[^']*' here, and was '[^']*'\."
    ):
        prefix.generate(variants["instruct"], _IDS)
    prefix.generate(variants["copy"], _IDS, max_new_tokens=1, pad_token_id=0)


def test_another_one_can_be_refused_or_served(connect: Callable[..., Any], server: Server, model: Any) -> None:
    """`refuse` raises before anything is computed; `off` neither asks nor compares."""
    strict = connect(server.url, base_model_check="refuse")
    name = _published(strict, rope={"rope_theta": 5e5}, norms={"rms_norm_eps": 1.0})
    words = r"rope\.rope_theta is 10000\.0 here, and was 500000\.0; norms\.rms_norm_eps is "
    with pytest.raises(BaseModelMismatch, match=words):
        strict.get(name).to_cache(model.config)
    with pytest.raises(BaseModelMismatch, match=words):
        strict.get(name).generate(model, _IDS)
    mixed = strict.get_many([name, name])
    with pytest.raises(BaseModelMismatch, match=words):
        mixed.generate(model, _IDS.expand(2, 2))
    through = connect(server.url, base_model_check="off")
    prefix = through.get(name)
    assert prefix.base_model == Fingerprint()
    prefix.to_cache(model)
    with pytest.raises(InvalidRequest, match="base_model_check must be one of off, warn, refuse, got 'sometimes'"):
        connect(server.url, base_model_check="sometimes")


def test_only_a_fingerprint_that_exists_costs_a_request(server: Server) -> None:
    """The answer with a prefix names it; it is asked for once, and seen when it is given, or taken away, later."""
    with PrefixClient(server.url, server.admin_key, http=(through := Counting())) as client:
        name = f"bases/a{next(_names)}"
        client.publish(name, LLAMA)
        through.statuses.clear()
        assert client.get(name).base_model == Fingerprint()
        assert through.statuses == [200]
        client.put_base_model(name, Fingerprint("llama"))
        through.statuses.clear()
        assert client.get(name).base_model == Fingerprint("llama")
        assert through.statuses == [304, 200]
        assert client.get(name).base_model == Fingerprint("llama")
        assert client.get(f"{name}@1").base_model == Fingerprint("llama")
        assert client.get(f"{name}@1").base_model == Fingerprint("llama")
        assert through.statuses == [304, 200, 304, 200]
        client.put_base_model(name, Fingerprint())
        assert client.get(name).base_model == Fingerprint()


def test_a_prefix_comes_without_a_fingerprint_that_cannot_be_read(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prefix is what was asked for: an error of the other question is no error of this call."""
    with PrefixClient(server.url, server.admin_key) as client:
        name = _published(client)
    with PrefixClient(server.url, server.admin_key) as client:
        with monkeypatch.context() as patch:
            patch.setattr("prefix_service.client.flows.base_models._path", lambda _: "/v1/usage?by=nothing")
            assert client.get(name).base_model == Fingerprint()
        assert client.get(name).base_model == read_fingerprint(_BASE)  # the next call asks again


def test_a_version_stands_if_its_fingerprint_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says that the version is published, and what to do."""
    name = f"bases/a{next(_names)}"
    with PrefixClient(server.url, server.admin_key) as client:
        with monkeypatch.context() as patch:
            patch.setattr("prefix_service.client.flows.base_models._path", lambda _: "/v1/no/such/route")
            words = f"{name}@1 is published, but the fingerprint of its base model is not stored"
            with pytest.raises(PrefixServiceError, match=words) as refused:
                client.publish(name, LLAMA, base_model=Fingerprint("llama"))
        assert isinstance(refused.value, NotFound)
        version, is_new = client.publish(name, LLAMA, base_model=Fingerprint("llama"))
        assert (version["version"], is_new) == (1, False)
        assert client.base_model(name) == Fingerprint("llama")
