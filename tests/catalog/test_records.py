"""`catalog.records`: what a version takes in memory is what caches count for it."""

import json
import tracemalloc
from datetime import UTC, datetime

import pytest

from prefix_service.catalog.records import Version

CONFIG = {
    "peft_type": "PREFIX_TUNING",
    "task_type": "CAUSAL_LM",
    "num_virtual_tokens": 20,
    "num_transformer_submodules": 1,
    "num_layers": 32,
    "num_attention_heads": 8,
    "token_dim": 1024,
}


@pytest.mark.parametrize("length", [20, 300_000])
def test_a_version_takes_the_memory_that_is_counted_for_it(length: int) -> None:
    """The estimate is no less than what a version holds, also for a long base model, nor far above it."""

    def version(number: int) -> Version:
        base_model = f"{number:0{length}}"
        manifest = json.dumps({"config": {**CONFIG, "base_model_name_or_path": base_model}})
        digest = f"sha256:{number:064}"
        made = Version(
            digest, manifest, base_model, digest, 10, "bfloat16", digest, 20, "acme", "a", number, datetime.now(UTC)
        )
        assert made.prefix_config.num_layers == 32
        return made

    version(0)
    tracemalloc.start()
    try:
        kept = [version(number) for number in range(1, 21)]
        real = tracemalloc.get_traced_memory()[0] / len(kept)
    finally:
        tracemalloc.stop()
    assert real <= kept[0].memory <= real + 4096 + 0.2 * real
