"""Stands between the services and the S3 server: holds an answer back, answers 503, or lets all hang."""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

_CHUNK_BYTES = 65536
_REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"

Mode = Literal["pass", "refuse", "hang"]


@dataclass
class Hold:
    """The first answer to a request that matches `pattern`: it comes from S3, and is kept back for a while.

    Attributes:
        pattern: found in `METHOD /bucket/key?query`.
        reached: set when S3 has answered.
        released: the answer goes on once this is set.
    """

    pattern: str
    reached: threading.Event = field(default_factory=threading.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)
    is_taken: bool = False


class S3Proxy:
    """A proxy in a thread of its own. It knows as much of HTTP/1.1 as S3's SDK makes use of."""

    def __init__(self, port: int, s3_port: int) -> None:
        self.endpoint = f"http://127.0.0.1:{port}"
        self._port, self._s3_port = port, s3_port
        self._loop = asyncio.new_event_loop()
        self._stopped = asyncio.Event()
        self._mode: Mode = "pass"
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._holds: list[Hold] = []
        self._thread = threading.Thread(target=self._run, name="s3-proxy", daemon=True)

    def start(self) -> None:
        """Listens, and returns at once."""
        self._thread.start()

    def stop(self) -> None:
        """Breaks every connection."""
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()

    def set_mode(self, mode: Mode) -> None:
        """Answers like this from now on; what hung goes on where it was."""
        self._loop.call_soon_threadsafe(self._change, mode)

    def _change(self, mode: Mode) -> None:
        self._mode = mode
        self._flowing.clear() if mode == "hang" else self._flowing.set()

    @contextlib.contextmanager
    def hold(self, pattern: str) -> Iterator[Hold]:
        """Holds one answer until the block's end."""
        hold = Hold(pattern)
        self._holds.append(hold)
        try:
            yield hold
        finally:
            self._holds.remove(hold)
            self._loop.call_soon_threadsafe(hold.released.set)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve_until_stopped())

    async def _serve_until_stopped(self) -> None:
        server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        await self._stopped.wait()
        server.close()

    async def _serve(self, client: asyncio.StreamReader, answers: asyncio.StreamWriter) -> None:
        # Python 3.11 calls it an error when such a callback is cancelled.
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            try:
                s3_answers, s3 = await asyncio.open_connection("127.0.0.1", self._s3_port)
                connection = _Connection(self, answers, s3_answers)
                returning = asyncio.create_task(connection.return_answers())
                try:
                    while await self._pass_request(client, answers, s3, connection):
                        pass
                finally:
                    s3.close()
                    await returning
            finally:
                answers.close()

    async def _pass_request(
        self,
        client: asyncio.StreamReader,
        answers: asyncio.StreamWriter,
        s3: asyncio.StreamWriter,
        connection: _Connection,
    ) -> bool:
        """Returns whether the connection may be used again."""
        head = await client.readuntil(b"\r\n\r\n")
        await self._flowing.wait()
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        left = int(length[1]) if length else 0
        is_refused = self._mode == "refuse"
        if not is_refused:
            connection.hold = self._hold_of(head.decode("latin-1"))
            s3.write(head)
        while left:
            chunk = await client.read(min(left, _CHUNK_BYTES))
            if not chunk:
                return False
            left -= len(chunk)
            if not is_refused:
                await self._flowing.wait()
                s3.write(chunk)
                await s3.drain()
        if is_refused:
            answers.write(_REFUSAL)
            await answers.drain()
        return not is_refused

    def _hold_of(self, head: str) -> Hold | None:
        request = head.split(" HTTP/", 1)[0]
        for hold in self._holds:
            if not hold.is_taken and re.search(hold.pattern, request):
                hold.is_taken = True
                return hold
        return None

    async def let_through(self) -> None:
        """Waits while all hangs."""
        await self._flowing.wait()


class _Connection:
    """The way back from S3 on one connection."""

    def __init__(self, proxy: S3Proxy, client: asyncio.StreamWriter, s3: asyncio.StreamReader) -> None:
        self._proxy, self._client, self._s3 = proxy, client, s3
        self.hold: Hold | None = None

    async def return_answers(self) -> None:
        with contextlib.suppress(OSError):
            while chunk := await self._s3.read(_CHUNK_BYTES):
                if self.hold is not None:
                    self.hold.reached.set()
                    await self.hold.released.wait()
                    self.hold = None
                await self._proxy.let_through()
                self._client.write(chunk)
                await self._client.drain()
        self._client.close()
