"""Fine-tuned models' files: where they lie, and a bounded cache of them on this machine's disk."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shutil
import uuid
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import structlog

from svc_kit.errors import NotFound, Unavailable
from svc_kit.identity import Issuer
from svc_kit.interceptors import from_rpc_error
from svc_kit.object_store import ObjectStore
from svc_kit.shared_calls import SharedCalls
from trainer_svc.engine.run_spec import MERGED_DIR
from tunery.job.v1 import model_service_pb2
from tunery.job.v1.model_service_pb2_grpc import ModelArtifactServiceStub

log = structlog.get_logger(__name__)

FIND_SECONDS = 5
_PARTIAL = ".partial-"
_GONE = ".gone-"
_KEY = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class Artifact:
    """A fine-tuned model.

    Attributes:
        key: names the model among all accounts' models; the name of its folder in the cache.
        base_model: the base model's id in the catalog.
        is_adapter: whether the files are an adapter and not a whole model.
        object_prefix: every file's key begins with this.
    """

    key: str
    base_model: str
    is_adapter: bool
    object_prefix: str


class ArtifactFinder:
    """Asks job_svc which models an account has."""

    def __init__(self, job_svc: grpc.aio.Channel, issuer: Issuer) -> None:
        self._stub = ModelArtifactServiceStub(job_svc)
        self._issuer = issuer

    async def find(self, account_id: str, model_id: str) -> Artifact:
        """Returns the account's model.

        Raises:
            NotFound: the account has no such model, or it is deleted.
            Unavailable: job_svc can't be reached.
        """
        request = model_service_pb2.FindModelArtifactRequest(account_id=account_id, model_id=model_id)
        try:
            found = await self._stub.FindModelArtifact(
                request, metadata=self._issuer.own_metadata(), timeout=FIND_SECONDS, wait_for_ready=True
            )
        except grpc.aio.AioRpcError as error:
            match known := from_rpc_error(error):
                case NotFound() | Unavailable():
                    raise known from error
            # A refusal of this service's own identity must not look like one of the client's key.
            raise RuntimeError(f"job_svc did not answer: {known.code}: {known.message}") from error
        assert found.method in ("lora", "full"), found.method
        return Artifact(
            key=artifact_key(account_id, model_id),
            base_model=found.base_model,
            is_adapter=found.method == "lora",
            object_prefix=found.object_prefix,
        )


def artifact_key(account_id: str, model_id: str) -> str:
    """Returns the model's key: 40 characters that are safe in file names, whatever the ids hold."""
    return hashlib.sha256(f"{account_id}\n{model_id}".encode()).hexdigest()[:40]


class ArtifactCache:
    """Models' folders under one folder, which belongs to this process alone.

    A model's files never change, so a folder is good until its model is deleted. Folders appear and go by
    a rename. Over `max_bytes`, those unused for longest go; one in use stays.
    """

    def __init__(self, store: ObjectStore, folder: Path, max_bytes: int) -> None:
        """Takes over what an earlier process left in `folder`, which is made if missing. Blocking."""
        self._store = store
        self._folder = folder
        self._max_bytes = max_bytes
        self._users: Counter[str] = Counter()
        self._forgotten: set[str] = set()
        self._fetches: SharedCalls[None] = SharedCalls()
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in (*folder.glob(f"{_PARTIAL}*"), *folder.glob(f"{_GONE}*")):
            shutil.rmtree(leftover)
        # Whatever else an operator keeps there is never touched.
        kept = sorted(
            (path for path in folder.iterdir() if _KEY.fullmatch(path.name)),
            key=lambda path: path.stat().st_mtime,
        )
        # Least recently used first.
        self._size_bytes = OrderedDict((path.name, _size_bytes(path)) for path in kept)

    @asynccontextmanager
    async def use(self, artifact: Artifact) -> AsyncIterator[Path]:
        """Gives the folder of a model's files, fetched first where needed; it stays until the block ends.

        Raises:
            NotFound: the store has no such files.
            MinioException: the store can't be reached.
        """
        async with self._one_more_user(artifact.key):
            # A fetch that others began may have ended, and its model may have had to go, before this use.
            while artifact.key not in self._size_bytes:
                await self._fetches.run(artifact.key, lambda: self._fetch(artifact))
            self._size_bytes.move_to_end(artifact.key)
            path = self._folder / artifact.key
            os.utime(path)  # the order of use outlives this process
            yield path

    @asynccontextmanager
    async def _one_more_user(self, key: str) -> AsyncIterator[None]:
        self._users[key] += 1
        try:
            yield
        finally:
            self._users[key] -= 1
            self._users += Counter()  # drops those at zero
            if key in self._forgotten:
                await self.forget(key)

    async def forget(self, key: str) -> None:
        """Removes a deleted model's files, at the end of the last use where there is one. Repeatable."""
        if key in self._users:
            self._forgotten.add(key)
            return
        self._forgotten.discard(key)
        if key in self._size_bytes:
            await self._remove(key)

    async def close(self) -> None:
        """Stops what is being fetched."""
        await self._fetches.close()

    async def _fetch(self, artifact: Artifact) -> None:
        # Those who asked for it may be gone before it is there.
        async with self._one_more_user(artifact.key):
            partial = self._folder / f"{_PARTIAL}{uuid.uuid4().hex}"
            partial.mkdir()
            try:
                # Adapters are put beside a base model that is loaded once; merged ones would be loaded each.
                await self._store.get_folder(artifact.object_prefix, partial, without=MERGED_DIR)
                partial.rename(self._folder / artifact.key)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            self._size_bytes[artifact.key] = _size_bytes(self._folder / artifact.key)
            log.info("fetched a model", key=artifact.key, size_bytes=self._size_bytes[artifact.key])
        await self._shrink()

    async def _shrink(self) -> None:
        while sum(self._size_bytes.values()) > self._max_bytes:
            unused = next((key for key in self._size_bytes if key not in self._users), None)
            if unused is None:
                return
            await self._remove(unused)

    async def _remove(self, key: str) -> None:
        del self._size_bytes[key]
        gone = self._folder / f"{_GONE}{uuid.uuid4().hex}"
        (self._folder / key).rename(gone)
        await asyncio.to_thread(shutil.rmtree, gone)
        log.info("removed a model from the cache", key=key)


def _size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
