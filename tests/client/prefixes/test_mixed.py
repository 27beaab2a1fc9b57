"""`get_many` returns a batch whose rows have prefixes of their own, and a model continues each row from its own."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from prefix_service.checkpoints.sources import prepare_upload
from prefix_service.client import MixedPrefix, PrefixClient
from prefix_service.client.transformers.caches import to_cache
from prefix_service.client.transformers.generation import generate
from prefix_service.errors import ConnectionFailed, DimensionMismatch, InvalidReference, InvalidRequest, NotFound
from prefix_service.prefix.kv import extend_mask, position_ids
from prefix_service.prefix.wire.received import Received, read_prefix_file
from tests.architectures import NAMED, VOCABULARY, base
from tests.client.conftest import GPT2, LLAMA, Counting
from tests.conftest import CORPUS, Publish, Server

pytestmark = [
    # This is transformers' warning, for a property that PEFT reads.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # This is PEFT's warning, for an adapter saved without a base model's name.
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]

# The five adapters have different lengths and two tenants.
LENGTHS = {"mixeda/six": 6, "mixedb/two": 2, "mixeda/nine": 9, "mixedb/one": 1, "mixedb/four": 4}
# The eight rows are each adapter, two of them in a row, none, and one again.
ROWS: list[Any] = [*LENGTHS, ["mixedb/four", "mixeda/six"], None, "mixedb/two"]
TOKENS = torch.randint(3, VOCABULARY, (8, 7), generator=torch.Generator().manual_seed(3))
INPUTS = (7, 4, 5, 1, 6, 3, 7, 2)
RIGHT = torch.tensor([[1] * length + [0] * (7 - length) for length in INPUTS])
LEFT = RIGHT.flip(1)
NEW: dict[str, Any] = {"max_new_tokens": 8}
MODELS = ["gpt2", "llama", "gemma3", "gemma3-short-window", "opt"]

models = pytest.mark.parametrize("name", MODELS)
masks = pytest.mark.parametrize("mask", [RIGHT, LEFT], ids=["right", "left"])


def _named(name: str, row: Any) -> Any:
    """Returns a row of ROWS with adapters of that architecture."""
    if row is None:
        return None
    return [_named(name, reference) for reference in row] if isinstance(row, list) else f"{row}-{name}"


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Returns the folder of an adapter that PEFT saved, by architecture and name in LENGTHS."""

    def save(name: str, adapter: str) -> Path:
        architecture = replace(NAMED[name], num_virtual_tokens=LENGTHS[adapter])
        return architecture.save_adapter(tmp_path_factory.mktemp("adapter"))

    return cache(save)


@pytest.fixture(scope="session")
def mixed_of(folder_of: Callable[[str, str], Path], server: Server) -> Callable[[str], MixedPrefix]:
    """Returns ROWS of an architecture, published to the real server and fetched from it."""

    def fetch(name: str) -> MixedPrefix:
        with PrefixClient(server.url, server.admin_key) as client:
            for adapter in LENGTHS:
                upload = prepare_upload(folder_of(name, adapter))
                with upload.weights as weights:
                    client.publish_files(f"{adapter}-{name}", upload.config, weights)
            return client.get_many([_named(name, row) for row in ROWS])

    return cache(fetch)


Alone = list[list[tuple[Tensor, Tensor]] | None]


@pytest.fixture(scope="session")
def alone_of(mixed_of: Callable[[str], MixedPrefix], server: Server) -> Callable[[str], Alone]:
    """Returns each row by itself, `[1, H, n, D]`, with several prefixes joined; None for no prefix."""

    def fetch(name: str) -> Alone:
        mixed_of(name)
        found: Alone = []
        with PrefixClient(server.url, server.admin_key) as client:
            for row in ROWS:
                own = [client.get(_named(name, ref)).past_key_values for ref in _refs(row)]
                joined = [
                    tuple(torch.cat(kind, 2) for kind in zip(*layer, strict=True)) for layer in zip(*own, strict=True)
                ]
                found.append([(key, value) for key, value in joined] or None)
        return found

    return cache(fetch)


def _refs(row: Any) -> list[str]:
    return row if isinstance(row, list) else [] if row is None else [row]


def _logits(name: str, pairs: list[tuple[Tensor, Tensor]] | None, ids: Tensor, mask: Tensor) -> Tensor:
    tokens = 0 if pairs is None else pairs[0][0].shape[2]
    behind = {} if pairs is None else {"past_key_values": to_cache(pairs, base(name).config)}
    own = {"attention_mask": extend_mask(mask, tokens), "position_ids": position_ids(mask, tokens)}
    logits: Tensor = base(name)(input_ids=ids, **own, **behind).logits
    return logits


# --- One forward pass ---


@masks
@models
def test_one_forward_pass_gives_each_row_what_it_gets_alone(
    name: str, mask: Tensor, mixed_of: Callable[[str], MixedPrefix], alone_of: Callable[[str], Alone]
) -> None:
    """All eight rows, padded on either side, have the logits of the row alone; alone, a row has no padding, unless the
    model's windows count it, as they do in PEFT.
    """
    mixed = mixed_of(name).for_inputs(mask)
    own = {"attention_mask": mixed.attention_mask, "position_ids": mixed.position_ids}
    found = base(name)(input_ids=TOKENS * mask, past_key_values=mixed.to_cache(base(name).config), **own).logits
    for row, pairs in enumerate(alone_of(name)):
        real = mask[row] == 1
        ids, its = (TOKENS * mask)[row : row + 1], mask[row : row + 1]
        if "gemma3" not in name or mask is RIGHT:
            ids, its = ids[:, real], its[:, real]
        expected = _logits(name, pairs, ids, its)[its == 1]
        torch.testing.assert_close(found[row, real], expected, rtol=0, atol=1e-5)


@models
def test_rows_with_one_adapter_have_pefts_logits(
    name: str, mixed_of: Callable[[str], MixedPrefix], folder_of: Callable[[str, str], Path]
) -> None:
    """Each row with one adapter has the logits of PEFT's model with that adapter."""
    mixed = mixed_of(name).for_inputs(LEFT)
    own = {"attention_mask": mixed.attention_mask, "position_ids": mixed.position_ids}
    found = base(name)(input_ids=TOKENS * LEFT, past_key_values=mixed.to_cache(base(name).config), **own).logits
    for row, adapter in enumerate(LENGTHS):
        its = LEFT[row : row + 1]
        inputs = {"input_ids": TOKENS[row : row + 1] * its, "attention_mask": its}
        model = NAMED[name].peft(folder_of(name, adapter))
        expected = model(**inputs, position_ids=position_ids(its, 0)).logits
        torch.testing.assert_close(found[row][its[0] == 1], expected[its == 1], rtol=0, atol=5e-5)


@models
def test_every_prefix_matters(name: str, mixed_of: Callable[[str], MixedPrefix]) -> None:
    """Rows in another order have other logits, or equal logits would prove nothing."""
    mixed = mixed_of(name).for_inputs(RIGHT)
    turned = replace(mixed, stacked=mixed.stacked.roll(1, 0))
    own = {"attention_mask": mixed.attention_mask, "position_ids": mixed.position_ids}
    first, second = (
        base(name)(input_ids=TOKENS, past_key_values=given.to_cache(base(name).config), **own).logits
        for given in (mixed, turned)
    )
    differs = (first - second).abs().amax(dim=(1, 2)) > 0.1
    assert differs[[0, 1, 2, 3, 4, 5, 7]].all()


# --- generate ---


@masks
@models
def test_greedy_tokens_are_those_of_each_row_alone(
    name: str, mask: Tensor, mixed_of: Callable[[str], MixedPrefix], alone_of: Callable[[str], Alone]
) -> None:
    """`generate` returns each row's own tokens, whichever side is padded, also for a mask that was given before."""
    inputs = {"input_ids": TOKENS * mask, "attention_mask": mask}
    found = mixed_of(name).generate(base(name), **inputs, **NEW)
    assert torch.equal(found, mixed_of(name).for_inputs(mask).generate(base(name), TOKENS * mask, **NEW))
    assert torch.equal(found[:, :7], TOKENS * mask)
    for row, pairs in enumerate(alone_of(name)):
        own = {key: tensor[row : row + 1] for key, tensor in inputs.items()}
        if "gemma3" not in name or mask is RIGHT:
            own = {key: tensor[:, mask[row] == 1] for key, tensor in own.items()}
        expected = base(name).generate(**own, **NEW) if pairs is None else generate(base(name), pairs, **own, **NEW)
        assert torch.equal(found[row, 7:], expected[0, -8:]), row


def test_options_of_generate(mixed_of: Callable[[str], MixedPrefix], alone_of: Callable[[str], Alone]) -> None:
    """With beams and several sequences a row has what it gets alone."""
    options = NEW | {"num_beams": 3, "num_return_sequences": 2}
    found = mixed_of("llama").generate(base("llama"), TOKENS, torch.ones_like(TOKENS), **options).view(8, 2, -1)
    for row, pairs in enumerate(alone_of("llama")):
        if pairs is not None:
            assert torch.equal(found[row], generate(base("llama"), pairs, TOKENS[row : row + 1], **options))


def test_half_precision_models(mixed_of: Callable[[str], MixedPrefix]) -> None:
    """Keys and values take the model's dtype."""
    half = NAMED["llama"].build().to(torch.bfloat16)
    assert mixed_of("llama").generate(half, TOKENS, **NEW).shape == (8, 15)
    assert mixed_of("llama").to(dtype=torch.bfloat16).past_key_values[0][0].dtype == torch.bfloat16


def test_a_model_that_it_does_not_fit(mixed_of: Callable[[str], MixedPrefix]) -> None:
    """The error names the dimensions."""
    with pytest.raises(DimensionMismatch, match="the prefix has 3 layers"):
        mixed_of("llama").to_cache(base("gemma3").config)


# --- get_many ---

FORMS: list[dict[str, Any]] = [
    {},
    {"dtype": "float32"},
    {"dtype": "bfloat16"},
    {"dtype": "float8_e4m3fn"},
    {"key_dtype": "bfloat16", "value_dtype": "float8_e4m3fn"},
    {"dtype": "float16", "value_dtype": "float8_e4m3fn", "layers": (1, 3)},
    {"layers": (1, 3), "kv_heads": (1, 2)},
]


def _sent(received: Received, layer: int, part: str) -> Tensor:
    """Returns keys or values as they were sent; float8 by its scales, and two dtypes in float32."""
    name = f"past_key_values.{layer}.{part}"
    values, scales = received.tensors[name], received.tensors.get(f"{name}_scale")
    if scales is not None:
        return values.float() * scales
    return values if received.metadata["dtype"] else values.float()


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_it_is_what_the_service_sends(
    client: Any, admin: httpx.Client, options: dict[str, Any], mixed_of: Callable[[str], MixedPrefix]
) -> None:
    """A batch made from the cache has the bits, masks, positions and metadata of the service's."""
    mixed_of("llama")
    rows = [_named("llama", row) for row in ROWS]
    found = client.get_many(rows, attention_mask=LEFT, **options)
    spans = {name: f"{span[0]}:{span[1]}" for name, span in options.items() if "dtype" not in name}
    body = {"rows": rows, "attention_mask": LEFT.tolist(), **options, **spans}
    received = read_prefix_file(bytearray(admin.post("/v1/prefixes", json=body).content))
    layers = received.metadata["layers"]
    sent = torch.stack(
        [torch.stack([_sent(received, n, part) for part in ("key", "value")], 1) for n in range(*layers)], 1
    )
    assert found.stacked.dtype == sent.dtype
    assert torch.equal(found.stacked, sent)
    assert torch.equal(found.attention_mask, received.tensors["attention_mask"])
    assert torch.equal(found.position_ids, received.tensors["position_ids"])
    assert found.metadata["rows"] == received.metadata["rows"]


def test_shapes(mixed_of: Callable[[str], MixedPrefix]) -> None:
    """Padding is on the left, with zeros that the mask hides."""
    mixed = mixed_of("gpt2")
    assert (mixed.batch_size, mixed.num_virtual_tokens) == (8, 10)
    lengths = [6, 2, 9, 1, 4, 10, 0, 2]
    assert mixed.prefix_mask.tolist() == [[0] * (10 - length) + [1] * length for length in lengths]
    assert torch.equal(mixed.attention_mask, mixed.prefix_mask)
    assert len(mixed.past_key_values) == 3
    for key, value in mixed.past_key_values:
        assert key.shape == value.shape == (8, 4, 10, 8)
        assert not key.movedim(1, 3)[mixed.prefix_mask == 0].any()
    with pytest.raises(InvalidRequest, match="position_ids follow from the input's attention_mask"):
        mixed.position_ids  # noqa: B018 - it raises
    whole = mixed.extend_mask(RIGHT, dtype=torch.float32)
    assert whole.dtype == torch.float32
    assert whole[:, 10:].equal(RIGHT.float())
    assert mixed.to("cpu", torch.float16).for_inputs(RIGHT).to("cpu").position_ids.shape == (8, 7)


def test_its_memory_is_its_own(server: Server, publish: Publish) -> None:
    """Writing to a batch does not change the cache."""
    publish("mixedc", "llama", LLAMA)
    with PrefixClient(server.url, server.admin_key) as client:
        before = client.get("mixedc/llama@1").kv.tensor.clone()
        client.get_many(["mixedc/llama@1", "mixedc/llama@1"]).stacked.fill_(7)
        assert torch.equal(client.get("mixedc/llama@1").kv.tensor, before)


def test_each_prefix_is_fetched_once(server: Server, mixed_of: Callable[[str], MixedPrefix]) -> None:
    """A prefix is fetched once, however many rows have it; versions never again, and others cost a 304."""
    mixed_of("llama")
    counting = Counting()
    rows = ["mixeda/six-llama@1", None, ["mixedb/two-llama", "mixeda/six-llama@1"], "mixedb/two-llama"]
    with PrefixClient(server.url, server.admin_key, http=counting) as client:
        first = client.get_many(rows)
        assert counting.statuses == [200, 200]
        assert torch.equal(client.get_many(rows).stacked, first.stacked)
        assert counting.statuses == [200, 200, 304]
        assert client.get_many(rows[:2]).batch_size == 2
        assert counting.statuses == [200, 200, 304]


@pytest.mark.parametrize(
    ("rows", "error", "said"),
    [
        (["mixedc/llama", None, "mixedc/none"], NotFound, "row 2: there is no mixedc/none"),
        (["mixedc/llama", ["mixedc/llama", "mixedc/llama@9"]], NotFound, "row 1: there is no mixedc/llama@9"),
        (["mixedc/llama", "llama"], InvalidReference, "row 1: 'llama' names no tenant"),
        (["mixedc/llama", "mixedc/gpt2"], InvalidRequest, "row 1: mixedc/gpt2 has .* but row 0: mixedc/llama has "),
        (["mixedc/llama", "mixedc/half"], InvalidRequest, "row 1: mixedc/half is stored as bfloat16, but row 0"),
        ([None, None], InvalidRequest, "no row has a prefix"),
        ([], InvalidRequest, "no row has a prefix"),
        (["mixedc/llama", []], InvalidRequest, "row 1: an empty list; a row without a prefix is None"),
    ],
)
def test_errors_name_the_row(client: Any, publish: Publish, rows: list[Any], error: type[Exception], said: str) -> None:
    """The error names the row, as the service's own errors do."""
    publish("mixedc", "llama", LLAMA)
    publish("mixedc", "gpt2", GPT2)
    publish("mixedc", "half", CORPUS / "cases" / "llama-n20-emb-stored_bf16-on_fp32" / "adapter")
    with pytest.raises(error, match=f"^{said}"):
        client.get_many(rows)


def test_other_refusals(client: Any, publish: Publish) -> None:
    """A batch size or a mask that contradicts the rows is refused."""
    publish("mixedc", "llama", LLAMA)
    with pytest.raises(InvalidRequest, match="batch_size is 3, and there are 2 rows"):
        client.get_many(["mixedc/llama", None], batch_size=3)
    with pytest.raises(InvalidRequest, match=r"attention_mask must have 2 rows, \[batch, seq\], got \[3, 1\]"):
        client.get_many(["mixedc/llama", None], attention_mask=torch.ones(3, 1))
    assert client.get_many(["mixedc/llama", None], batch_size=2).batch_size == 2


def test_a_service_that_is_not_there() -> None:
    """The error of a service that cannot be reached names the first row."""
    with (
        PrefixClient("http://127.0.0.1:9", "pfx_x", timeout=0.2) as client,
        pytest.raises(ConnectionFailed, match=r"^row 0: "),
    ):
        client.get_many(["a/b", "a/c"])
