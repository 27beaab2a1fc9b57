"""Measures what a model's predictions lose if keys and values are sent in fewer bytes, for each pair of dtypes."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Final, get_args

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from prefix_service.client.prefixes.prefix import Prefix
from prefix_service.prefix.variant import DtypePair, KVDtype
from prefix_service.prefix.wire.metadata import read_metadata
from prefix_service.prefix.wire.prefix_file import PrefixFile

DTYPES: Final[tuple[KVDtype, ...]] = get_args(KVDtype)
PAIRS: Final = tuple(DtypePair(*pair) for pair in product(DTYPES, repeat=2))
_BLOCK: Final = 64  # tokens whose distributions are compared at a time, in float64


@dataclass(frozen=True, slots=True)
class PairCost:
    """The cost of keys and values in two dtypes, of `nbytes` with their scales.

    `divergence` is that of Kullback and Leibler, of the distribution of the next token from that behind the prefix in
    float32: the mean of all `tokens`, in nats; infinite if numbers beyond the dtype's range leave no distribution.
    `changed` are the tokens behind which another token becomes the most probable one.
    """

    key_dtype: KVDtype
    value_dtype: KVDtype
    nbytes: int
    divergence: float
    changed: int
    tokens: int


@torch.inference_mode()
def pair_costs(
    prefixes: Mapping[KVDtype, Prefix], model: Any, texts: Sequence[Tensor], pairs: Sequence[DtypePair] = PAIRS
) -> Iterator[PairCost]:
    """Yields the cost of each pair, for the tokens of `texts` behind a prefix.

    `prefixes` is one version, fetched in float32 and in each dtype of `pairs`. `texts` are int64 `[1, S]` each, on the
    device of `model`, a causal language model.

    Raises:
        DimensionMismatch: the prefix does not fit the model.
    """
    exact = [_logits(model, prefixes["float32"], ids) for ids in texts]
    tokens = sum(ids.shape[1] for ids in texts)
    known: dict[tuple[KVDtype, KVDtype], tuple[float, int]] = {}
    for pair in pairs:
        same = _first_equal(prefixes, pair.key, 0), _first_equal(prefixes, pair.value, 1)
        if same not in known:
            prefix = _joined(prefixes[pair.key], prefixes[pair.value])
            known[same] = _difference(exact, (_logits(model, prefix, ids) for ids in texts))
        divergence, changed = known[same]
        yield PairCost(*pair, _nbytes(prefixes["float32"], pair), divergence / tokens, changed, tokens)


def _first_equal(prefixes: Mapping[KVDtype, Prefix], dtype: KVDtype, part: int) -> KVDtype:
    """Returns the first dtype in which keys (part 0) or values (1) have the same numbers: what was stored in bfloat16
    is exact in float32 too, and need not be measured twice.
    """
    own = prefixes[dtype].kv.tensor[:, part].float()
    return next(name for name, one in prefixes.items() if torch.equal(one.kv.tensor[:, part].float(), own))


def _difference(exact: Iterable[Tensor], found: Iterable[Tensor]) -> tuple[float, int]:
    """Returns the sum of divergences, and the tokens behind which another one is the most probable, of logits `[S,
    vocabulary]` for each text.
    """
    total, changed = 0.0, 0
    for before, after in zip(exact, found, strict=True):
        for one, other in zip(torch.split(before, _BLOCK), torch.split(after, _BLOCK), strict=True):
            changed += int((one.argmax(-1) != other.argmax(-1)).sum())
            wanted, sent = (logits.double().log_softmax(-1) for logits in (one, other))
            total += float(kl_div(sent, wanted, reduction="sum", log_target=True))
    return math.inf if math.isnan(total) else total, changed


def _joined(keys: Prefix, values: Prefix) -> Prefix:
    """Returns the keys of one prefix with the values of another, as they arrive if they were sent in two dtypes."""
    both = torch.stack((keys.kv.tensor[:, 0].float(), values.kv.tensor[:, 1].float()), 1)
    return replace(keys, kv=replace(keys.kv, tensor=both))


def _logits(model: Any, prefix: Prefix, ids: Tensor) -> Tensor:
    """Returns the logits behind each token of a text, `[S, vocabulary]`."""
    mask = prefix.extend_mask(torch.ones_like(ids))
    logits: Tensor = model(input_ids=ids, attention_mask=mask, past_key_values=prefix.to_cache(model)).logits[0]
    return logits


def _nbytes(prefix: Prefix, pair: DtypePair) -> int:
    """Returns the bytes in which keys and values are sent in two dtypes."""
    identity, variant = read_metadata(prefix.metadata)
    return PrefixFile(identity, replace(variant, dtypes=pair, layout="layers"), {}).rendering_nbytes
