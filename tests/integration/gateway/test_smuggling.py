"""Requests that two readers could read in two ways: they are refused, and no part of one is taken for one."""

from __future__ import annotations

import asyncio

import pytest

from tests.integration.gateway.raw_http import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    exchange,
    exchange_h2,
    frame,
    header_block,
    request,
)
from tests.integration.gateway.stack import FIRST_KEY, Gateway
from tests.integration.gateway.upstreams import Upstreams

pytestmark = pytest.mark.asyncio(loop_scope="session")

KEY = f"authorization: Bearer {FIRST_KEY}"
JOBS = "/api/v1/fine-tuning/jobs"
HIDDEN = f"DELETE /api/v1/fine-tuning/datasets/ds-1 HTTP/1.1\r\nhost: x\r\n{KEY}\r\n\r\n"


@pytest.mark.parametrize(
    "framing",
    [
        "content-length: 5\r\ntransfer-encoding: chunked",
        "transfer-encoding: chunked\r\ncontent-length: 0",
        "content-length: 0\r\ncontent-length: 5",
        "content-length: 0, 5",
        "content-length: -1",
        "content-length: +5",
        "content-length: 5 5",
        "content-length: 0x5",
        "content-length: 99999999999999999999",
        "transfer-encoding: xchunked",
        "transfer-encoding: chunked, identity",
        "transfer-encoding: identity, chunked\r\ncontent-length: 5",
        "transfer-encoding: chunked\r\ntransfer-encoding: identity",
        "transfer-encoding:\x0bchunked",
        "transfer-encoding : chunked",
        "content-length\x00: 5",
        "x: a\x00b",
    ],
)
async def test_a_body_whose_end_is_in_doubt(gateway: Gateway, upstreams: Upstreams, framing: str) -> None:
    head = f"POST {JOBS} HTTP/1.1\r\nhost: x\r\n{KEY}\r\nconnection: close\r\n{framing}\r\n\r\n"

    answer = await exchange(gateway, f"{head}0\r\n\r\n{HIDDEN}".encode("latin-1"))

    assert 400 <= answer.status < 600, answer
    assert upstreams.calls == []


@pytest.mark.parametrize(
    "header", [" transfer-encoding: chunked", "x: 1\rcontent-length: 5", "x:\r\n folded"]
)
async def test_a_header_that_is_folded_ends_nothing(
    gateway: Gateway, upstreams: Upstreams, header: str
) -> None:
    """Envoy takes it for a part of the value before, and the request for one without a body."""
    head = f"POST {JOBS} HTTP/1.1\r\nhost: x\r\n{KEY}\r\nconnection: close\r\n{header}\r\n\r\n"

    await exchange(gateway, f"{head}0\r\n\r\n{HIDDEN}".encode())

    assert [(call.method, call.request.data) for call in upstreams.calls] == [("CreateJobFromJson", b"")]


@pytest.mark.parametrize("chunk", ["x\r\n", "-1\r\n", "0x1\r\nx\r\n", "FFFFFFFFFFFFFFFFF\r\n", "1\nx\n"])
async def test_a_chunk_that_is_none(gateway: Gateway, upstreams: Upstreams, chunk: str) -> None:
    head = (
        f"POST {JOBS} HTTP/1.1\r\nhost: x\r\n{KEY}\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
    )

    answer = await exchange(gateway, f"{head}{chunk}0\r\n\r\n{HIDDEN}".encode())

    assert answer.status == 400
    assert "DeleteDataset" not in {call.method for call in upstreams.calls}


async def test_a_request_in_a_body_is_none(gateway: Gateway, upstreams: Upstreams) -> None:
    body = HIDDEN.encode()

    answer = await request(gateway, f"POST {JOBS}", KEY, body=body)

    assert answer.status == 200
    assert [call.method for call in upstreams.calls] == ["CreateJobFromJson"]
    assert upstreams.last.request.data == body


async def test_a_key_is_good_for_its_own_request_alone(gateway: Gateway, upstreams: Upstreams) -> None:
    first = f"GET {JOBS} HTTP/1.1\r\nhost: x\r\n{KEY}\r\n\r\n"
    second = f"GET {JOBS} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"

    answer = await exchange(gateway, (first + second).encode())

    assert answer.status == 200
    assert b"HTTP/1.1 401" in answer.body
    assert len(upstreams.calls) == 1


@pytest.mark.parametrize(
    "line",
    [
        f"GET http://x{JOBS}/..%2f..%2fcredits HTTP/1.1",
        f"GET {JOBS} HTTP/2.0",
        f"GET {JOBS} HTTP/0.9",
        f"GET {JOBS} HTTP/1.1 x",
        f"GET {JOBS}\x00 HTTP/1.1",
        f"G\x00T {JOBS} HTTP/1.1",
        f"CONNECT {JOBS} HTTP/1.1",
        "GET HTTP/1.1",
    ],
)
async def test_a_request_line_that_is_none(gateway: Gateway, upstreams: Upstreams, line: str) -> None:
    answer = await exchange(
        gateway, f"{line}\r\nhost: x\r\n{KEY}\r\nconnection: close\r\n\r\n".encode("latin-1")
    )

    assert 400 <= answer.status < 600
    assert upstreams.calls == []


RIGHT = [(":method", "GET"), (":scheme", "http"), (":path", JOBS), (":authority", "x")]
AUTHORIZATION = ("authorization", f"Bearer {FIRST_KEY}")


async def test_http2_by_hand_is_understood(gateway: Gateway, upstreams: Upstreams) -> None:
    """Or those below would show nothing."""
    block = header_block([*RIGHT, AUTHORIZATION])

    await exchange_h2(gateway, frame(HEADERS, END_HEADERS | END_STREAM, 1, block))

    assert [call.method for call in upstreams.calls] == ["ListJobs"]


@pytest.mark.parametrize(
    "headers",
    [
        [*RIGHT[:2], *RIGHT[3:], AUTHORIZATION],
        [*RIGHT[1:], AUTHORIZATION],
        [*RIGHT, (":path", "/healthz"), AUTHORIZATION],
        [(":path", "/healthz"), *RIGHT, AUTHORIZATION],
        [*RIGHT, (":method", "DELETE"), AUTHORIZATION],
        [*RIGHT[:3], AUTHORIZATION, RIGHT[3]],
        [*RIGHT, (":status", "200"), AUTHORIZATION],
        [*RIGHT, (":x", "1"), AUTHORIZATION],
        [*RIGHT, ("transfer-encoding", "chunked"), AUTHORIZATION],
        [*RIGHT, ("connection", "x-account-id"), AUTHORIZATION],
        [*RIGHT, ("upgrade", "websocket"), AUTHORIZATION],
        [*RIGHT, ("te", "gzip"), AUTHORIZATION],
        [*RIGHT, ("Authorization", f"Bearer {FIRST_KEY}")],
        [*RIGHT, AUTHORIZATION, AUTHORIZATION],
        [*RIGHT, AUTHORIZATION, ("authorization", "Bearer x")],
        [*RIGHT, AUTHORIZATION, ("x", "a\r\nb: c")],
        [*RIGHT, AUTHORIZATION, ("x\r\ny", "z")],
        [*RIGHT, AUTHORIZATION, ("x", "a\0b")],
        [*RIGHT, AUTHORIZATION, ("", "x")],
        [*RIGHT, AUTHORIZATION, ("content-length", "5")],
        [*RIGHT[:2], (":path", f"{JOBS} HTTP/1.1\r\nx: y"), RIGHT[3], AUTHORIZATION],
        [*RIGHT[:2], (":path", ""), RIGHT[3], AUTHORIZATION],
        [*RIGHT[:2], (":path", JOBS[1:]), RIGHT[3], AUTHORIZATION],
        [*RIGHT[:2], (":path", f"{JOBS}\0"), RIGHT[3], AUTHORIZATION],
        [(":method", "CONNECT"), (":protocol", "websocket"), *RIGHT[1:], AUTHORIZATION],
        [(":method", "GET\0"), *RIGHT[1:], AUTHORIZATION],
    ],
    ids=lambda headers: repr(headers[-3:])[:80],
)
async def test_headers_of_http2_that_are_none(
    gateway: Gateway, upstreams: Upstreams, headers: list[tuple[str, str]]
) -> None:
    answers = await exchange_h2(gateway, frame(HEADERS, END_HEADERS | END_STREAM, 1, header_block(headers)))

    assert upstreams.calls == []
    # 0x88 is `:status: 200` in HPACK.
    assert not [payload for kind, payload in answers if kind == HEADERS and payload[:1] == b"\x88"]


@pytest.mark.parametrize(
    "frames",
    [
        # The length that is announced isn't the body's.
        [
            frame(
                HEADERS,
                END_HEADERS,
                1,
                header_block([("content-length", "1")]),
            ),
            frame(DATA, END_STREAM, 1, b"{}" * 50),
        ],
        # Headers that another stream's frame interrupts.
        [
            frame(HEADERS, END_STREAM, 1, header_block([*RIGHT, AUTHORIZATION])),
            frame(HEADERS, END_HEADERS | END_STREAM, 3, header_block([*RIGHT, AUTHORIZATION])),
        ],
        # A stream that the server would open, and one that is over.
        [frame(HEADERS, END_HEADERS | END_STREAM, 2, header_block([*RIGHT, AUTHORIZATION]))],
        [frame(CONTINUATION, END_HEADERS, 1, header_block([*RIGHT, AUTHORIZATION]))],
    ],
)
async def test_frames_in_a_wrong_order(gateway: Gateway, upstreams: Upstreams, frames: list[bytes]) -> None:
    await exchange_h2(gateway, *frames)

    assert upstreams.calls == []


async def test_many_resets_do_no_harm(gateway: Gateway, upstreams: Upstreams) -> None:
    """Rapid resets (CVE-2023-44487), and a client that is well meanwhile."""
    block = header_block([*RIGHT, AUTHORIZATION])
    opened = b"".join(
        frame(HEADERS, END_HEADERS | END_STREAM, stream, block) + frame(3, 0, stream, b"\0\0\0\x08")
        for stream in range(1, 2001, 2)
    )

    flood = asyncio.create_task(exchange_h2(gateway, opened))
    answers = [(await gateway.client.get("/healthz")).status_code for _ in range(5)]
    await flood

    assert answers == [200] * 5
