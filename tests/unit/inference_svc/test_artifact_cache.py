"""The cache of fine-tuned models' files."""

from __future__ import annotations

import asyncio
from pathlib import Path

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
