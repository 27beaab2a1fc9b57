"""Compares each row of an architecture with that row alone and with PEFT, padded on the left and on the right."""

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from peft import PeftModel
from torch import Tensor

from prefix_service.client import Prefix
from prefix_service.errors import PrefixServiceError
from tests.sweep.batch import TEXTS, Batch, padded
from tests.sweep.images import with_images
from tests.sweep.models import build, save_adapter
from tests.sweep.names import WITH_IMAGE, Architecture
from tests.sweep.trial import WORDS, Client, Peft, base_logits

TOLERANCE: Final = 1e-5
"""The tolerated difference, over the largest logit. All is float32, with an epsilon of 1.2e-7: padding and caches
change the order of sums over at most some hundred products in 4 layers, which costs tens of epsilons (1e-6 at most,
measured). A wrong position, mask or layer costs 1e-3 and more."""
SIDES: Final = ("alone", "left", "right")
CALLS: Final = ("forward", "generate")
EQUAL: Final = "equal"
NOT_BUILT: Final = "not built"
PEFT_FAILS: Final = "PEFT fails"

Fetch = Callable[[Path, str], Prefix]
"""Publishes the adapter of a folder under a name, and returns its prefix as a worker gets it."""


@dataclass
class Verdict:
    """The findings on one architecture."""

    architecture: Architecture
    outcome: str = EQUAL
    """`equal`, what is not (`forward left as PEFT, generate right refused`), or why nothing was compared.

    `as PEFT`: not the row alone, but what PEFT answers to the same batch. `refused`: the client raises an error.
    """
    reason: str = ""
    rows: dict[str, float] = field(default_factory=dict)
    """The largest difference from the row alone by side, over the largest logit; nan without logits."""
    peft: dict[str, float] = field(default_factory=dict)
    """The largest difference from PEFT's row alone by side, over the largest logit."""
    base: dict[str, float] = field(default_factory=dict)
    """The largest difference from the row alone without a prefix by side, over the largest logit."""
    tokens: dict[str, bool] = field(default_factory=dict)
    """Whether the greedy tokens are PEFT's, by side."""
    as_peft: dict[str, bool] = field(default_factory=dict)
    """Whether `forward` and `generate` answer a left-padded batch as PEFT does."""
    errors: dict[str, str] = field(default_factory=dict)
    peft_agrees: bool = True
    """Whether PEFT's `generate` and PEFT's forward find the same tokens."""

    @property
    def largest(self) -> float:
        """Returns the largest difference from rows alone and from PEFT."""
        return max([*self.rows.values(), *self.peft.values()], default=float("nan"))


@torch.no_grad()
def try_out(architecture: Architecture, fetch: Fetch, folder: Path) -> Verdict:
    """Compares one architecture with PEFT; never raises what the architecture raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tiny configs, and of PEFT's calls
        try:
            model = build(architecture)
            texts = [Batch.of_row(text) for text in TEXTS]
            rows = with_images(model) if architecture.variant == WITH_IMAGE else texts
        except Exception as error:  # noqa: BLE001 - whatever an architecture does is its verdict
            return Verdict(architecture, NOT_BUILT, _message(error))
        try:
            save_adapter(architecture, copy.deepcopy(model), folder)
            peft = Peft(PeftModel.from_pretrained(copy.deepcopy(model), folder).eval())
            oracle = _Oracle.of(peft, rows)
        except Exception as error:  # noqa: BLE001
            return Verdict(architecture, PEFT_FAILS, _message(error))
        try:
            client = Client(model, fetch(folder, architecture.name))
        except PrefixServiceError as error:
            return Verdict(architecture, "refused", _message(error))
        return _Comparison(Verdict(architecture, peft_agrees=oracle.agrees), client, oracle, rows).made()


@dataclass(frozen=True)
class _Oracle:
    """PEFT's answers to each row alone."""

    logits: list[Tensor]
    tokens: Tensor
    trained: Tensor
    """The tokens as PEFT's forward finds them, which may differ from those of PEFT's `generate`."""
    padded_logits: list[Tensor]
    """The logits of the rows padded on the left: some models count padding, with PEFT too."""
    padded_tokens: Tensor

    @classmethod
    def of(cls, peft: Peft, rows: Sequence[Batch]) -> "_Oracle":
        batch = padded(rows, "left")
        return cls(
            [_real(peft.model, peft.logits(row), row)[0] for row in rows],
            torch.cat([peft.tokens(row) for row in rows]),
            torch.cat([peft.tokens_by_forward(row) for row in rows]),
            _real(peft.model, peft.logits(batch), batch),
            peft.tokens(batch),
        )

    @property
    def agrees(self) -> bool:
        """Returns whether PEFT finds the same tokens by `generate` and by forward."""
        return torch.equal(self.tokens, self.trained)


@dataclass(frozen=True)
class _Comparison:
    verdict: Verdict
    client: Client
    oracle: _Oracle
    rows: Sequence[Batch]

    def made(self) -> Verdict:
        """Compares everything, and returns the verdict."""
        verdict, model = self.verdict, self.client.model
        base = [_real(model, base_logits(model, row), row)[0] for row in self.rows]
        if _difference(base, self.oracle.logits) < 1e-3:
            verdict.outcome = "the prefix does not matter"
            return verdict
        alone: list[Tensor] = []
        for side in SIDES:
            batches = self.rows if side == "alone" else [padded(self.rows, side)]
            found = self._tried(f"forward {side}", self.client.logits, batches)
            alone = alone or found
            verdict.rows[side] = _difference(found, alone)
            verdict.peft[side] = _difference(found, self.oracle.logits)
            verdict.base[side] = _difference(
                self._tried(f"base {side}", lambda b: base_logits(model, b), batches), base
            )
            tokens = self._tried(f"generate {side}", self.client.tokens, batches, real=False)
            verdict.tokens[side] = _same(tokens, self.oracle.tokens) or _same(tokens, self.oracle.trained)
            if side == "left":
                verdict.as_peft = {
                    "forward": _difference(found, self.oracle.padded_logits) < TOLERANCE,
                    "generate": _same(tokens, self.oracle.padded_tokens),
                }
        verdict.outcome = ", ".join(self._faults()) or EQUAL
        return verdict

    def _tried(
        self, name: str, answer: Callable[[Batch], Tensor], batches: Sequence[Batch], real: bool = True
    ) -> list[Tensor]:
        """Returns the answers for each row, or none if the client or the model raises."""
        try:
            answers = [(answer(batch), batch) for batch in batches]
        except Exception as error:  # noqa: BLE001 - as above
            self.verdict.errors[name] = _message(error)
            return []
        return [row for each, batch in answers for row in (_real(self.client.model, each, batch) if real else each)]

    def _faults(self) -> list[str]:
        """Returns the checks that fail, each with how."""
        verdict = self.verdict
        wrong = [
            *(f"forward {side}" for side in SIDES if not max(verdict.rows[side], verdict.peft[side]) < TOLERANCE),
            *(f"generate {side}" for side in SIDES if not verdict.tokens[side]),
        ]
        refused = [call for call in CALLS if all(self._manner(f"{call} {side}") == " refused" for side in SIDES)]
        single = [f"{name}{self._manner(name)}" for name in wrong if name.split()[0] not in refused]
        return [*single, *(f"{call} refused" for call in refused)]

    def _manner(self, name: str) -> str:
        """Returns how a check fails: by a refusal of the client, or as PEFT does with such rows too."""
        if self.verdict.errors.get(name, "").startswith("refused"):
            return " refused"
        call, side = name.split()
        return " as PEFT" if side == "left" and self.verdict.as_peft[call] else ""


def _same(tokens: Sequence[Tensor], wanted: Tensor) -> bool:
    return bool(tokens) and torch.equal(torch.stack(list(tokens)), wanted)


def _real(model: Any, logits: Tensor, batch: Batch) -> list[Tensor]:
    """Returns for each row the logits of its real tokens, or of its decoder's, and of words alone: some models give an
    image's tokens the least number there is.
    """
    logits = logits[..., :WORDS]
    if model.config.is_encoder_decoder:
        return list(logits)
    return [row[-len(mask) :][mask == 1] for row, mask in zip(logits, batch.mask, strict=True)]


def _difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Returns the largest difference of logits over the largest logit, or nan without logits."""
    if not found or not wanted:
        return float("nan")
    scale = max(float(each.abs().max()) for each in wanted)
    differences = [(have - want).abs().max() for have, want in zip(found, wanted, strict=True)]
    return float(torch.stack(differences).max()) / scale


def _message(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"refused: {text:.300}" if isinstance(error, PrefixServiceError) else f"{type(error).__name__}: {text:.300}"
