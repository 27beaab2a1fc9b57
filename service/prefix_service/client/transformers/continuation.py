"""Checks that a model continues from the prefix that it was given."""

from typing import Any

from torch import Tensor
from transformers import Cache, LogitsProcessor

from prefix_service.errors import InvalidRequest


class ContinuationCheck(LogitsProcessor):
    """Raises InvalidRequest after the first forward pass that did not extend the cache, before a token is chosen.

    Some models drop the cache: Phi-3 computes a long input again without it, and BLIP-2's `generate` runs an inner
    model. A cache that the forward pass received has grown by the tokens that `generate` knows. A logits processor can
    see that: it belongs to one call, so that threads can share the model, and it runs outside of compiled code.
    """

    def __init__(self, model: Any, cache: Cache) -> None:
        self._model, self._cache = model, cache
        self._start = int(cache.get_seq_length())

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Checks the cache, and returns the scores unchanged.

        Raises:
            InvalidRequest: the cache has not grown.
        """
        self.require(input_ids.shape[1])
        return scores

    def require(self, tokens: int = 1) -> None:
        """Raises InvalidRequest unless the cache has grown by `tokens`, and at least by one."""
        if int(self._cache.get_seq_length()) - self._start >= max(tokens, 1):
            return
        limit = getattr(self._model.config, "original_max_position_embeddings", None)
        long = f" (it drops a shorter prefix where the input is longer than {limit} tokens)" if limit else ""
        raise InvalidRequest(f"{type(self._model).__name__}.generate did not continue from the prefix{long}")
