"""HTTP/1.1 and HTTP/2 by hand, for requests that no client library would send."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

from tests.integration.gateway.stack import Gateway

# HTTP/2: kinds of frames, and flags.
DATA, HEADERS, RESET, SETTINGS, GOAWAY, CONTINUATION = 0, 1, 3, 4, 7, 9
END_STREAM, END_HEADERS = 1, 4


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


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Returns a frame of HTTP/2 (RFC 9113, 4.1)."""
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def header_block(headers: list[tuple[str, str]]) -> bytes:
    """Returns headers, in HPACK (RFC 7541) without indexing and without Huffman's code."""

    def literal(text: str) -> bytes:
        content = text.encode("latin-1")
        assert len(content) < 127
        return bytes((len(content),)) + content

    return b"".join(b"\0" + literal(name) + literal(value) for name, value in headers)


async def exchange_h2(gateway: Gateway, *frames: bytes) -> list[tuple[int, bytes]]:
    """Sends frames over HTTP/2; returns kind and payload of those that come back until the first call's end.

    It ends with headers or data that end a stream, a reset, a GOAWAY, or the connection's end.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    answers = []
    try:
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0) + b"".join(frames))
        async with asyncio.timeout(20):
            while head := await reader.read(9):
                head += await reader.readexactly(9 - len(head))
                payload = await reader.readexactly(int.from_bytes(head[:3], "big"))
                kind, flags = head[3], head[4]
                answers.append((kind, payload))
                if kind in (RESET, GOAWAY) or (kind in (DATA, HEADERS) and flags & END_STREAM):
                    break
    except (ConnectionError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    return answers
