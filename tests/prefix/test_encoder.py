"""`prefix.encoder`, with PEFT's own encoders as the yardstick."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.cartridge import model as cartridge_model
from safetensors.torch import load_file, save
from torch import Tensor

from prefix_service.errors import InvalidCheckpoint, InvalidConfig
from prefix_service.prefix import checkpoint, encoder
from prefix_service.prefix.checkpoint import LocatedPrefix, header_nbytes, load_weights, locate_prefix, read_rows
from prefix_service.prefix.config import PrefixConfig, parse_config
from prefix_service.prefix.encoder import PrefixEncoder, assemble, encoding_nbytes
from prefix_service.prefix.kv import PrefixKV
from tests.conftest import CORPUS

TheirEncoder: Any = peft.PrefixEncoder
TheirCartridgeEncoder: Any = cartridge_model.CartridgeEncoder

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {"num_virtual_tokens": 5, "num_layers": 3, "num_attention_heads": 2, "token_dim": 8}
MLP: dict[str, Any] = {"prefix_projection": True, "encoder_hidden_size": 6}


def config(peft_type: str = "PREFIX_TUNING", **values: Any) -> PrefixConfig:
    return parse_config({"peft_type": peft_type, **SIZES, **values})


def encoder_of(theirs: Any, wanted: PrefixConfig, dtype: torch.dtype = torch.float32) -> PrefixEncoder:
    state = {name: tensor.to(dtype).contiguous() for name, tensor in theirs.state_dict().items()}
    return PrefixEncoder.from_weights(wanted, load_weights(bytearray(save(state)), wanted), CPU)


def their_flat(theirs: Any) -> Tensor:
    with torch.no_grad():
        flat: Tensor = theirs(torch.arange(5)[None])[0]
    return flat


@pytest.mark.parametrize("options", [{}, MLP], ids=["plain", "mlp"])
def test_prefix_tuning_is_pefts(options: dict[str, Any]) -> None:
    """The flat prefix of a training state: bit-equal without a projection, within 1e-5 with one."""
    theirs = TheirEncoder(peft.PrefixTuningConfig(**SIZES, **options))
    ours = encoder_of(theirs, config(**options)).flat()
    torch.testing.assert_close(ours, their_flat(theirs), rtol=0, atol=1e-5 if options else 0)


@pytest.mark.parametrize("frozen", [0, 1, 4])
def test_a_cartridge_is_pefts(frozen: int) -> None:
    """Frozen rows come first, then the trainable ones."""
    theirs = TheirCartridgeEncoder(peft.CartridgeConfig(**SIZES, num_frozen_tokens=frozen))
    ours = encoder_of(theirs, config("CARTRIDGE", num_frozen_tokens=frozen)).flat()
    assert torch.equal(ours, their_flat(theirs))


@pytest.mark.parametrize("path", sorted(CORPUS.glob("cases/*")), ids=lambda path: path.name)
def test_keys_and_values_are_pefts(path: Path) -> None:
    """What PEFT's `get_prompt` returned for a trained adapter: bit-equal from saved embeddings, 1e-5 from an MLP."""
    about = json.loads((path / "case.json").read_text())
    wanted = parse_config(json.loads((path / "adapter" / "adapter_config.json").read_text()), from_file=True)
    weights = load_weights(bytearray((path / "adapter" / "adapter_model.safetensors").read_bytes()), wanted)
    kv = PrefixEncoder.from_weights(wanted, weights, CPU).encode().to(dtype=getattr(torch, about["kv_dtype"]))
    expected = load_file(path / "expected.safetensors")
    for layer, pair in enumerate(kv.pairs(3)):
        for name, tensor in zip(("key", "value"), pair, strict=True):
            theirs = expected[f"b3.layers.{layer}.{name}"]
            torch.testing.assert_close(
                tensor, theirs, rtol=0, atol=1e-5 if path.name.endswith("proj-trainstate") else 0
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_mlp_runs_in_float32(dtype: torch.dtype) -> None:
    """Stored halves are upcast first: the result is that of PEFT's encoder holding the same rounded numbers."""
    theirs = TheirEncoder(peft.PrefixTuningConfig(**SIZES, **MLP)).to(dtype)
    flat = encoder_of(theirs, config(**MLP), dtype).flat()
    assert flat.dtype == torch.float32
    torch.testing.assert_close(flat, their_flat(theirs.float()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_needs_no_mlp_keeps_its_dtype(dtype: torch.dtype) -> None:
    """Halves are passed on as they are."""
    theirs = TheirEncoder(peft.PrefixTuningConfig(**SIZES)).to(dtype)
    assert torch.equal(encoder_of(theirs, config(), dtype).encode().stacked()[0, 0, 0, 0, 0], their_flat(theirs)[0, :4])


def test_an_mlp_that_overflows_is_refused() -> None:
    """Finite weights may have an infinite product; it is not served."""
    encoder = PrefixEncoder.fresh(config(**MLP), "random", 0, CPU)
    encoder.set_trainable_parameters({"transform.w2": torch.full((6, 48), 3e38)})
    with pytest.raises(InvalidCheckpoint, match="projection's result holds NaN or infinite"):
        encoder.encode()


@pytest.mark.parametrize("peft_type", ["PREFIX_TUNING", "CARTRIDGE"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_forward_gives_a_batch_of_one_memory(peft_type: str, batch_size: int) -> None:
    """`[B, L, 2, H, N, D]`, all rows equal and none of them a copy."""
    out = PrefixEncoder.fresh(config(peft_type), "random", 1, CPU).forward(batch_size)
    assert out.shape == (batch_size, 3, 2, 2, 5, 4)
    assert torch.equal(out[0], out[-1])
    assert out.untyped_storage().nbytes() == out[0].nbytes


@pytest.mark.parametrize(("peft_type", "options"), [("PREFIX_TUNING", {}), ("PREFIX_TUNING", MLP), ("CARTRIDGE", {})])
def test_a_seed_gives_the_same_weights(peft_type: str, options: dict[str, Any]) -> None:
    """The same seed the same, another seed others; the global generator is left alone."""
    before = torch.get_rng_state()
    first, again, other = (
        PrefixEncoder.fresh(config(peft_type, **options), "random", seed, CPU).flat() for seed in (7, 7, 8)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_fresh_weights_are_drawn_as_pefts() -> None:
    """A standard normal embedding; matrices and biases uniform within `1 / sqrt(inputs)`, as in nn.Linear."""
    sizes = {"num_virtual_tokens": 64, "token_dim": 64, "encoder_hidden_size": 100}
    drawn = PrefixEncoder.fresh(config(**{**MLP, **sizes}), "random", 0, CPU).trainable_parameters()
    assert drawn["embedding"].std().item() == pytest.approx(1, abs=0.05)
    for name, inputs in (("transform.w1", 64), ("transform.b1", 64), ("transform.w2", 100), ("transform.b2", 100)):
        assert drawn[name].abs().max().item() == pytest.approx(inputs**-0.5, rel=0.1)


@pytest.mark.parametrize(("peft_type", "options"), [("PREFIX_TUNING", {}), ("PREFIX_TUNING", MLP), ("CARTRIDGE", {})])
def test_zero_weights_give_zero_keys_and_values(peft_type: str, options: dict[str, Any]) -> None:
    """As PEFT's `init_weights="zero"`; an MLP's entrance stays random, so that it can be trained."""
    encoder = PrefixEncoder.fresh(config(peft_type, **options), "zero", 0, CPU)
    assert not encoder.encode().tensor.any()
    assert not options or encoder.trainable_parameters()["transform.w1"].any()


def test_a_fresh_encoder_needs_dimensions() -> None:
    """Nothing is drawn for sizes that are not known."""
    with pytest.raises(InvalidConfig, match="token_dim"):
        PrefixEncoder.fresh(config(token_dim=None), "random", 0, CPU)


def test_a_projection_in_inference_mode_has_been_applied() -> None:
    """A fresh encoder of such a config is flat."""
    fresh = PrefixEncoder.fresh(config(**MLP, inference_mode=True), "random", 0, CPU)
    assert fresh.trainable_parameters().keys() == {"embedding"}


def test_frozen_rows_are_no_trainable_parameter() -> None:
    """A cartridge tells only what training moves."""
    encoder = PrefixEncoder.fresh(config("CARTRIDGE", num_frozen_tokens=2), "random", 0, CPU)
    assert {name: tuple(t.shape) for name, t in encoder.trainable_parameters().items()} == {
        "trainable_embedding": (3, 48)
    }


def test_parameters_that_were_set_are_used() -> None:
    """What one encoder tells makes another one the same."""
    first, second = (PrefixEncoder.fresh(config(**MLP), "random", seed, CPU) for seed in (1, 2))
    second.set_trainable_parameters(first.trainable_parameters())
    assert torch.equal(first.flat(), second.flat())


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"embedding": torch.zeros(5, 7)}, r"embedding has shape \[5, 8\], got \[5, 7\]"),
        ({"transform.w1": torch.zeros(6, 8)}, r"transform.w1 has shape \[8, 6\], got \[6, 8\]"),
        ({"transform.w3": torch.zeros(1)}, "no parameter 'transform.w3'; there are embedding, transform.w1"),
    ],
)
def test_parameters_that_do_not_fit_change_nothing(parameters: dict[str, Tensor], message: str) -> None:
    """All are checked before the first is replaced."""
    encoder = PrefixEncoder.fresh(config(**MLP), "random", 0, CPU)
    before = encoder.flat()
    with pytest.raises(InvalidCheckpoint, match=message):
        encoder.set_trainable_parameters({"transform.b1": torch.ones(6), **parameters})
    assert torch.equal(encoder.flat(), before)


def test_large_activations_are_computed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows at a time, and the last: the same values to the last bits, in the same places."""
    wanted = config(**MLP)
    whole = PrefixEncoder.fresh(wanted, "random", 3, CPU)
    assert [len(rows) for rows in whole.rows()] == [5]
    before = whole.encode().tensor
    monkeypatch.setattr(encoder, "HIDDEN_BLOCK", 2 * 6 * 4)
    assert [len(rows) for rows in whole.rows()] == [2, 2, 1]
    torch.testing.assert_close(whole.encode().tensor, before, rtol=0, atol=1e-6)
    torch.testing.assert_close(whole.flat(), torch.cat(list(whole.rows())), rtol=0, atol=0)


def test_much_work_is_computed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of this MLP takes 2 * 6 * (8 + 48) operations; a limit below that leaves one row a block."""
    whole = PrefixEncoder.fresh(config(**MLP), "random", 3, CPU)
    before = whole.encode().tensor
    for operations, expected in ((5 * 672, [5]), (5 * 672 - 1, [4, 1]), (2 * 672, [2, 2, 1]), (1, [1] * 5)):
        monkeypatch.setattr(encoder, "BLOCK_FLOPS", operations)
        assert [len(rows) for rows in whole.rows()] == expected
        torch.testing.assert_close(whole.encode().tensor, before, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("tokens", "hidden"), [(31, 4096), (126, 1024)])
def test_ordinary_sizes_are_one_block(tokens: int, hidden: int) -> None:
    """The MLP of a model with 7 billion parameters: one matrix product, as PEFT's."""
    sizes = {"num_virtual_tokens": tokens, "num_layers": 32, "num_attention_heads": 32, "token_dim": 4096}
    wanted = parse_config(
        {"peft_type": "PREFIX_TUNING", **sizes, "prefix_projection": True, "encoder_hidden_size": hidden}
    )
    assert encoder._rows_in_block(wanted) == tokens


@pytest.mark.parametrize("options", [{}, MLP])
def test_weights_that_are_drawn_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """As in one call of torch; the last part may not be shorter than 16 numbers."""
    sizes = {"num_virtual_tokens": 7, **options}
    whole = PrefixEncoder.fresh(config(**sizes), "random", 3, CPU).trainable_parameters()
    first = torch.randn(whole["embedding"].shape, generator=torch.Generator().manual_seed(3))
    assert torch.equal(whole["embedding"], first)
    monkeypatch.setattr(encoder, "_DRAWN", 16)
    parts = PrefixEncoder.fresh(config(**sizes), "random", 3, CPU).trainable_parameters()
    for name, tensor in whole.items():
        assert torch.equal(parts[name], tensor)


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_file_make_the_same_keys_and_values(
    monkeypatch: pytest.MonkeyPatch, task_type: str, dtype: torch.dtype
) -> None:
    """Whatever number of them is read at a time; nothing else of the file is, not even the rest of its tensors."""
    wanted, flat = config(task_type=task_type), torch.randn(5, 48).to(dtype)
    data = bytearray(save({"prompt_embeddings": flat, "score.weight": torch.zeros(1000)}))
    expected = PrefixKV.from_flat(
        flat, num_layers=3, num_kv_heads=2, num_transformer_submodules=wanted.num_transformer_submodules
    )
    for block in (1, 2 * 48 * dtype.itemsize, 1 << 20):
        monkeypatch.setattr(checkpoint, "BLOCK", block)
        asked: list[int] = []

        def read(start: int, stop: int) -> memoryview:
            asked.append(stop - start)  # noqa: B023 - called in this round
            return memoryview(data)[start:stop]

        file = locate_prefix(read, len(data), wanted)
        found = assemble(wanted, read_rows(file, read), file.encoded_dtype, CPU)
        assert torch.equal(found.tensor, expected.tensor)
        assert sum(asked) <= flat.nbytes + 2 * header_nbytes(read, len(data)) + 100


def test_the_estimate_of_an_encoding() -> None:
    """Weights, activations, result, keys and values; in half precision float32 copies too; without an MLP a block."""
    values: dict[str, Any] = {
        "num_virtual_tokens": 1 << 14,
        "num_layers": 4,
        "num_attention_heads": 2,
        "token_dim": 64,
    }
    plain = parse_config({"peft_type": "PREFIX_TUNING", **values})
    width, tokens, hidden = 4 * 2 * 64, 1 << 14, 1 << 12
    data = bytearray(save({"prompt_embeddings": torch.zeros(tokens, width, dtype=torch.bfloat16)}))
    assert encoding_nbytes(plain, located(plain, data)) == tokens * width * 2 + checkpoint.BLOCK
    projected = parse_config(
        {"peft_type": "PREFIX_TUNING", **values, "prefix_projection": True, "encoder_hidden_size": hidden}
    )
    state = TheirEncoder(peft.PrefixTuningConfig(**values, prefix_projection=True, encoder_hidden_size=hidden))
    tensors = {name: tensor.to(torch.float16).contiguous() for name, tensor in state.state_dict().items()}
    stored = sum(tensor.nbytes for tensor in tensors.values())
    rows = encoder.HIDDEN_BLOCK // (4 * hidden)
    expected = 3 * stored + encoder.HIDDEN_BLOCK + rows * width * 4 + tokens * width * 4
    assert encoding_nbytes(projected, located(projected, bytearray(save(tensors)))) == expected


def located(wanted: PrefixConfig, data: bytearray) -> LocatedPrefix:
    return locate_prefix(lambda start, stop: memoryview(data)[start:stop], len(data), wanted)
