"""Work that several requests wait for and none of them may stop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Result = TypeVar("Result")


class SharedCalls(Generic[Result]):
    """Runs one call per key at a time; those who ask for it meanwhile wait for the same one.

    A caller that is cancelled leaves; the call goes on for the others, or for the next who asks. So a
    client with a short deadline doesn't start a long download anew each time.
    """

    def __init__(self) -> None:
        self._running: dict[str, asyncio.Task[Result]] = {}

    async def run(self, key: str, call: Callable[[], Awaitable[Result]]) -> Result:
        """Returns what `call` returns, or what the one that runs already returns; raises alike."""
        task = self._running.get(key)
        if task is None:
            task = asyncio.create_task(self._call(key, call))
            self._running[key] = task
        return await asyncio.shield(task)

    async def _call(self, key: str, call: Callable[[], Awaitable[Result]]) -> Result:
        try:
            return await call()
        finally:
            del self._running[key]

    async def close(self) -> None:
        """Cancels what runs and waits for its end."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
