"""The measures of README.md, on one model of the corpus."""

from prefix_service.client import PrefixClient
from tests.benchmarks.float8.measure import corpus_cases, measure
from tests.conftest import Server


def test_float8_has_half_the_bytes_and_a_larger_error_than_bfloat16(server: Server) -> None:
    """float8's errors of values and predictions exceed bfloat16's, and are neither none nor total."""
    case = next(case for case in corpus_cases() if case.name == "llama-n20-emb")
    with PrefixClient(server.url, server.admin_key) as client:
        half, float8 = measure(client, case)
    assert 0.5 < float8.nbytes / half.nbytes < 0.55
    for error, larger in ((half.keys, float8.keys), (half.values, float8.values)):
        assert 0.0005 < error.mean_relative < 0.004
        assert 0.01 < larger.mean_relative < 0.04
    assert 0 < half.mean_divergence < float8.mean_divergence < 0.1
    assert half.changed <= float8.changed < float8.inputs
