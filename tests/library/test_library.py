"""What the library does where its rooms fall out of step."""

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import anyio
import pytest
import torch
from safetensors.torch import load_file, save

from prefix_service.blobs.folder import FolderBlobStore
from prefix_service.catalog.database import Database
from prefix_service.catalog.garbage import Garbage
from prefix_service.catalog.keys import Keyring
from prefix_service.catalog.records import COMMAND_LINE, Principal, Quotas, Version
from prefix_service.catalog.tenants import Tenants
from prefix_service.catalog.threads import write_catalog
from prefix_service.errors import CorruptBlob, OutOfSpace, QuotaExceeded, ReadOnly, Unavailable
from prefix_service.library import encodings
from prefix_service.library.arrivals import Target
from prefix_service.library.encodings import EncodedAgain
from prefix_service.library.plan import Limits, PrefixRequest
from prefix_service.library.wiring import UseCases, compose
from prefix_service.prefix.config import parse_config
from prefix_service.prefix.json_text import parse_json
from prefix_service.prefix.references import parse_reference
from prefix_service.prefix.wire.masks import InputMask
from prefix_service.registry.registry import AdapterRegistry
from tests.admission import generous_admission
from tests.blobs.test_folder import largest_file
from tests.catalog.conftest import HoldingCatalog, remove_deleted
from tests.conftest import CORPUS

TARGET = Target("acme", "a", COMMAND_LINE)
LIMITS = Limits(batch_size=8, sequence_length=64, upload_bytes=1 << 20)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    """An empty catalog."""
    made = Database(tmp_path / "catalog.sqlite")
    yield made
    made.close()


def use_cases(tmp_path: Path, database: Database, blobs: FolderBlobStore) -> UseCases:
    """The use cases of a process."""
    registry = AdapterRegistry(torch.device("cpu"), 1 << 20, 1 << 20)
    return compose(database, Keyring(database, tmp_path / "key.secret"), blobs, registry, LIMITS, generous_admission())


@pytest.fixture
async def cases(tmp_path: Path, database: Database) -> UseCases:
    """The use cases of a process, and a tenant."""
    made = use_cases(tmp_path, database, FolderBlobStore(tmp_path / "blobs"))
    await made.tenancy.put("acme", COMMAND_LINE, None)
    return made


async def published(cases: UseCases, case: str, by: Principal = COMMAND_LINE) -> Version:
    """Publishes a corpus case, and returns its version."""
    folder = CORPUS / "cases" / case / "adapter"
    config = parse_config(parse_json((folder / "adapter_config.json").read_bytes(), "the config"))
    async with cases.publisher.receiving(replace(TARGET, by=by), 0) as upload:
        upload.write((folder / "adapter_model.safetensors").read_bytes())
        version, _ = await cases.publisher.publish(upload, config)
    return version


async def body_of(cases: UseCases, version: Version) -> bytes:
    """The answer to a request without options."""
    plan = cases.library.plan(version, PrefixRequest())
    async with cases.library.rendering(plan) as rendering:
        return b"".join(plan.file.chunks(rendering))


def blob(tmp_path: Path, digest: str) -> Path:
    """A blob's file."""
    name = digest.removeprefix("sha256:")
    return tmp_path / "blobs" / name[:2] / name


async def test_a_lost_derived_blob_is_made_again_from_the_weights(cases: UseCases, tmp_path: Path) -> None:
    """The same bytes are served under the same entity tag, and the blob is back."""
    version = await published(cases, "llama-n20-emb")
    before = await body_of(cases, version)
    blob(tmp_path, version.key_values).unlink()
    await cases.residency.unload(version, COMMAND_LINE)
    assert await body_of(cases, version) == before
    assert blob(tmp_path, version.key_values).exists()


def with_other_bits(database: Database, tmp_path: Path, version: Version) -> Version:
    """The version as another processor would have encoded it: the last bit of its stored keys and values differs."""
    data = bytearray(blob(tmp_path, version.key_values).read_bytes())
    data[-4] ^= 1
    staged = FolderBlobStore(tmp_path / "blobs").stage()
    staged.write(data)
    return HoldingCatalog(database).replace_key_values(version, staged.commit())


async def test_an_mlp_that_gives_other_bits_gets_another_entity_tag(
    cases: UseCases, database: Database, tmp_path: Path
) -> None:
    """Bytes never change under a tag: what was planned for the old bits is planned again for the new ones."""
    version = await published(cases, "gpt2-n20-proj-trainstate")
    bits = await body_of(cases, version)
    old = with_other_bits(database, tmp_path, version)
    others = await body_of(cases, old)
    assert others != bits
    await cases.residency.unload(old, COMMAND_LINE)
    blob(tmp_path, old.key_values).unlink()
    with pytest.raises(EncodedAgain) as again:
        await body_of(cases, old)
    new = again.value.version
    assert new == HoldingCatalog(database).resolve("acme", parse_reference("a"))
    assert new.key_values == version.key_values
    flags = torch.tensor([[0, 1, 1], [1, 1, 1]], dtype=torch.uint8)
    for mask in (None, InputMask(flags, torch.int64)):
        before, after = (cases.library.plan(one, PrefixRequest(), mask) for one in (old, new))
        renewed = before.renewed(new)
        assert (renewed.version, renewed.etag) == (new, after.etag)
        assert renewed.etag != before.etag
    assert await body_of(cases, new) == bits


async def test_old_and_new_bits_never_meet_under_one_entity_tag(
    cases: UseCases, database: Database, tmp_path: Path
) -> None:
    """Whoever still holds the old plan gets the old bits or is told to plan again; old bits that are resident, as in a
    process that has not heard of the change, are not sent under the new tag."""
    version = await published(cases, "gpt2-n20-proj-trainstate")
    bits = await body_of(cases, version)
    old = with_other_bits(database, tmp_path, version)
    others = await body_of(cases, old)
    assert await body_of(cases, version) == bits
    assert await body_of(cases, old) == others


async def test_a_load_takes_the_new_bits(cases: UseCases, database: Database, tmp_path: Path) -> None:
    """What has no entity tag needs nobody to ask twice."""
    version = await published(cases, "gpt2-n20-proj-trainstate")
    old = with_other_bits(database, tmp_path, version)
    blob(tmp_path, old.key_values).unlink()
    assert (await cases.library.load(old)).key_values == version.key_values
    assert cases.residency.state(old)["resident"]


async def test_a_composition_takes_the_new_bits(cases: UseCases, database: Database, tmp_path: Path) -> None:
    """As if they had been there from the beginning."""
    version = await published(cases, "gpt2-n20-proj-trainstate")
    target = Target("acme", "both", COMMAND_LINE)
    expected, _ = await cases.publisher.publish_composed(target, [("a", version), ("a", version)])
    old = with_other_bits(database, tmp_path, version)
    blob(tmp_path, old.key_values).unlink()
    assert await cases.publisher.publish_composed(target, [("a", old), ("a", old)]) == (expected, False)


async def test_who_loses_the_race_takes_the_winners_bits(cases: UseCases, database: Database, tmp_path: Path) -> None:
    """Two processes that encode again, each with other bits: the catalog keeps what came first."""
    version = await published(cases, "gpt2-n20-proj-trainstate")
    old = with_other_bits(database, tmp_path, version)
    first = HoldingCatalog(database).replace_key_values(old, version.key_values)
    assert first.key_values == version.key_values
    assert HoldingCatalog(database).replace_key_values(old, f"sha256:{'0' * 64}") == first


async def test_lost_bits_are_served_though_the_disk_is_full(
    cases: UseCases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were made again and are the very ones: that nothing can be stored does not matter."""
    version = await published(cases, "llama-n20-emb")
    before = await body_of(cases, version)
    blob(tmp_path, version.key_values).unlink()
    await cases.residency.unload(version, COMMAND_LINE)

    def full(_store: FolderBlobStore) -> None:
        raise OutOfSpace("cannot begin a blob: No space left on device")

    monkeypatch.setattr(FolderBlobStore, "stage", full)
    assert await body_of(cases, version) == before
    assert not blob(tmp_path, version.key_values).exists()


async def test_lost_weights_are_damage(cases: UseCases, tmp_path: Path) -> None:
    """Neither a missing resource nor a defect: 503, with words."""
    version = await published(cases, "llama-n20-emb")
    for digest in (version.weights, version.key_values):
        blob(tmp_path, digest).unlink()
    await cases.residency.unload(version, COMMAND_LINE)
    with pytest.raises(CorruptBlob, match="lost"):
        await body_of(cases, version)
    with pytest.raises(CorruptBlob, match="lost"):
        await cases.library.open_weights(version)


async def test_bit_rot_is_noticed_and_mended_for_one_version_alone(cases: UseCases, tmp_path: Path) -> None:
    """A byte that changed on the disk is never served: keys and values are made again from the weights, within the same
    request. If these are damaged too, that version is unavailable, and others are unaffected."""
    version, other = await published(cases, "llama-n20-emb"), await published(cases, "gpt2-n20-emb")
    before = await body_of(cases, version)
    for digests, served in (([version.key_values], True), ([version.key_values, version.weights], False)):
        for digest in digests:
            path = blob(tmp_path, digest)
            path.write_bytes(path.read_bytes()[:-1] + b"\x00")
        await cases.residency.unload(version, COMMAND_LINE)
        if served:
            assert await body_of(cases, version) == before
        else:
            with pytest.raises(CorruptBlob, match="no longer match"):
                await body_of(cases, version)
        assert await body_of(cases, other)
    assert len(list((tmp_path / "blobs" / "quarantine").iterdir())) == 2


async def test_a_read_only_library_serves_what_it_can_make(cases: UseCases, database: Database, tmp_path: Path) -> None:
    """Damaged keys and values stay where they are; the very bits, made again, are served from memory, other bits are
    not: the catalog could not name them."""
    read_only = Database(tmp_path / "catalog.sqlite", read_only=True)
    reading = use_cases(tmp_path, read_only, FolderBlobStore(tmp_path / "blobs", read_only=True))
    same = await published(cases, "llama-n20-emb")
    expected = await body_of(cases, same)
    other = with_other_bits(database, tmp_path, await published(cases, "gpt2-n20-proj-trainstate"))
    for version in (same, other):
        path = blob(tmp_path, version.key_values)
        path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    before = sorted((tmp_path / "blobs").rglob("*"))
    assert await body_of(reading, same) == expected
    with pytest.raises(CorruptBlob, match="read them once from the service that writes"):
        await body_of(reading, other)
    with pytest.raises(ReadOnly, match="--read-only"):
        async with reading.publisher.receiving(TARGET, 0):
            pytest.fail("a read-only service takes an upload")
    assert sorted((tmp_path / "blobs").rglob("*")) == before
    read_only.close()


async def test_bytes_that_are_being_removed_are_refused(
    cases: UseCases, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A publication does not wait for ever for a collector that removes the same bytes, and stores nothing."""
    monkeypatch.setattr(encodings, "_REMOVAL", 0.0)
    version = await published(cases, "llama-n20-emb")
    HoldingCatalog(database).delete("acme", parse_reference("a"), COMMAND_LINE)
    remove_deleted(database)
    condemned = Garbage(database).condemn([version.key_values], 0)
    with pytest.raises(Unavailable, match="another process is removing the same bytes"):
        await published(cases, "llama-n20-emb")
    Garbage(database).acquit(condemned)
    assert (await published(cases, "llama-n20-emb")).key_values == version.key_values


async def test_a_blob_folder_that_is_gone_is_not_damage(cases: UseCases, tmp_path: Path) -> None:
    """No blob is lost, all are elsewhere: nothing is encoded again, and once the folder is back all is as before."""
    version = await published(cases, "llama-n20-emb")
    before = await body_of(cases, version)
    await cases.residency.unload(version, COMMAND_LINE)
    (tmp_path / "blobs").rename(tmp_path / "away")
    for empty in (False, True):  # a mount point without its disk is empty
        if empty:
            (tmp_path / "blobs").mkdir()
        with pytest.raises(Unavailable, match="the blob folder blobs is gone") as gone:
            await body_of(cases, version)
        assert (type(gone.value), gone.value.retry_after) == (Unavailable, 1)
        with pytest.raises(Unavailable, match="gone"):
            await cases.library.open_weights(version)
    (tmp_path / "blobs").rmdir()
    (tmp_path / "away").rename(tmp_path / "blobs")
    assert await body_of(cases, version) == before


async def test_the_same_files_again_mend_a_version(cases: UseCases, tmp_path: Path) -> None:
    """Also when nothing of it is left: what was remembered of its damage is forgotten."""
    version = await published(cases, "llama-n20-emb")
    before = await body_of(cases, version)
    for digest in (version.weights, version.key_values):
        blob(tmp_path, digest).unlink()
    await cases.residency.unload(version, COMMAND_LINE)
    with pytest.raises(CorruptBlob, match="lost"):
        await body_of(cases, version)
    assert await published(cases, "llama-n20-emb") == version
    assert await body_of(cases, version) == before


async def test_a_quota_is_met_before_the_encoder_runs(cases: UseCases, database: Database, tmp_path: Path) -> None:
    """What has no room leaves no blob; what is there already needs none, however full its tenant is."""
    version = await published(cases, "llama-n20-emb")
    Tenants(database).put("acme", COMMAND_LINE, Quotas(max_bytes=version.nbytes))
    before = sorted((tmp_path / "blobs").rglob("*"))
    with pytest.raises(QuotaExceeded, match=rf"has {version.nbytes} of {version.nbytes} bytes"):
        await published(cases, "gpt2-n20-emb")
    assert sorted((tmp_path / "blobs").rglob("*")) == before
    assert await published(cases, "llama-n20-emb") == version


async def test_an_untrained_prefix_that_finds_no_room_leaves_nothing(cases: UseCases, tmp_path: Path) -> None:
    """Neither a version nor a half-written file."""
    folder = CORPUS / "cases" / "llama-n20-emb" / "adapter"
    config = parse_config(parse_json((folder / "adapter_config.json").read_bytes(), "the config"))
    large = parse_config({**config.model_dump(mode="json"), "num_virtual_tokens": 200})
    with largest_file(4096), pytest.raises(OutOfSpace):
        await cases.publisher.publish_fresh(TARGET, large, "zero", 0)
    assert list((tmp_path / "blobs" / "staging").iterdir()) == []


async def test_the_bytes_that_count_are_those_that_are_kept(cases: UseCases, tmp_path: Path) -> None:
    """Also those of an MLP with weights in half precision, whose result is float32: budgets and quotas rely on it."""
    folder = CORPUS / "cases" / "gpt2-n20-proj-trainstate" / "adapter"
    config = parse_config(parse_json((folder / "adapter_config.json").read_bytes(), "the config"))
    halved = {name: value.to(torch.bfloat16) for name, value in load_file(folder / "adapter_model.safetensors").items()}
    for tensors in (load_file(folder / "adapter_model.safetensors"), halved):
        async with cases.publisher.receiving(TARGET, 0) as upload:
            upload.write(save(tensors))
            version, _ = await cases.publisher.publish(upload, config)
        stored = load_file(blob(tmp_path, version.key_values))
        assert sum(tensor.nbytes for tensor in stored.values()) == version.key_values_bytes


@pytest.mark.parametrize("end", ["refused", "cancelled"])
async def test_blobs_of_a_version_that_never_was_count_until_they_are_collected(
    cases: UseCases, database: Database, tmp_path: Path, end: str
) -> None:
    """Whether the transaction refused it or its client left while it waited for its turn."""
    free = threading.Event()
    by = replace(COMMAND_LINE, acts_on=Tenants(database).require("acme"))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(write_catalog, free.wait, 60)  # the tenant's one turn
        publishing = asyncio.create_task(published(cases, "llama-n20-emb", by))
        while len(list((tmp_path / "blobs").glob("??/*"))) < 2:
            await asyncio.sleep(0.01)
            assert not publishing.done()
        if end == "refused":
            Tenants(database).put("acme", COMMAND_LINE, Quotas(max_adapters=0))
        else:
            publishing.cancel()
        free.set()
        with pytest.raises(QuotaExceeded if end == "refused" else asyncio.CancelledError):
            await publishing
    stored = sum(path.stat().st_size for path in (tmp_path / "blobs").glob("??/*"))
    found = Tenants(database).get("acme")
    assert found.adapters == 0
    assert 0 <= stored - found.uncollected < 256  # the header of the keys and values, which never counts
