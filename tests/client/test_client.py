"""Both clients keep the promises of references, batches, the local cache, and one tree of errors."""

import io
import itertools
import json
import subprocess
import sys
import threading
from datetime import UTC, datetime
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from prefix_service.client import Fingerprint, PrefixClient
from prefix_service.client.cache import fingerprints
from prefix_service.errors import (
    Forbidden,
    InvalidConfig,
    InvalidReference,
    InvalidRequest,
    InvalidResponse,
    NotFound,
    Unauthenticated,
    UnsafeCheckpoint,
)
from tests.client.conftest import GPT2, LLAMA, Counting
from tests.client.hostile import answer, hostile_server, says
from tests.conftest import CORPUS, Server

_names = itertools.count()


def published(client: Any, adapter: str, folder: Path = LLAMA) -> dict[str, Any]:
    """Publishes a corpus adapter, and returns its version."""
    with (folder / "adapter_model.safetensors").open("rb") as weights:
        version, _ = client.publish_files(adapter, (folder / "adapter_config.json").read_bytes(), weights)
    return dict(version)


def test_get_returns_what_peft_computes(client: Any) -> None:
    """The pairs of a batch are PEFT's, bit for bit, and share one memory."""
    published(client, "clients/exact")
    prefix = client.get("clients/exact", batch_size=3)
    expected = load_file(CORPUS / "cases/llama-n20-emb/expected.safetensors")
    for layer, (key, value) in enumerate(prefix.past_key_values):
        assert torch.equal(key, expected[f"b3.layers.{layer}.key"])
        assert torch.equal(value, expected[f"b3.layers.{layer}.value"])
        assert key.stride(0) == 0
    assert torch.equal(prefix.attention_mask, torch.ones(3, 20, dtype=torch.int64))


def test_a_folder_is_published_as_peft_wrote_it(client: Any, server: Server) -> None:
    """A folder, named by a path or text, is stored byte for byte, and again it is the same version."""
    name = f"folder{next(_names)}"
    version, is_new = client.publish(f"clients/{name}", LLAMA)
    assert (version["version"], is_new) == (1, True)
    stored = server.client().get(f"/v1/tenants/clients/adapters/{name}@1/parameters").content
    assert stored == (LLAMA / "adapter_model.safetensors").read_bytes()
    assert client.publish(f"clients/{name}", str(LLAMA))[1] is False
    assert client.publish(f"clients/{name}", GPT2)[0]["version"] == 2


def test_a_folder_without_dimensions_is_published_with_the_base_models(client: Any, tmp_path: Path) -> None:
    """`base_model_config` supplies them; of a training checkpoint only the prefix is sent."""
    config = json.loads((LLAMA / "adapter_config.json").read_text())
    base = {"model_type": "llama", "num_hidden_layers": config["num_layers"], "hidden_size": config["token_dim"]}
    base |= {"num_attention_heads": config["num_attention_heads"]}
    base |= {"num_key_value_heads": config["num_attention_heads"]}
    config |= {"num_layers": None, "token_dim": None, "num_attention_heads": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps(base))
    prefix = load_file(LLAMA / "adapter_model.safetensors")["prompt_embeddings"]
    save_file({"prompt_embeddings": prefix}, tmp_path / "model-1.safetensors")
    save_file({"lm_head.weight": torch.ones(100, 100)}, tmp_path / "model-2.safetensors")
    with pytest.raises(InvalidConfig):
        client.publish("clients/base", tmp_path)
    version, _ = client.publish("clients/base", tmp_path, base_model_config=tmp_path / "config.json")
    assert version["size"]["weights"] < 4 * 100 * 100
    assert torch.equal(client.get("clients/base").kv.tensor, _kv(client, LLAMA))


def _kv(client: Any, folder: Path) -> torch.Tensor:
    client.publish("clients/other", folder)
    tensor: torch.Tensor = client.get("clients/other").kv.tensor
    return tensor


def test_a_folder_that_cannot_be_published_is_named(client: Any, tmp_path: Path) -> None:
    """The error names a folder that is missing, empty, or has a pickle, before any request."""
    empty, pickled = tmp_path / "empty", tmp_path / "pickled"
    for folder in (empty, pickled):
        folder.mkdir()
    (pickled / "adapter_config.json").write_text('{"peft_type": "PREFIX_TUNING"}')
    (pickled / "adapter_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(InvalidRequest, match=r"no folder .*nowhere"):
        client.publish("clients/none", tmp_path / "nowhere")
    with pytest.raises(InvalidConfig, match="empty"):
        client.publish("clients/none", empty)
    with pytest.raises(UnsafeCheckpoint):
        client.publish("clients/none", pickled)
    with pytest.raises(InvalidRequest, match=r"base_model_config .*config.json cannot be read"):
        client.publish("clients/none", LLAMA, base_model_config=tmp_path / "config.json")


def test_resolve_tells_version_and_dimensions_without_tensors(server: Server) -> None:
    """`resolve` returns what `get` says of a version, by one small request, whatever the reference."""
    through = Counting()
    with PrefixClient(server.url, server.admin_key, http=through) as client:
        first, second = published(client, "clients/resolved"), published(client, "clients/resolved", GPT2)
        client.put_alias("clients/resolved", "prod", 1)
        through.statuses.clear()
        for reference in ("clients/resolved@1", "clients/resolved@prod", f"clients/resolved@{first['digest']}"):
            found = client.resolve(reference)
            assert (found.version, found.digest, found.dtype) == (1, first["digest"], "float32")
            assert found.reference == f"clients/resolved@{first['digest']}"
        assert client.resolve("clients/resolved").digest == second["digest"]
        assert through.statuses == [200] * 4
        told = client.get("clients/resolved@1").metadata
        sizes = ("tenant", "adapter", "peft_type", "base_model_name_or_path", "num_virtual_tokens", "num_layers")
        for name in (*sizes, "num_kv_heads", "head_dim"):
            assert getattr(found, name) == told[name]
        with pytest.raises(NotFound):
            client.resolve("clients/none")


def test_resolve_knows_the_base_model(
    client: Any, connect: Any, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`resolve` remembers a base model for a minute; the client that changes it knows immediately."""
    version = f"clients/known-{next(_names)}"
    published(client, version)
    other = connect(server.url)
    assert client.resolve(version).base_model == other.resolve(version).base_model == Fingerprint()
    known = Fingerprint("LlamaForCausalLM", sizes={"hidden_size": 64}, tokenizer="sha256:1")
    client.put_base_model(version, known)
    assert client.base_model(version) == client.resolve(f"{version}@1").base_model == known
    assert other.resolve(version).base_model == known
    changed = Fingerprint("LlamaForCausalLM", sizes={"hidden_size": 64}, tokenizer="sha256:2")
    client.put_base_model(version, changed)
    assert client.resolve(version).base_model == changed
    assert other.resolve(version).base_model == known
    assert fingerprints._FRESH <= 60
    with monkeypatch.context() as later:
        later.setattr(fingerprints, "_FRESH", 0)
        assert other.resolve(version).base_model == changed
    client.put_base_model(version, known)
    assert other.resolve(version).base_model == changed
    other.clear_cache()
    assert client.resolve(version).base_model == other.resolve(version).base_model == known
    with pytest.raises(NotFound):
        client.base_model("clients/none")


def test_resolve_takes_a_service_without_base_models(connect: Any) -> None:
    """`resolve` asks for no fingerprint that the service does not announce, and refuses what is none."""
    about = {"tenant": "a", "adapter": "b", "version": 1, "digest": "sha256:" + "0" * 64, "peft_type": "PREFIX_TUNING"}
    about |= {"num_virtual_tokens": 1, "num_layers": 1, "num_kv_heads": 1, "head_dim": 1, "dtype": "float32"}
    kind = "Content-Type: application/json"
    found, wrong = answer(json.dumps(about).encode(), kind), answer(b'{"tokenizer": 7}', kind)
    announced = answer(json.dumps(about).encode(), f"{kind}\r\nPrefix-Base-Model: known")
    with hostile_server(says(found, found)) as hostile:
        client = connect(hostile.url)
        assert [client.resolve("a/b").base_model for _ in range(2)] == [Fingerprint()] * 2
    with (
        hostile_server(says(announced, wrong)) as hostile,
        pytest.raises(InvalidResponse, match="tokenizer must be a text"),
    ):
        connect(hostile.url).resolve("a/b")


def test_adapters_come_page_by_page(client: Any) -> None:
    """Each page has the next one's cursor, and the last has none."""
    for name in ("one", "three", "two"):
        published(client, f"clients-paged/{name}")
    first, cursor = client.list_page("clients-paged", limit=2)
    rest, end = client.list_page("clients-paged", cursor=cursor)
    assert [item["adapter"] for item in first] == ["one", "three"]
    assert ([item["adapter"] for item in rest], end) == (["two"], None)
    assert [item["adapter"] for item in client.list("clients-paged", sort="-used")] == ["one", "three", "two"]


def test_a_service_tells_its_release_and_clock(client: Any) -> None:
    """`service` returns the service's release and time."""
    found = client.service()
    assert found.version == installed("prefix-service")
    assert abs((found.time - datetime.now(UTC)).total_seconds()) < 30


def test_resolve_refuses_a_description_that_is_none(connect: Any) -> None:
    """A size that is missing or no number raises an error of this project before it is used."""
    about = {"tenant": "a", "adapter": "b", "version": 1, "digest": "sha256:" + "0" * 64, "peft_type": "PREFIX_TUNING"}
    about |= {"num_virtual_tokens": 1, "num_layers": 1, "num_kv_heads": 1, "head_dim": 1, "dtype": "float32"}
    wrong: list[dict[str, Any]] = [
        {"num_layers": "1"},
        {"head_dim": 0},
        {"dtype": "int8"},
        {"num_kv_heads": None},
        {"version": 0},
    ]
    answers = [answer(json.dumps({**about, **each}).encode(), "Content-Type: application/json") for each in wrong]
    with hostile_server(says(*answers)) as hostile:
        client = connect(hostile.url)
        for each in wrong:
            with pytest.raises(InvalidResponse, match=next(iter(each))):
                client.resolve("a/b")


def test_every_kind_of_reference(client: Any, server: Server) -> None:
    """latest, a number, a digest and an alias return the version that they name."""
    first = published(client, "clients/refs")
    second = published(client, "clients/refs", GPT2)
    path = "/v1/tenants/clients/adapters/refs/aliases/prod"
    assert server.client().put(path, json={"version": 1}).is_success
    assert client.get("clients/refs").version == client.get("clients/refs@latest").version == 2
    assert client.get("clients/refs@1").digest == client.get("clients/refs@prod").digest == first["digest"]
    assert client.get(f"clients/refs@{second['digest']}").version == 2


def test_ranges_and_dtypes(client: Any) -> None:
    """Ranges of layers and heads and a dtype are the service's, and float8 arrives as float32 within its error."""
    published(client, "clients/forms")
    whole = client.get("clients/forms").kv.tensor
    part = client.get("clients/forms", layers=(1, 3), kv_heads=(0, 1), dtype="bfloat16").kv
    assert part.layers == (1, 3)
    assert torch.equal(part.tensor, whole[1:3, :, 0:1].to(torch.bfloat16))
    float8 = client.get("clients/forms", dtype="float8_e4m3fn").kv.tensor
    assert float8.dtype == torch.float32
    assert (float8 - whole).abs().max() <= whole.abs().max() / 16


@pytest.mark.parametrize("value_dtype", [None, "float32", "float16", "float8_e4m3fn"])
def test_keys_and_values_in_two_dtypes(client: Any, value_dtype: str | None) -> None:
    """Each half has the bits that it has alone, in float32 if the dtypes differ."""
    published(client, "clients/forms")
    found = client.get("clients/forms", layers=(1, 3), key_dtype="bfloat16", value_dtype=value_dtype)
    for part, dtype in enumerate(("bfloat16", value_dtype)):
        alone = client.get("clients/forms", layers=(1, 3), dtype=dtype).kv.tensor
        assert torch.equal(found.kv.tensor[:, part], alone[:, part].float())
    assert (found.metadata["key_dtype"], found.metadata["value_dtype"]) == ("bfloat16", value_dtype or "float32")
    assert found.metadata["dtype"] is None


def test_the_error_of_float8_is_told_beside_its_bytes(client: Any) -> None:
    """The figures are those of the two renderings, and no value is off by more than half a step of the format."""
    published(client, "clients/float8")
    told = client.float8_error("clients/float8")
    exact, found = (client.get("clients/float8", dtype=dtype).kv.tensor for dtype in (None, "float8_e4m3fn"))
    for part, error in enumerate((told.keys, told.values)):
        off, size = (found - exact)[:, part].abs().double(), exact[:, part].abs().double()
        assert error.max_absolute == pytest.approx(float(off.max()))
        assert error.mean_absolute == pytest.approx(float(off.mean()))
        assert error.max_relative == pytest.approx(float((off / size).max()))
        assert error.mean_relative == pytest.approx(float((off / size).mean()))
        assert 0 < error.mean_relative < 1 / 16
    assert (told.nbytes, told.bfloat16_nbytes) == (exact.numel() + 4 * 3 * 2 * 2, 2 * exact.numel())


def test_the_error_of_float8_where_all_is_zero(client: Any) -> None:
    """Zeros have no float8 error."""
    config = (LLAMA / "adapter_config.json").read_bytes()
    zeros = save({"prompt_embeddings": torch.zeros(20, 3 * 2 * 2 * 8)})
    client.publish_files("clients/zeros", config, io.BytesIO(zeros))
    told = client.float8_error("clients/zeros")
    assert told.keys == told.values
    assert (told.keys.max_absolute, told.keys.max_relative) == (0, 0)


def test_masks_and_positions(client: Any) -> None:
    """Ones precede the mask in its own dtype, and real tokens count from N, padded left or right."""
    published(client, "clients/masks")
    prefix = client.get("clients/masks")
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    assert prefix.extend_mask(mask).tolist() == [[1] * 20 + [0, 1, 1], [1] * 20 + [1, 1, 0]]
    assert prefix.extend_mask(mask.bool()).dtype == torch.bool
    assert prefix.position_ids(mask).tolist() == [[20, 20, 21], [20, 21, 21]]


def test_listing_goes_through_every_page(client: Any) -> None:
    """`list` returns all pages in the order of names."""
    names = [f"many-{number}" for number in range(3)]
    for name in names:
        published(client, f"listing/{name}")
    assert [item["adapter"] for item in client.list("listing")] == names
    assert client.list("listing", "no such model") == []
    assert [item["adapter"] for item in client.list("listing", limit=2)] == names[:2]
    assert client.inspect("listing/many-1")["num_virtual_tokens"] == 20


@pytest.mark.parametrize(
    ("call", "error"),
    ids=["missing", "no tenant", "bad name", "bad range", "no rows", "bad config", "version given"],
    argvalues=[
        (lambda client: client.get("clients/none"), NotFound),
        (lambda client: client.get("no-tenant"), InvalidReference),
        (lambda client: client.get("clients/Upper"), InvalidReference),
        (lambda client: client.get("clients/errors", layers=(0, 99)), InvalidRequest),
        (lambda client: client.get("clients/errors", batch_size=0), InvalidRequest),
        (
            lambda client: client.publish_files("clients/errors", b'{"peft_type": "LORA"}', io.BytesIO(b"")),
            InvalidConfig,
        ),
        (lambda client: client.publish_files("clients/errors@7", b"{}", io.BytesIO(b"")), InvalidRequest),
    ],
)
def test_errors_arrive_as_the_class_that_the_service_raised(client: Any, call: Any, error: type[Exception]) -> None:
    """The client raises the service's error, under the same name."""
    published(client, "clients/errors")
    with pytest.raises(error):
        call(client)


def test_keys_that_do_not_do(server: Server) -> None:
    """Errors tell a missing key, a wrong one, and too small a scope apart; another tenant's adapter is not found."""
    with PrefixClient(server.url, server.admin_key) as admin:
        published(admin, "clients/keys")
    with PrefixClient(server.url) as nobody, pytest.raises(Unauthenticated):
        nobody.get("clients/keys")
    with PrefixClient(server.url, server.key("read", "clients")) as reader:
        assert reader.get("clients/keys").version == 1
        with pytest.raises(Forbidden):
            published(reader, "clients/keys", GPT2)
    with PrefixClient(server.url, server.key("admin", "strangers")) as stranger, pytest.raises(NotFound):
        stranger.get("clients/keys")


def test_the_cache_revalidates_what_may_move_and_never_what_cannot(server: Server) -> None:
    """`latest` costs a 304, and a version nothing; a move is seen immediately, and `clear_cache` forgets."""
    through = Counting()
    with PrefixClient(server.url, server.admin_key, http=through) as client:
        published(client, "clients/cached")
        through.statuses.clear()
        for _ in range(3):
            client.get("clients/cached@1", batch_size=2)
        assert through.statuses == [200]
        first, second = (client.get("clients/cached") for _ in range(2))
        assert through.statuses == [200, 200, 304]
        assert torch.equal(first.kv.tensor, second.kv.tensor)
        published(client, "clients/cached", GPT2)
        assert client.get("clients/cached").version == 2
        client.clear_cache()
        through.statuses.clear()
        client.get("clients/cached@1")
        assert through.statuses == [200]


def test_the_cache_is_bounded(server: Server) -> None:
    """Beyond the budget the least recently used prefix is dropped."""
    through = Counting()
    with PrefixClient(server.url, server.admin_key, http=through, cache_bytes=20_000) as client:
        for name in ("one", "two", "three"):
            published(client, f"bounded/{name}")  # 7,680 bytes each
        for name in ("one", "two", "one", "three"):
            client.get(f"bounded/{name}@1")
        through.statuses.clear()
        client.get("bounded/one@1")
        assert through.statuses == []
        client.get("bounded/two@1")
        assert through.statuses == [200]


def test_one_client_serves_many_threads(server: Server) -> None:
    """Threads share connections and the cache, and each gets the right tensors."""
    with PrefixClient(server.url, server.admin_key) as client:
        published(client, "threads/llama")
        published(client, "threads/gpt2", GPT2)
        expected = {name: client.get(f"threads/{name}").kv.tensor for name in ("llama", "gpt2")}
        right: list[bool] = []

        def work(name: str) -> None:
            right.extend(torch.equal(client.get(f"threads/{name}").kv.tensor, expected[name]) for _ in range(20))

        threads = [threading.Thread(target=work, args=(name,)) for name in ("llama", "gpt2") * 4]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert right == [True] * 160


def test_prefetch_brings_many_at_once(client: Any) -> None:
    """A prefetched version is there without a request, in the requested form."""
    versions = [published(client, f"prefetch/{name}") for name in ("one", "two", "three")]
    names = [f"prefetch/{version['adapter']}@{version['version']}" for version in versions]
    client.prefetch(names, dtype="bfloat16", concurrency=2)
    for name in names:
        client.delete(name)
        assert client.get(name, dtype="bfloat16").kv.tensor.dtype == torch.bfloat16
        with pytest.raises(NotFound):
            client.get(name)


def test_prefetch_raises_the_first_failure_when_all_is_done(client: Any) -> None:
    """`prefetch` fetches the others although one is missing, and raises the first failure."""
    last = f"prefetch/last@{published(client, 'prefetch/last')['version']}"
    with pytest.raises(NotFound, match="missing-1"):
        client.prefetch(["prefetch/missing-1", "prefetch/missing-2", "Prefetch/bad", last], concurrency=1)
    client.delete("prefetch/last")
    assert client.get(last).num_virtual_tokens == 20


def test_materialised_rows_may_be_written_to(client: Any) -> None:
    """Each materialised row has its own memory; neither other rows nor the cache see what is written."""
    published(client, "clients/rows")
    prefix = client.get("clients/rows@1", batch_size=3, materialise=True)
    shared = client.get("clients/rows@1", batch_size=3)
    for own, other in zip(prefix.past_key_values, shared.past_key_values, strict=True):
        for kind in (0, 1):
            assert torch.equal(own[kind], other[kind])
            assert own[kind].is_contiguous()
    prefix.past_key_values[1][0][2].fill_(7.0)
    again = prefix.past_key_values[1][0]
    assert bool((again[2] == 7.0).all())
    assert torch.equal(again[:2], shared.past_key_values[1][0][:2])
    assert not bool((client.get("clients/rows@1").past_key_values[1][0] == 7.0).any())
    assert prefix.to(dtype=torch.bfloat16).past_key_values[1][0][2].eq(7.0).all()
    assert prefix.for_batch(2).past_key_values[1][0].stride(0) == 0


WITHOUT_TORCH = """
import sys
from prefix_service.client import AsyncPrefixClient, PrefixClient
client = PrefixClient(*sys.argv[1:])
assert client.list("lazy")[0]["adapter"] == "a"
assert client.inspect("lazy/a")["version"] == 1
assert client.aliases("lazy/a") == {}
heavy = sorted({"torch", "numpy", "pydantic", "safetensors"} & sys.modules.keys())
assert not heavy, heavy
assert client.get("lazy/a").version == 1
assert "torch" in sys.modules
from prefix_service.client import Prefix
assert isinstance(client.get("lazy/a"), Prefix)
client.close()
"""


def test_torch_comes_with_the_first_prefix(server: Server) -> None:
    """Neither the import nor the management of adapters imports torch, which takes seconds."""
    with PrefixClient(server.url, server.admin_key) as client:
        published(client, "lazy/a")
    command = [sys.executable, "-c", WITHOUT_TORCH, server.url, server.admin_key]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_commands_do_without_torch() -> None:
    """The command line's module imports neither torch nor pydantic nor httpx."""
    code = "import sys, prefix_service.cli.app; assert not {'torch', 'pydantic', 'httpx'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
