"""How the streams of a key that was taken back end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from unittest.mock import Mock

import pytest

from svc_kit import open_streams
from svc_kit.errors import Unauthenticated
from svc_kit.identity import Identity, set_current_identity
from svc_kit.open_streams import OpenStreams
from tunery.account.v1 import key_service_pb2


async def test_a_stream_that_is_slow_to_end_is_ended_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that still reads from a slow store, while its key is looked for again."""
    monkeypatch.setattr(open_streams, "_POLL_SECONDS", 0.01)
    num_polls, is_released = 0, asyncio.Event()

    async def find_revoked_keys(request: Any, **_: Any) -> Any:
        nonlocal num_polls
        num_polls += 1
        return key_service_pb2.FindRevokedKeysResponse(revoked=request.keys)

    async def responses() -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            await is_released.wait()

    streams = OpenStreams(Mock(), Mock())
    monkeypatch.setattr(streams, "_keys", Mock(FindRevokedKeys=find_revoked_keys))
    set_current_identity(Identity(kind="account", subject="acct", key_id="key"))

    async def read() -> None:
        async for _ in streams.guard(responses()):
            pass

    reading, looking = asyncio.create_task(read()), asyncio.create_task(streams.run())
    async with asyncio.timeout(20):
        while num_polls < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        is_released.set()
        with pytest.raises(Unauthenticated):
            await reading
    assert not looking.done()
    looking.cancel()
    await asyncio.gather(looking, return_exceptions=True)
