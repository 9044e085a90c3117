"""Streams that go on, ended soon after the API key that they were opened with was taken back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any, TypeVar

import grpc
import structlog

from svc_kit.errors import Unauthenticated
from svc_kit.identity import Issuer, current_identity
from tunery.account.v1 import key_service_pb2, key_service_pb2_grpc

log = structlog.get_logger(__name__)

# With the question itself, well within the 5 seconds after which a key must open nothing any more.
_POLL_SECONDS = 2.0
_ANSWER_SECONDS = 2.0

_Response = TypeVar("_Response")


class OpenStreams:
    """The streams that accounts read from this process."""

    def __init__(self, authz: grpc.aio.Channel, issuer: Issuer) -> None:
        """Args:
        authz: who knows the keys.
        issuer: names this process to it.
        """
        self._keys = key_service_pb2_grpc.KeyServiceStub(authz)
        self._issuer = issuer
        self._streams: dict[tuple[str, str], set[_Stream]] = {}

    async def guard(self, responses: AsyncIterator[_Response]) -> AsyncIterator[_Response]:
        """Yields the responses to the current caller, until its key is taken back.

        Raises:
            Unauthenticated: it was.
        """
        identity = current_identity()
        if not identity.key_id:  # a process of the stack
            async for response in responses:
                yield response
            return
        key, stream = (identity.subject, identity.key_id), _Stream()
        self._streams.setdefault(key, set()).add(stream)
        try:
            async for response in stream.until_ended(responses):
                yield response
        finally:
            self._streams[key].discard(stream)
            if not self._streams[key]:
                del self._streams[key]

    async def run(self) -> None:
        """Looks for keys that were taken back, for ever. Streams go on while nobody can be asked."""
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            if self._streams:
                with suppress(grpc.aio.AioRpcError):
                    await self._end_those_of_revoked_keys()

    async def _end_those_of_revoked_keys(self) -> None:
        names = [
            key_service_pb2.KeyName(account_id=account_id, key_id=key_id)
            for account_id, key_id in self._streams
        ]
        answer = await self._keys.FindRevokedKeys(
            key_service_pb2.FindRevokedKeysRequest(keys=names),
            metadata=self._issuer.own_metadata(),
            timeout=_ANSWER_SECONDS,
        )
        for name in answer.revoked:
            streams = self._streams.get((name.account_id, name.key_id), set())
            log.info("a revoked key's streams end", account=name.account_id, streams=len(streams))
            for stream in streams:
                stream.end()


class _Stream:
    """One stream, and the wait for its next response."""

    def __init__(self) -> None:
        self._is_ended = False
        self._wait: asyncio.Timeout | None = None

    def end(self) -> None:
        # Once: a stream may take its time to end, and its timeout can't expire again meanwhile.
        if self._wait is not None and not self._is_ended:
            self._wait.reschedule(asyncio.get_running_loop().time())
        self._is_ended = True

    async def until_ended(self, responses: AsyncIterator[Any]) -> AsyncIterator[Any]:
        while True:
            try:
                async with asyncio.timeout(0 if self._is_ended else None) as self._wait:
                    response = await anext(responses)
            except StopAsyncIteration:
                return
            except TimeoutError:
                if not self._is_ended:
                    raise  # of the stream's own
                raise Unauthenticated("The API key that opened this stream was taken back.") from None
            finally:
                self._wait = None
            yield response
