"""What the library does where its rooms fall out of step."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from service.blobs import FolderBlobStore
from service.catalog.database import Database
from service.catalog.records import COMMAND_LINE, Quotas, Version
from service.errors import CorruptBlob, OutOfSpace, QuotaExceeded, Unavailable
from service.library import Library
from service.plan import Limits, PrefixRequest
from service.prefix.config import parse_config, parse_json
from service.prefix.references import parse_reference
from service.publishing import Target
from service.registry.registry import AdapterRegistry
from tests.admission import generous_admission
from tests.conftest import CORPUS
from tests.test_blobs import largest_file

TARGET = Target("acme", "a", COMMAND_LINE)
LIMITS = Limits(batch_size=8, sequence_length=64, upload_bytes=1 << 20)


@pytest.fixture
async def library(tmp_path: Path) -> AsyncIterator[Library]:
    """A library on a folder."""
    database = Database(tmp_path / "catalog.sqlite")
    registry = AdapterRegistry(torch.device("cpu"), 1 << 20, 1 << 20)
    made = Library(database, FolderBlobStore(tmp_path / "blobs"), registry, LIMITS, generous_admission())
    made.tenants.put("acme", COMMAND_LINE)
    yield made
    database.close()


async def published(library: Library, case: str) -> Version:
    """A corpus case as a version."""
    folder = CORPUS / "cases" / case / "adapter"
    config = parse_config(parse_json((folder / "adapter_config.json").read_bytes(), "the config"))
    async with library.publisher.receiving(TARGET, 0) as upload:
        upload.weights.write((folder / "adapter_model.safetensors").read_bytes())
        version, _ = await library.publisher.publish(TARGET, config, upload)
    return version


async def body_of(library: Library, version: Version) -> bytes:
    """The answer to a request without options."""
    plan = library.plan(version, PrefixRequest())
    async with library.rendering(plan) as rendering:
        return b"".join(plan.message.chunks(rendering))


def blob(tmp_path: Path, digest: str) -> Path:
    """A blob's file."""
    name = digest.removeprefix("sha256:")
    return tmp_path / "blobs" / name[:2] / name


async def test_a_lost_derived_blob_is_made_again_from_the_weights(library: Library, tmp_path: Path) -> None:
    """The same bytes are served under the same entity tag, and the blob is back."""
    version = await published(library, "llama-n20-emb")
    before = await body_of(library, version)
    blob(tmp_path, version.key_values).unlink()
    await library.unload(version, COMMAND_LINE)
    assert await body_of(library, version) == before
    assert blob(tmp_path, version.key_values).exists()


async def test_an_mlp_that_gives_other_bits_gets_another_entity_tag(library: Library, tmp_path: Path) -> None:
    """Bytes never change under a tag: the caller is asked to come again, and then gets the new one."""
    version = await published(library, "gpt2-n20-proj-trainstate")
    library.catalog.set_key_values(version, f"sha256:{'0' * 64}")  # as if another machine had encoded it
    old = library.catalog.resolve("acme", parse_reference("a"))
    with pytest.raises(Unavailable):
        await body_of(library, old)
    new = library.catalog.resolve("acme", parse_reference("a"))
    assert new.key_values == version.key_values
    assert library.plan(new, PrefixRequest()).etag != library.plan(old, PrefixRequest()).etag
    assert await body_of(library, new)


async def test_lost_weights_are_damage(library: Library, tmp_path: Path) -> None:
    """Neither a missing resource nor a defect: 503, with words."""
    version = await published(library, "llama-n20-emb")
    for digest in (version.weights, version.key_values):
        blob(tmp_path, digest).unlink()
    await library.unload(version, COMMAND_LINE)
    with pytest.raises(CorruptBlob, match="lost"):
        await body_of(library, version)
    with pytest.raises(CorruptBlob, match="lost"):
        library.encodings.open_weights(version)


async def test_bit_rot_is_damage_for_one_version_alone(library: Library, tmp_path: Path) -> None:
    """A byte that changed on the disk is noticed before it is served; others are unaffected."""
    version, other = await published(library, "llama-n20-emb"), await published(library, "gpt2-n20-emb")
    path = blob(tmp_path, version.key_values)
    before = await body_of(library, version)
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    await library.unload(version, COMMAND_LINE)
    with pytest.raises(CorruptBlob, match="no longer match"):
        await body_of(library, version)
    assert await body_of(library, other)
    await library.unload(version, COMMAND_LINE)
    assert await body_of(library, version) == before  # made again from its weights


async def test_the_same_files_again_mend_a_version(library: Library, tmp_path: Path) -> None:
    """Also when nothing of it is left: what was remembered of its damage is forgotten."""
    version = await published(library, "llama-n20-emb")
    before = await body_of(library, version)
    for digest in (version.weights, version.key_values):
        blob(tmp_path, digest).unlink()
    await library.unload(version, COMMAND_LINE)
    with pytest.raises(CorruptBlob, match="lost"):
        await body_of(library, version)
    assert await published(library, "llama-n20-emb") == version
    assert await body_of(library, version) == before


async def test_a_quota_is_met_before_the_encoder_runs(library: Library, tmp_path: Path) -> None:
    """What has no room leaves no blob; what is there already needs none, however full its tenant is."""
    version = await published(library, "llama-n20-emb")
    library.tenants.put("acme", COMMAND_LINE, Quotas(max_bytes=version.nbytes))
    before = sorted((tmp_path / "blobs").rglob("*"))
    with pytest.raises(QuotaExceeded, match=rf"has {version.nbytes} of {version.nbytes} bytes"):
        await published(library, "gpt2-n20-emb")
    assert sorted((tmp_path / "blobs").rglob("*")) == before
    assert await published(library, "llama-n20-emb") == version


async def test_an_untrained_prefix_that_finds_no_room_leaves_nothing(library: Library, tmp_path: Path) -> None:
    """Neither a version nor a half-written file."""
    folder = CORPUS / "cases" / "llama-n20-emb" / "adapter"
    config = parse_config(parse_json((folder / "adapter_config.json").read_bytes(), "the config"))
    large = parse_config({**config.model_dump(mode="json"), "num_virtual_tokens": 200})
    with largest_file(4096), pytest.raises(OutOfSpace):
        await library.publisher.publish_fresh(TARGET, large, "zero", 0)
    assert list((tmp_path / "blobs" / "staging").iterdir()) == []


async def test_the_bytes_that_count_are_those_that_are_kept(library: Library, tmp_path: Path) -> None:
    """Also those of an MLP with weights in half precision, whose result is float32: budgets and quotas rely on it."""
    folder = CORPUS / "cases" / "gpt2-n20-proj-trainstate" / "adapter"
    config = parse_config(parse_json((folder / "adapter_config.json").read_bytes(), "the config"))
    halved = {name: value.to(torch.bfloat16) for name, value in load_file(folder / "adapter_model.safetensors").items()}
    for tensors in (load_file(folder / "adapter_model.safetensors"), halved):
        async with library.publisher.receiving(TARGET, 0) as upload:
            upload.weights.write(save(tensors))
            version, _ = await library.publisher.publish(TARGET, config, upload)
        stored = load_file(blob(tmp_path, version.key_values))
        assert sum(tensor.nbytes for tensor in stored.values()) == version.key_values_bytes
