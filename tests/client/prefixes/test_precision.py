"""`pair_costs` compares a model's predictions behind a prefix in two dtypes with those behind float32."""

from collections.abc import Iterator
from itertools import product

import pytest
import torch

from prefix_service.client import Prefix, PrefixClient
from prefix_service.client.prefixes.precision import DTYPES, PAIRS, pair_costs
from prefix_service.errors import DimensionMismatch
from prefix_service.prefix.variant import DtypePair, KVDtype
from tests.architectures import NAMED, base
from tests.client.conftest import GPT2, LLAMA
from tests.conftest import CORPUS, Server


@pytest.fixture
def client(server: Server) -> Iterator[PrefixClient]:
    """Yields a client of a service that has an adapter of the corpus."""
    with PrefixClient(server.url, server.admin_key) as client:
        client.publish("precision/llama", LLAMA)
        yield client


def test_each_pair_is_compared_with_float32(client: PrefixClient) -> None:
    """Bytes are those that are sent; divergence and changes are those of the prefix that arrives, of all texts."""
    model = NAMED["llama"].build().double()  # `base` is shared
    prefixes = {dtype: client.get("precision/llama", dtype=dtype) for dtype in DTYPES}
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, model.config.vocab_size, (1, length), generator=draw) for length in (70, 5)]
    found = list(pair_costs(prefixes, model, texts))
    assert [(cost.key_dtype, cost.value_dtype) for cost in found] == list(product(DTYPES, repeat=2))

    def probabilities(key_dtype: KVDtype, value_dtype: KVDtype) -> torch.Tensor:
        prefix = client.get("precision/llama", key_dtype=key_dtype, value_dtype=value_dtype)
        with torch.inference_mode():
            logits = [model(ids, past_key_values=prefix.to_cache(model)).logits[0] for ids in texts]
        return torch.cat(logits).softmax(-1)

    exact = probabilities("float32", "float32")
    values = 3 * 2 * 20 * 8
    for cost in found:
        sent = probabilities(cost.key_dtype, cost.value_dtype)
        assert cost.divergence == pytest.approx(
            float((exact * (exact / sent).log()).sum(-1).mean()), rel=1e-6, abs=1e-15
        )
        assert (cost.changed, cost.tokens) == (int((exact.argmax(-1) != sent.argmax(-1)).sum()), 75)
        sizes = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1}
        halves = (cost.key_dtype, cost.value_dtype)
        assert cost.nbytes == sum(sizes[half] * values + 4 * 3 * 2 * (sizes[half] == 1) for half in halves)
    by_pair = {(cost.key_dtype, cost.value_dtype): cost.divergence for cost in found}
    assert by_pair["float32", "float32"] == 0
    assert (
        0 < by_pair["float16", "float16"] < by_pair["bfloat16", "bfloat16"] < by_pair["float8_e4m3fn", "float8_e4m3fn"]
    )
    assert len(set(by_pair.values())) == len(PAIRS), "keys and values are told apart"


def test_equal_numbers_are_measured_once(client: PrefixClient) -> None:
    """What was stored in bfloat16 is exact in float32: its pairs with other dtypes share their measures."""
    client.publish("precision/bf16", CORPUS / "cases" / "llama-n20-emb-stored_bf16-on_fp32" / "adapter")
    dtypes: tuple[KVDtype, ...] = ("float32", "bfloat16", "float8_e4m3fn")
    prefixes = {dtype: client.get("precision/bf16", dtype=dtype) for dtype in dtypes}
    model, calls = base("llama"), []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    pairs = [DtypePair(*pair) for pair in product(dtypes, repeat=2)]
    found = list(pair_costs(prefixes, model, [torch.tensor([[4, 5, 6]])], pairs))
    hook.remove()
    assert len(calls) == 1 + 4, "float32, and each of keys and values exact or in float8"
    assert [cost.divergence == 0 for cost in found] == [True, True, False] * 2 + [False] * 3


def test_a_prefix_of_another_model_is_refused(client: PrefixClient) -> None:
    """The error is that of `to_cache`."""
    client.publish("precision/gpt2", GPT2)
    prefixes: dict[KVDtype, Prefix] = {"float32": client.get("precision/gpt2")}
    costs = pair_costs(prefixes, base("llama"), [torch.ones(1, 2, dtype=torch.int64)], [DtypePair.both("float32")])
    with pytest.raises(DimensionMismatch):
        next(costs)
