"""Answers chats: finds the model, brings its files here, asks it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import structlog

from inference_svc.answer import Answer, ModelFiles
from inference_svc.artifacts import Artifact, ArtifactCache, ArtifactFinder, artifact_key
from inference_svc.chat_request import ChatRequest
from inference_svc.model_thread import ModelThread
from svc_kit.catalog import BaseModelEntry, Catalog
from svc_kit.errors import LimitReached, NotFound, TooManyRequests, Unavailable
from svc_kit.shared_calls import SharedCalls
from svc_kit.under_way import UnderWay
from trainer_svc.base_models import PullError, base_model_dir, is_pulled, pull

log = structlog.get_logger(__name__)


class Chat:
    """The service's one operation."""

    def __init__(
        self,
        catalog: Catalog,
        models_dir: Path,
        finder: ArtifactFinder,
        cache: ArtifactCache,
        thread: ModelThread,
        max_waiting: int,
    ) -> None:
        """Args:
        catalog: the base models.
        models_dir: where they are, or are put when first asked for.
        finder: knows the fine-tuned models.
        cache: has their files.
        thread: makes the answers.
        max_waiting: requests that may wait while one is answered.
        """
        self._entries = {entry.id: entry for entry in catalog.models}
        self._models_dir = models_dir
        self._finder = finder
        self._cache = cache
        self._thread = thread
        self._max_admitted = max_waiting + 1
        self._admitted = UnderWay()
        self._pulls: SharedCalls[Path] = SharedCalls()

    async def answer(self, account_id: str, request: ChatRequest) -> Answer:
        """Returns the model's answer. Cancelling it stops the generation.

        Raises:
            NotFound: the model is neither in the catalog nor one of the account's.
            InvalidRequest: the conversation doesn't fit the model.
            TooManyRequests: enough requests wait already.
            LimitReached: half of them, rounded up, would be the account's.
            Unavailable: job_svc, or the place where a base model comes from, can't be reached.
            MinioException: the store can't be reached.
        """
        # Asked for each time, so that a deleted model is gone at once.
        artifact = None
        if request.model not in self._entries:
            artifact = await self._find(account_id, request.model)
        with self._admit(account_id):
            async with self._files(request.model, artifact) as files:
                return await self._thread.answer(files, request)

    async def close(self) -> None:
        """Stops what is being fetched, and lets the thread end."""
        await self._pulls.close()
        await self._cache.close()
        await asyncio.to_thread(self._thread.close)

    async def _find(self, account_id: str, model_id: str) -> Artifact:
        try:
            return await self._finder.find(account_id, model_id)
        except NotFound as error:
            key = artifact_key(account_id, model_id)
            self._thread.forget(key)
            await self._cache.forget(key)
            raise _no_such_model(model_id) from error

    @contextmanager
    def _admit(self, account_id: str) -> Iterator[None]:
        if self._admitted.total >= self._max_admitted:
            raise TooManyRequests(
                f"{self._admitted.total} requests wait for an answer already; try again after a pause."
            )
        share = (self._max_admitted + 1) // 2
        if self._admitted.of(account_id) >= share:
            raise LimitReached(
                f"The account has {share} requests that wait for an answer, half of all that may; wait for "
                "one of them."
            )
        with self._admitted.one_more(account_id):
            yield

    @asynccontextmanager
    async def _files(self, model_id: str, artifact: Artifact | None) -> AsyncIterator[ModelFiles]:
        if artifact is None:
            entry = self._entries[model_id]
            yield ModelFiles(entry.id, await self._pulled(entry), entry.context_length)
            return
        tuned_from = self._entries.get(artifact.base_model)
        if tuned_from is None:
            raise Unavailable(
                f"The model {model_id!r} was tuned from {artifact.base_model!r}, which is no longer in this "
                "installation's catalog of base models."
            )
        async with self._fetched(model_id, artifact) as folder:
            if artifact.is_adapter:
                base_dir = await self._pulled(tuned_from)
                yield ModelFiles(tuned_from.id, base_dir, tuned_from.context_length, artifact.key, folder)
            else:
                yield ModelFiles(artifact.key, folder, tuned_from.context_length)

    @asynccontextmanager
    async def _fetched(self, model_id: str, artifact: Artifact) -> AsyncIterator[Path]:
        try:
            async with self._cache.use(artifact) as folder:
                yield folder
        except NotFound as error:
            # Deleted since it was found.
            log.warning("a model has no files", model=model_id, prefix=artifact.object_prefix)
            raise _no_such_model(model_id) from error

    async def _pulled(self, entry: BaseModelEntry) -> Path:
        try:
            if is_pulled(entry, self._models_dir):
                return base_model_dir(entry, self._models_dir)
            return await self._pulls.run(entry.id, lambda: asyncio.to_thread(pull, entry, self._models_dir))
        except PullError as error:
            log.warning("a base model can't be fetched", model=entry.id, cause=str(error))
            raise Unavailable(
                f"The base model {entry.id!r} is not on this machine and can't be fetched: {error}"
            ) from error


def _no_such_model(model_id: str) -> NotFound:
    return NotFound(
        f"There is no model {model_id!r}: it is no base model and none of your fine-tuned models, or it "
        "was deleted. GET /api/v1/fine-tuning/models lists yours, GET /api/v1/fine-tuning/base-models the "
        "base models.",
        field="model",
    )
