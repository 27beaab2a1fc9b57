"""`library.digests`: each digest is computed once, and is that of the body as it travels."""

import asyncio
import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from awscrt.checksums import crc32c

from prefix_service.library import digests as body_digests
from prefix_service.library.plan import Plan, PrefixRequest
from prefix_service.library.wiring import UseCases
from prefix_service.prefix.wire.digests import Algorithm
from prefix_service.prefix.wire.prefix_file import PrefixFile
from tests.library.test_library import blob, cases, database, published

__all__ = ["cases", "database"]

CASES = ["llama-n20-emb", "gpt2-n20-proj-trainstate"]


async def digest_and_body(cases: UseCases, plan: Plan, algorithm: Algorithm = "sha-256") -> tuple[bytes | None, bytes]:
    async with cases.library.rendering(plan, algorithm) as rendering:
        digest = await cases.library.body_digest(plan, rendering, algorithm)
        return digest, b"".join(plan.file.chunks(rendering))


class Counted:
    """How many bodies were hashed from their renderings."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        pieces = PrefixFile.pieces

        def counted(file: PrefixFile, *arguments: Any) -> Any:
            self.count += 1
            return pieces(file, *arguments)

        monkeypatch.setattr(PrefixFile, "pieces", counted)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layout": "stacked"},
        {"batch_size": 3, "expand": False},
        {"batch_size": 3},
        {"mask_dtype": "bool", "dtype": "float32"},
        {"dtype": "bfloat16"},
        {"dtype": "float8_e4m3fn"},
        {"layers": "0:1"},
        {"kv_heads": "1:2"},
    ],
    ids=str,
)
async def test_the_digest_is_that_of_the_body(cases: UseCases, case: str, options: dict[str, Any]) -> None:
    """Each algorithm hashes the whole body, during the load or from the rendering, whatever surrounds the tensors."""
    plan = cases.library.plan(await published(cases, case), PrefixRequest(**options))
    digest, body = await digest_and_body(cases, plan)
    assert digest == hashlib.sha256(body).digest()
    digest, body = await digest_and_body(cases, plan, "crc32c")
    assert digest == crc32c(body).to_bytes(4, "big")


async def test_a_body_of_stored_bytes_is_hashed_while_it_is_loaded(
    cases: UseCases, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not as it is stored is hashed afterwards."""
    version = await published(cases, "llama-n20-emb")
    counted = Counted(monkeypatch)
    for options, expected in (({}, 0), ({"kv_heads": "1:2"}, 1)):
        plan = cases.library.plan(version, PrefixRequest(**options))
        async with cases.library.rendering(plan, "sha-256") as rendering:
            await cases.library.body_digest(plan, rendering, "sha-256")
        assert counted.count == expected


async def test_a_digest_is_computed_once(cases: UseCases, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all who ask at once and later; also when the first gives up."""
    plan = cases.library.plan(await published(cases, "llama-n20-emb"), PrefixRequest(kv_heads="1:2"))
    counted = Counted(monkeypatch)
    async with cases.library.rendering(plan, "sha-256") as rendering:
        first, *others = (asyncio.create_task(cases.library.body_digest(plan, rendering, "sha-256")) for _ in range(8))
        await asyncio.sleep(0)
        first.cancel()
        digests = await asyncio.gather(*others)
    assert len(set(digests)) == 1
    assert await cases.library.body_digest(plan, rendering, "sha-256") == digests[0]
    assert counted.count == 1


async def test_a_digest_that_nobody_waits_for_is_not_computed(cases: UseCases, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashing stops after the turn that is under way once the last caller has given up; the next caller begins anew."""
    began, goes_on = threading.Event(), threading.Event()
    turns: list[int] = []
    steps = body_digests._sha_steps

    def watched(*arguments: Any) -> Iterator[None]:
        for step in steps(*arguments):
            turns.append(1)
            began.set()
            goes_on.wait()
            yield step

    monkeypatch.setattr(body_digests, "_sha_steps", watched)
    monkeypatch.setattr(body_digests, "_MEGABYTE", 64)
    plan = cases.library.plan(await published(cases, "llama-n20-emb"), PrefixRequest(batch_size=2))
    async with cases.library.rendering(plan) as rendering:
        waiting = asyncio.create_task(cases.library.body_digest(plan, rendering, "sha-256"))
        await asyncio.to_thread(began.wait)
        waiting.cancel()
        goes_on.set()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        body = b"".join(plan.file.chunks(rendering))
        assert await cases.library.body_digest(plan, rendering, "sha-256") == hashlib.sha256(body).digest()
    assert len(turns) <= body_digests._STEP + -(-len(body) // 64) + 3, "the first computation took one turn"


async def test_a_long_body_that_repeats_rows_has_no_sha_256(cases: UseCases, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its CRC-32C reads the row once; a body of one row always has its SHA-256."""
    version = await published(cases, "llama-n20-emb")
    monkeypatch.setattr(body_digests, "MOST_REPEATED", 1000)
    for options, has_digest in (({"batch_size": 3}, False), ({}, True), ({"batch_size": 3, "expand": False}, True)):
        plan = cases.library.plan(version, PrefixRequest(**options))
        async with cases.library.rendering(plan) as rendering:
            body = b"".join(plan.file.chunks(rendering))
            expected = hashlib.sha256(body).digest() if has_digest else None
            assert await cases.library.body_digest(plan, rendering, "sha-256") == expected
            assert await cases.library.body_digest(plan, rendering, "crc32c") == crc32c(body).to_bytes(4, "big")


async def test_what_was_not_verified_leaves_no_digest(cases: UseCases, tmp_path: Path) -> None:
    """The digest of damaged bytes, which was computed during the read, is not that of the version made again."""
    version = await published(cases, "llama-n20-emb")
    plan = cases.library.plan(version, PrefixRequest())
    path = blob(tmp_path, version.key_values)
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    digest, body = await digest_and_body(cases, plan)
    assert digest == hashlib.sha256(body).digest()


async def test_a_hash_that_fails_is_tried_again(cases: UseCases, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread without memory today may have some tomorrow."""
    plan = cases.library.plan(await published(cases, "llama-n20-emb"), PrefixRequest(kv_heads="1:2"))

    def failing(*_: Any) -> Any:
        raise MemoryError

    async with cases.library.rendering(plan, "sha-256") as rendering:
        with monkeypatch.context() as broken:
            broken.setattr(PrefixFile, "pieces", failing)
            with pytest.raises(MemoryError):
                await cases.library.body_digest(plan, rendering, "sha-256")
        body = b"".join(plan.file.chunks(rendering))
        assert await cases.library.body_digest(plan, rendering, "sha-256") == hashlib.sha256(body).digest()
