"""HTTP/1.1 by hand, for requests that no client library would send."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from tests.integration.gateway.stack import Gateway


@dataclass(frozen=True)
class Answer:
    """An answer as it came.

    Attributes:
        status: the status.
        headers: by lower-case name; of a repeated one the last.
        body: as it came, chunk marks included.
    """

    status: int
    headers: dict[str, str]
    body: bytes


async def exchange(gateway: Gateway, request: bytes) -> Answer:
    """Sends bytes and reads until the gateway closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    try:
        writer.write(request)
        await writer.drain()
        async with asyncio.timeout(20):
            answer = await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return Answer(int(first.split()[1]), headers, body)


async def request(gateway: Gateway, line: str, *headers: str, body: bytes = b"") -> Answer:
    """Sends a request whose path and headers go out exactly as given."""
    length = (f"content-length: {len(body)}",) if body else ()
    head = "\r\n".join((f"{line} HTTP/1.1", "host: tunery", "connection: close", *headers, *length))
    return await exchange(gateway, f"{head}\r\n\r\n".encode("latin-1") + body)
