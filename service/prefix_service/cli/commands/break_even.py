"""`bench --break-even`: from which length on fetching a prefix is faster than the model's own prefill."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from prefix_service.cli.console import print_json, print_table, say, working
from prefix_service.cli.models import load_model, loaded, quiet_transformers
from prefix_service.cli.options import BaseModelName, Device, address, connect
from prefix_service.errors import InvalidRequest

if TYPE_CHECKING:
    from prefix_service.client import Prefix, PrefixClient

_SHORTEST: Final = 16
_BEYOND: Final = 2  # lengths that are measured after fetching has become faster
_REPEATS: Final = 5
_LONG: Final = 0.5  # seconds of repeats after which no other one begins
_BAR: Final = 46  # columns
_ITEM_BYTES: Final = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1}


@dataclass(frozen=True, slots=True)
class BreakEvenOptions:
    """The options of `bench --break-even`."""

    break_even: Annotated[
        bool,
        typer.Option(
            "--break-even",
            help="Instead: from which length on is fetching a prefix faster than reading its tokens? Needs --model.",
        ),
    ] = False
    model: BaseModelName = None
    device: Device = "cpu"
    most: Annotated[
        int, typer.Option("--most", min=16, max=1 << 20, metavar="TOKENS", help="The longest length with --break-even.")
    ] = 2048


@dataclass(frozen=True, slots=True)
class Length:
    """The seconds until the model has the keys and values of so many tokens: by reading them; by fetching a prefix of
    them; by taking one from the client's cache in memory."""

    tokens: int
    prefill_seconds: float
    fetch_seconds: float
    cached_seconds: float


@dataclass(frozen=True, slots=True)
class FetchTime:
    """The seconds of a fetch: some for each, and some for each byte."""

    each: float
    byte: float

    @classmethod
    def of(cls, small: tuple[int, float], whole: tuple[int, float]) -> "FetchTime":
        """Returns the line through the bytes and seconds of two fetches; through one alone if they are of one size."""
        more = whole[0] - small[0]
        byte = max(0.0, (whole[1] - small[1]) / more) if more else 0.0
        return cls(max(0.0, whole[1] - byte * whole[0]), byte)

    def seconds(self, nbytes: int) -> float:
        """Returns the seconds of a fetch of so many bytes."""
        return self.each + self.byte * nbytes


def show_break_even(
    reference: str, dtype: Any, model: str, device: str, most: int, url: str, api_key: str | None, *, as_json: bool
) -> None:
    """Measures both ways with one adapter and its model, and prints a table and a plot, or JSON.

    Raises:
        InvalidRequest: the model cannot be loaded, or takes no prefix where text stands.
        DimensionMismatch: the prefix does not fit the model.
    """
    with quiet_transformers(), connect(url, api_key, shows_progress=True, cache_bytes=0) as client:
        with working(f"fetching {reference}"):
            prefix = client.get(reference, dtype=dtype)
        with working(f"loading {model}"):
            base = loaded(model, lambda: load_model(model, None, device))
        with working(f"measuring {reference} on {model}"):
            lengths = measure(client, prefix, dtype, base, most)
    fetch, cached = (break_even(lengths, seconds) for seconds in (_fetch, _cached))
    if as_json:
        found = {"version": prefix.version, "url": address(url), "fetch_from": fetch, "cached_from": cached}
        print_json({**found, "measured_tokens": prefix.num_virtual_tokens, "lengths": list(map(asdict, lengths))})
        return
    columns = ["tokens", "prefill", "fetch", "from the client's cache", "fetch : prefill"]
    title = f"{prefix.name} on {model}, {device}; a fetch of {prefix.num_virtual_tokens} tokens is measured"
    print_table(title, columns, [_row(length) for length in lengths])
    say()
    for line in plot(lengths):
        say(line)
    say()
    say(f"Fetching is faster than the model's prefill {_from(fetch, lengths)};")
    say(f"a prefix in the client's cache {_from(cached, lengths)}.")


def measure(client: "PrefixClient", prefix: "Prefix", dtype: Any, model: Any, most: int) -> list[Length]:
    """Returns what both ways take for 16, 32, 64, … tokens and for as many as the prefix has, up to `most`.

    The prefix and a single layer of it are fetched; the fetch of another length is the line through both. Lengths far
    behind the break-even are left out. A client without a cache fetches each time.
    """
    import torch

    from prefix_service.client.transformers.caches import to_cache
    from prefix_service.client.transformers.compiling import check_compiles, require_positions
    from prefix_service.client.transformers.devices import decoder_of

    own = prefix.num_virtual_tokens
    check_compiles(model.config)
    require_positions(model.config, min(own, _SHORTEST))
    prefix.to_cache(model)
    whole = travelling(prefix)
    part = whole // len(prefix.past_key_values)
    fetch = FetchTime.of(
        (part, _seconds(lambda: client.get(prefix.reference, dtype=dtype, layers=(0, 1)))),
        (whole, _seconds(lambda: client.get(prefix.reference, dtype=dtype))),
    )
    decoder = decoder_of(model)
    words = model.get_input_embeddings().weight
    lengths: list[Length] = []
    for tokens in sorted({own, *(_SHORTEST << step for step in range(most.bit_length()))}):
        try:
            require_positions(model.config, tokens)
        except InvalidRequest:
            break
        won = sum(length.prefill_seconds > length.fetch_seconds for length in lengths)
        if tokens > max(most, own) or (tokens > own and won > _BEYOND):
            break
        ids = torch.arange(tokens, device=words.device)[None] % words.shape[0]
        # Other values than a prefix of this length has, in the same time.
        longer = [(_repeated(key, tokens), _repeated(value, tokens)) for key, value in prefix.past_key_values]

        def read(ids: Any = ids) -> None:
            with torch.inference_mode():
                decoder(input_ids=ids, use_cache=True)
            _wait_for(ids.device)

        def place(longer: Any = longer, device: Any = words.device) -> None:
            to_cache(longer, model)
            _wait_for(device)

        placing = _seconds(place)
        fetching = fetch.seconds(whole * tokens // own) + placing
        lengths.append(Length(tokens, _seconds(read), fetching, placing))
    return lengths


def travelling(prefix: "Prefix") -> int:
    """Returns the bytes of keys and values that travel."""
    return prefix.kv.tensor.numel() * _ITEM_BYTES[prefix.metadata["dtype"]]


def break_even(lengths: Sequence[Length], seconds: Callable[[Length], float]) -> int | None:
    """Returns the length from which on the other way is faster than the prefill, on a line between the two lengths
    around it; the shortest if it always is, None if it is not at the longest."""
    gains = [length.prefill_seconds - seconds(length) for length in lengths]
    if not gains or gains[-1] <= 0:
        return None
    last = max((place for place, gain in enumerate(gains) if gain <= 0), default=None)
    if last is None:
        return lengths[0].tokens
    (before, after), (lost, won) = lengths[last : last + 2], gains[last : last + 2]
    return math.ceil(before.tokens + (after.tokens - before.tokens) * -lost / (won - lost))


def plot(lengths: Sequence[Length]) -> list[str]:
    """Returns the lines of a plot of all lengths, at most 80 columns wide; bars are logarithms of times."""
    ways = [("prefill", _prefill, "█"), ("fetch", _fetch, "▒"), ("cache", _cached, "░")]
    times = [seconds(length) for length in lengths for _, seconds, _ in ways]
    least, most = math.log(min(times)), math.log(max(times))
    lines = []
    for length in lengths:
        for number, (name, seconds, mark) in enumerate(ways):
            share = (math.log(seconds(length)) - least) / (most - least or 1.0)
            bar = mark * (1 + round((_BAR - 1) * share))
            lines.append(f"{'' if number else length.tokens:>7} {name:<8}{bar} {_shown(seconds(length))}")
    return lines


def _prefill(length: Length) -> float:
    return length.prefill_seconds


def _fetch(length: Length) -> float:
    return length.fetch_seconds


def _cached(length: Length) -> float:
    return length.cached_seconds


def _from(tokens: int | None, lengths: Sequence[Length]) -> str:
    longest = lengths[-1].tokens
    if tokens is None:
        return f"at none of these lengths, up to {longest} tokens"
    return f"from {tokens} tokens on" if tokens == lengths[0].tokens else f"from about {tokens} tokens on"


def _row(length: Length) -> list[object]:
    times = (length.prefill_seconds, length.fetch_seconds, length.cached_seconds)
    return [length.tokens, *map(_shown, times), f"{length.fetch_seconds / length.prefill_seconds:.2f}"]


def _shown(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.2f} ms"


def _seconds(call: Callable[[], Any]) -> float:
    """Returns the median time of a call, after one that does not count."""
    began = time.perf_counter()
    call()
    times = [time.perf_counter() - began]
    while len(times) <= _REPEATS and (len(times) == 1 or sum(times) < _LONG):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def _repeated(tensor: Any, tokens: int) -> Any:
    """Returns keys or values of so many tokens, `[B, H, tokens, D]`, made of a shorter or longer prefix's."""
    import torch

    places = torch.arange(tokens, device=tensor.device) % tensor.shape[2]
    return tensor[:, :, places]


def _wait_for(device: Any) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
