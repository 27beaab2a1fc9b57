"""Prefixes share vLLM with another connector, one that keys what it stores by token ids alone."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.asking import TOKENS_SAID, Asking, started
from tests.vllm.driver import multi_config, store_config, transfer_config
from tests.vllm.reference import Reference

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own

_ROWS = [("a", "long"), ("b", "long"), (None, "long"), ("d", "middle"), (None, "middle")]
"""Prompts of whole blocks, which partners store."""


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Returns the folders of the partners before and after the PrefixConnector."""
    return tmp_path_factory.mktemp("before"), tmp_path_factory.mktemp("behind")


@pytest.fixture(scope="module")
def partnered(
    reference: Reference, stores: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Asking]:
    """Yields one engine with a partner before and one after the PrefixConnector."""
    partners = [store_config(store) for store in stores]
    with started(reference, tmp_path_factory.mktemp("partnered"), partners) as asking:
        yield asking


def _clear(asking: Asking, *folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder)
        folder.mkdir()
    assert asking.engine.ask({"forget": "blocks"}) == {"reset": True}


def test_partners_store_and_serve_plain_requests_and_nothing_of_an_adapter(
    partnered: Asking, stores: tuple[Path, Path]
) -> None:
    """Each row says what PEFT says, whichever partner serves it, and partners store only plain prompts."""
    forged: dict[str, Any] = {"prompt": [0] * 20 + partnered.reference.prompts["long"]}  # as adapter a's looks
    said = partnered.engine.run([forged])["outputs"][0]["tokens"]
    _clear(partnered, *stores)
    for emptied in ((), stores[:1], stores[1:]):
        _clear(partnered, *emptied)
        for row in _ROWS:  # one by one: each could meet what those before have stored
            partnered.run(row)
        assert [len(list(store.iterdir())) for store in stores] == [2, 2]
        assert partnered.engine.ask({"forget": "blocks"}) == {"reset": True}
        outputs = partnered.run(*_ROWS)
        assert [output["cached"] for output in outputs] == [20, 20, 64, 45, 32]  # plain ones from a partner
    assert partnered.engine.run([forged])["outputs"][0]["tokens"] == said
    assert partnered.loaded() == {"cpu": ["acme/a", "acme/b", "acme/d"], "gpu": []}


def test_partners_that_see_adapters_serve_one_for_another(partnered: Asking, stores: tuple[Path, Path]) -> None:
    """Without hiding, as a negative control, adapter b gets what a partner stored of adapter a."""
    _clear(partnered, *stores)
    partnered.run(("a", "long"))
    try:
        assert partnered.engine.ask({"hidden": False}) == {"reset": True}
        partnered.run(("a", "long"))
        leaked = partnered.engine.run([partnered.job("b", "long")])["outputs"][0]
        assert leaked["tokens"] == partnered.reference.says("a", "long", TOKENS_SAID).tokens
    finally:
        assert partnered.engine.ask({"hidden": True}) == {"reset": True}
    _clear(partnered, *stores)
    partnered.run(*_ROWS)


def test_a_refused_request_ends_with_an_error_where_a_partner_has_its_prompt(partnered: Asking) -> None:
    """A partner's hit neither answers a request whose adapter is missing, nor makes it wait forever."""
    partnered.run((None, "long"))
    jobs = [partnered.job("nosuch", "long"), {**partnered.job("nosuch", "long"), "prompt": [7]}]
    jobs.append(partnered.job(None, "long", extra={"kv_transfer_params": {"prefix_adaptor": "acme/a"}}))
    outputs = partnered.engine.run(jobs)["outputs"]
    assert [(output["finish"], output["tokens"]) for output in outputs] == [("error", [])] * 3


def test_what_cannot_be_made_safe_ends_the_start(partnered: Asking, tmp_path: Path) -> None:
    """vLLM's own MultiConnector, `recompute`, two prefix connectors or none end the start with an error."""
    prefixes, store = transfer_config(partnered.server.url), store_config(tmp_path)
    recompute: dict[str, Any] = {"kv_load_failure_policy": "recompute"}
    refused = [
        (multi_config(prefixes, store, ours=False), "cannot be used in vLLM's MultiConnector"),
        (multi_config(store, prefixes, ours=False), 'add "kv_connector_module_path": "prefix_service.client.vllm"'),
        (multi_config(prefixes, store, ours=False, **recompute), "cannot be used in vLLM's MultiConnector"),
        (multi_config(prefixes, store, **recompute), 'kv_load_failure_policy must be "fail"'),
        (multi_config({**prefixes, **recompute}, store), 'kv_load_failure_policy must be "fail"'),
        (multi_config(prefixes, {**store, **recompute}), 'kv_load_failure_policy must be "fail"'),
        ({**prefixes, **recompute}, 'kv_load_failure_policy must be "fail"'),
        (multi_config(store), "must have one PrefixConnector"),
        (multi_config(prefixes, prefixes), "must have one PrefixConnector"),
        (multi_config(store, multi_config(prefixes, ours=False)), "must have one PrefixConnector"),
        (multi_config(prefixes, multi_config(store, ours=False)), "MultiConnector inside of another"),
    ]
    for transfer, words in refused:
        assert words in str(partnered.engine.ask({"connect": transfer})["error"]), transfer
    for transfer in (prefixes, multi_config(prefixes, store), multi_config(store, prefixes)):
        assert partnered.engine.ask({"connect": transfer}) == {"error": None}
    offloading = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}
    own = partnered.engine.ask({"connect": {**offloading, "kv_connector_extra_config": {"cpu_bytes_to_use": 1 << 26}}})
    assert "only supported on CUDA" in own["error"]  # NOT TESTED: vLLM has no offloading on a CPU


def test_partners_are_kept_from_every_hook_of_a_request(partnered: Asking) -> None:
    """A hook that another vLLM adds fails here. Open hooks are called for the connector that loads, or for none."""
    hooks = partnered.engine.ask({"hooks": True})
    by_choice = {"get_external_cache_hit_sources", "get_loaded_kv_cache_group_ids"}  # not in every version
    assert set(hooks["open"]) - by_choice == set()
    assert len(hooks["closed"]) == 8
