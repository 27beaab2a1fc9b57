"""The measures of README.md, on one model of the corpus."""

from prefix_service.client import PrefixClient
from tests.benchmarks.precision.measure import corpus_case, predictions, publish, rounded
from tests.conftest import Server


def test_fewer_bytes_have_larger_errors(server: Server) -> None:
    """Errors of values and predictions grow from float16 over bfloat16 to float8, and are neither none nor total."""
    with PrefixClient(server.url, server.admin_key) as client:
        publish(client)
        found = list(rounded(client, "llama-n20-emb"))
        costs = predictions(client, corpus_case("llama-n20-emb"))
    for part in ("keys", "values"):
        half, brain, float8 = (getattr(one, part).mean_relative for one in found)
        assert 0 < half < 0.0005 < brain < 0.004 < 0.01 < float8 < 0.04
    by_pair = {(cost.key_dtype, cost.value_dtype): cost for cost in costs}
    whole, brain, least = (by_pair[dtype, dtype] for dtype in ("float32", "bfloat16", "float8_e4m3fn"))
    assert [costs[0], costs[-1]] == [whole, least]
    assert brain.nbytes * 2 == whole.nbytes
    assert 0.5 < least.nbytes / brain.nbytes < 0.55
    assert 0 == whole.divergence < brain.divergence < least.divergence < 0.1
    assert whole.changed == 0
