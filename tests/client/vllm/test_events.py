"""vLLM's KV events name the adapter of the blocks that they are about."""

from types import SimpleNamespace
from typing import Any

import pytest

from prefix_service.client.vllm.events import name_adapters
from prefix_service.client.vllm.salt import shown_salt

_SALT = "ab" * 32


class _Pool:
    """A pool of blocks that makes events as vLLM's does."""

    def __init__(self, *, enable_kv_cache_events: bool = True) -> None:
        self.enable_kv_cache_events = enable_kv_cache_events
        self.kv_event_queue: list[Any] = []

    def cache_full_blocks(self, request: Any, blocks: int) -> int:
        """Reports two events of a request, and one that has no names."""
        keys: list[Any] = [(request.cache_salt,), None, (("mm", 3), request.cache_salt)]
        self.kv_event_queue.append(SimpleNamespace(lora_name=request.lora, extra_keys=keys))
        self.kv_event_queue.append(SimpleNamespace(lora_name=request.lora, extra_keys=None))
        self.kv_event_queue.append(SimpleNamespace(block_hashes=[1]))
        return blocks

    def emit_cached_block_events(self, request: Any) -> None:
        """Reports an event."""
        self.kv_event_queue.append(SimpleNamespace(lora_name=request.lora))

    def take_events(self) -> list[Any]:
        """Returns the names in the events; None for one that has no name, `-` for one that cannot."""
        events, self.kv_event_queue = self.kv_event_queue, []
        return [getattr(event, "lora_name", "-") for event in events]


def _request(name: str, lora: str | None = None) -> Any:
    return SimpleNamespace(request_id=name, lora=lora, cache_salt=_SALT)


def test_events_have_the_name_where_vllm_puts_that_of_a_lora() -> None:
    """Events of a plain request have no name, and those of a LoRA keep its name."""
    pool = _Pool()
    name_adapters(pool, lambda request_id: "acme/a" if request_id in ("r", "both") else None)
    assert pool.cache_full_blocks(_request("r"), 3) == 3
    assert pool.take_events() == ["acme/a", "acme/a", "-"]
    pool.cache_full_blocks(request=_request("r"), blocks=1)
    pool.cache_full_blocks(_request("plain"), 1)
    pool.emit_cached_block_events(_request("r"))
    pool.emit_cached_block_events(_request("both", "org/lora"))
    assert pool.take_events() == ["acme/a", "acme/a", "-", None, None, "-", "acme/a", "org/lora"]


def test_events_have_a_hash_in_place_of_an_adapters_salt() -> None:
    """A subscriber cannot send the salt of an adapter's blocks with a plain prompt, since no event has it; the salt of
    a plain request is vLLM's.
    """
    pool = _Pool()
    name_adapters(pool, lambda request_id: "acme/a" if request_id == "r" else None)
    pool.cache_full_blocks(_request("r"), 3)
    pool.cache_full_blocks(_request("plain"), 3)
    first, second, _, plain, *_ = pool.kv_event_queue
    hashed = shown_salt(_SALT)
    assert first.extra_keys == [(hashed,), None, (("mm", 3), hashed)]
    assert second.extra_keys is None
    assert plain.extra_keys[0] == (_SALT,)
    assert hashed not in {_SALT, shown_salt("cd" * 32)}


@pytest.mark.parametrize("enabled", [True, False])
def test_without_events_nothing_is_in_the_way(*, enabled: bool) -> None:
    """A pool's methods are its own if vLLM publishes no events."""
    pool = _Pool(enable_kv_cache_events=enabled)
    name_adapters(pool, lambda request_id: None)
    assert ("cache_full_blocks" in vars(pool)) == enabled
