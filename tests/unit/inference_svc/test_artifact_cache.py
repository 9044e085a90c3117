"""The cache of fine-tuned models' files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from inference_svc.artifacts import Artifact, ArtifactCache, artifact_key
from svc_kit.errors import NotFound
from svc_kit.object_store import ObjectStore

FILE_BYTES = 1000


@pytest.fixture
async def artifacts(store: ObjectStore, tmp_path: Path) -> list[Artifact]:
    """Three models of a thousand bytes."""
    made = []
    for number in range(3):
        folder = tmp_path / "made" / str(number)
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(bytes([number]) * FILE_BYTES)
        prefix = f"accounts/acct/models/{tmp_path.name}-{number}/"
        await store.put_folder(prefix, folder)
        made.append(Artifact(artifact_key("acct", str(number)), "base", True, prefix))
    return made


async def fetch(cache: ArtifactCache, artifact: Artifact) -> bytes:
    async with cache.use(artifact) as folder:
        return (folder / "model.safetensors").read_bytes()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


async def test_unused_for_longest_goes_first(
    store: ObjectStore, artifacts: list[Artifact], tmp_path: Path
) -> None:
    cache = ArtifactCache(store, tmp_path / "cache", 2 * FILE_BYTES)
    for artifact in (artifacts[0], artifacts[1], artifacts[0], artifacts[2]):
        await fetch(cache, artifact)
    assert names(tmp_path / "cache") == {artifacts[0].key, artifacts[2].key}
    assert await fetch(cache, artifacts[1]) == b"\1" * FILE_BYTES
    await cache.close()


async def test_model_in_use_stays(store: ObjectStore, artifacts: list[Artifact], tmp_path: Path) -> None:
    cache = ArtifactCache(store, tmp_path / "cache", FILE_BYTES)
    async with cache.use(artifacts[0]) as folder:
        await fetch(cache, artifacts[1])
        await cache.forget(artifacts[0].key)
        assert folder.is_dir()
    assert artifacts[0].key not in names(tmp_path / "cache")
    await cache.close()


async def test_next_process_takes_over_and_clears_away(
    store: ObjectStore, artifacts: list[Artifact], tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    first = ArtifactCache(store, folder, 10 * FILE_BYTES)
    await fetch(first, artifacts[0])
    await first.close()
    (folder / ".partial-1").mkdir()
    (folder / ".gone-1").mkdir()
    (folder / "an operator's own").mkdir()
    await store.delete_all([stored.key for stored in await store.list(artifacts[0].object_prefix)])
    second = ArtifactCache(store, folder, 10 * FILE_BYTES)
    assert await fetch(second, artifacts[0]) == b"\0" * FILE_BYTES
    assert names(folder) == {artifacts[0].key, "an operator's own"}
    await second.close()


async def test_failed_fetch_leaves_nothing(store: ObjectStore, tmp_path: Path) -> None:
    cache = ArtifactCache(store, tmp_path / "cache", FILE_BYTES)
    artifact = Artifact(artifact_key("acct", "none"), "base", True, "accounts/acct/models/none/")
    with pytest.raises(NotFound):
        await fetch(cache, artifact)
    assert names(tmp_path / "cache") == set()
    await cache.close()


async def test_one_fetch_serves_all(store: ObjectStore, artifacts: list[Artifact], tmp_path: Path) -> None:
    cache = ArtifactCache(store, tmp_path / "cache", 10 * FILE_BYTES)
    results = await asyncio.gather(*(fetch(cache, artifacts[0]) for _ in range(3)))
    assert results == [b"\0" * FILE_BYTES] * 3
    await cache.close()


class SlowStore(ObjectStore):
    """One that gives a file once it is told to."""

    def __init__(self) -> None:
        self.is_asked, self.may_answer = asyncio.Event(), asyncio.Event()

    async def get_folder(self, prefix: str, folder: Path, without: str | None = None) -> None:
        self.is_asked.set()
        await self.may_answer.wait()
        (folder / "model.safetensors").write_bytes(bytes(FILE_BYTES))


@pytest.fixture
async def left(tmp_path: Path) -> AsyncIterator[tuple[ArtifactCache, SlowStore, Artifact]]:
    """A cache with no room, and a model that is being fetched for a caller who has left."""
    store, artifact = (
        SlowStore(),
        Artifact(artifact_key("acct", "0"), "base", True, "accounts/acct/models/0/"),
    )
    cache = ArtifactCache(store, tmp_path / "cache", FILE_BYTES - 1)
    caller = asyncio.create_task(fetch(cache, artifact))
    await store.is_asked.wait()
    caller.cancel()
    await asyncio.gather(caller, return_exceptions=True)
    yield cache, store, artifact
    await cache.close()


async def test_who_comes_while_an_unused_model_goes_gets_it(
    left: tuple[ArtifactCache, SlowStore, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, store, artifact = left
    is_removing, may_remove = asyncio.Event(), asyncio.Event()
    remove = cache._remove

    async def removes_slowly(key: str) -> None:
        await remove(key)
        is_removing.set()
        await may_remove.wait()

    monkeypatch.setattr(cache, "_remove", removes_slowly)
    store.may_answer.set()
    await is_removing.wait()
    second = asyncio.create_task(fetch(cache, artifact))
    await asyncio.sleep(0)
    may_remove.set()
    assert await second == bytes(FILE_BYTES)


async def test_a_model_deleted_while_it_is_fetched_is_not_kept(
    left: tuple[ArtifactCache, SlowStore, Artifact], tmp_path: Path
) -> None:
    cache, store, artifact = left
    cache._max_bytes = 10 * FILE_BYTES
    await cache.forget(artifact.key)
    store.may_answer.set()
    await cache._fetches.run(artifact.key, Mock())  # the same one
    assert names(tmp_path / "cache") == set()
