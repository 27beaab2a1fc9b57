"""`inspect --precision`: what a version's keys and values in fewer bytes cost a model's predictions of a text."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from prefix_service.cli.console import print_json, print_table, say, working
from prefix_service.cli.models import Dtype, auto_class, load_model, loaded, quiet_transformers
from prefix_service.cli.options import BaseModelName, Device, connect
from prefix_service.errors import InvalidRequest
from prefix_service.prefix.references import parse_qualified
from prefix_service.system.sizes import human_bytes

if TYPE_CHECKING:
    from prefix_service.client import PrefixClient
    from prefix_service.client.prefixes.precision import PairCost

_BAR: Final = 32  # columns
_LEAST: Final = 1e-9  # nats of the shortest bar: what lies below is the rounding of float32
_SHORT: Final = {"float32": "float32", "float16": "float16", "bfloat16": "bfloat16", "float8_e4m3fn": "float8"}


@dataclass(frozen=True, slots=True)
class PrecisionOptions:
    """The options of `inspect --precision`."""

    precision: Annotated[
        bool,
        typer.Option(
            "--precision",
            help="Instead: what does each pair of dtypes cost a model's predictions? Needs --model and --text.",
        ),
    ] = False
    model: BaseModelName = None
    text: Annotated[
        Path | None,
        typer.Option(
            "--text", metavar="FILE", help="What the model reads behind the prefix, UTF-8.", exists=True, dir_okay=False
        ),
    ] = None
    most: Annotated[
        int, typer.Option("--most", min=1, metavar="TOKENS", help="How much of the text is read with --precision.")
    ] = 512
    device: Device = "cpu"

    def model_and_text(self) -> tuple[str, Path] | None:
        """Returns the model and the text; None without `--precision`.

        Raises:
            typer.BadParameter: one of the three options was given without the others.
        """
        if not self.precision and self.model is None and self.text is None:
            return None
        if not self.precision or self.model is None or self.text is None:
            raise typer.BadParameter("--precision needs --model MODEL and --text FILE, and these are for --precision")
        return self.model, self.text


def show_precision(
    reference: str, model: str, text: Path, most: int, device: str, url: str, api_key: str | None, *, as_json: bool
) -> None:
    """Measures each pair of dtypes with one version, its model and a text, and prints a table and a plot, or JSON.

    Raises:
        InvalidRequest: the model cannot be loaded, the text is empty or not UTF-8, or the model has no positions for
            prefix and text.
        DimensionMismatch: the prefix does not fit the model.
    """
    with quiet_transformers(), connect(url, api_key, shows_progress=True) as client:
        with working(f"loading {model}"):
            base = loaded(model, lambda: load_model(model, Dtype.float32, device))
            tokenizer = loaded(model, lambda: auto_class("AutoTokenizer").from_pretrained(model))
        with working(f"measuring {reference} on {model}"):
            name, costs = _measured(client, reference, base, _ids(tokenizer, text, most).to(base.device))
    costs.sort(key=lambda cost: (-cost.nbytes, cost.divergence))
    if as_json:
        pairs = [asdict(cost) | {"divergence": _finite(cost.divergence)} for cost in costs]
        print_json({"version": name, "model": model, "tokens": costs[0].tokens, "pairs": pairs})
        return
    print_table(
        f"{name} on {model}: {costs[0].tokens} tokens of {text}",
        ["keys", "values", "size", "divergence", "tokens changed"],
        [[*_pair(cost), human_bytes(cost.nbytes), f"{cost.divergence:.1e}", cost.changed] for cost in costs],
    )
    say("Divergence: Kullback-Leibler, of the next token from float32's, nats per token.")
    say("Marked with *: no other pair has fewer bytes without a larger divergence.")
    say()
    for line in plot(costs):
        say(line)


def _ids(tokenizer: Any, text: Path, most: int) -> Any:
    """Returns the first tokens of a text, int64 `[1, S]`."""
    import torch

    try:
        words = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the text {text} cannot be read: {error}") from error
    if not words.strip():
        raise InvalidRequest(f"the text {text} is empty")
    return torch.tensor([tokenizer(words)["input_ids"][:most]], dtype=torch.int64)


def _measured(client: "PrefixClient", reference: str, model: Any, ids: Any) -> "tuple[str, list[PairCost]]":
    """Returns the name of the version, and what each pair of dtypes costs."""
    from prefix_service.client.prefixes.precision import DTYPES, pair_costs
    from prefix_service.client.transformers.compiling import require_positions

    exact = client.get(reference, dtype="float32")
    require_positions(model.config, exact.num_virtual_tokens + ids.shape[1])
    tenant, parsed = parse_qualified(reference)
    same = f"{tenant}/{parsed.adapter}@{exact.digest}"  # an alias may move meanwhile
    prefixes = {dtype: client.get(same, dtype=dtype).to(model.device) for dtype in DTYPES}
    return exact.name, list(pair_costs(prefixes, model, [ids]))


def _finite(number: float) -> float | None:
    """Returns a number that JSON has; None if it is infinite."""
    return number if math.isfinite(number) else None


def plot(costs: "Sequence[PairCost]") -> list[str]:
    """Returns the lines of a plot of all pairs, at most 80 columns wide: bytes against divergences, whose logarithms
    the bars are.
    """
    divergences = [max(cost.divergence, _LEAST) for cost in costs]
    finite = [math.log(divergence) for divergence in divergences if math.isfinite(divergence)]
    least, most = min(finite, default=0.0), max(finite, default=0.0)
    lines = []
    for cost, divergence in zip(costs, divergences, strict=True):
        share = min((math.log(divergence) - least) / (most - least or 1.0), 1.0)
        bar = "█" * (1 + round((_BAR - 1) * share))
        keys, values = _pair(cost)
        mark = "*" if _is_best(cost, costs) else " "
        lines.append(f"{human_bytes(cost.nbytes):>10} {keys:<8} {values:<8} {mark} {bar} {cost.divergence:.1e}")
    return lines


def _is_best(cost: "PairCost", costs: "Sequence[PairCost]") -> bool:
    """Returns whether no other pair is as good in both bytes and divergence, and better in one of them."""
    own = cost.nbytes, cost.divergence
    others = [(other.nbytes, other.divergence) for other in costs]
    return not any(one != own and one[0] <= own[0] and one[1] <= own[1] for one in others)


def _pair(cost: "PairCost") -> tuple[str, str]:
    return _SHORT[cost.key_dtype], _SHORT[cost.value_dtype]
