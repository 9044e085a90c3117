"""What callers that leave midway leave behind: nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest

from dataset_svc import dataset_reports
from dataset_svc.dataset_reports import DatasetReports, ReportRequest
from dataset_svc.uploads import Uploads
from svc_kit.cancellation import see_through
from svc_kit.errors import LimitReached, NotFound

REFUSED_FORM = "".join(
    f'--b\r\nContent-Disposition: form-data; name="{name}"; filename="rows.csv"\r\n\r\nq,a\r\n1,2\r\n\r\n'
    for name in ("file", "unknown")
)


async def test_a_report_on_a_dataset_deleted_meanwhile_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored: set[str] = set()
    is_storing, may_store = asyncio.Event(), asyncio.Event()
    dataset = Mock(id="ds", object_key="accounts/a/datasets/ds", format="jsonl", columns=[])

    async def put_file(key: str, _: Path) -> None:
        async def store() -> None:
            is_storing.set()
            await may_store.wait()
            stored.add(key)

        await see_through(store())

    async def delete(key: str) -> None:
        stored.remove(key)

    async def not_kept(_: str) -> AsyncIterator[bytes]:
        raise NotFound("There is no such object.")
        yield b""

    async def get_file(_: str, path: Path) -> None:
        path.touch()

    datasets = Mock(get=AsyncMock(return_value=dataset))
    store = Mock(read_chunks=not_kept, get_file=get_file, put_file=put_file, delete=delete)
    entry = Mock(id="model", source="source", revision=None, context_length=100)
    reports = DatasetReports(datasets, store, Mock(get=lambda _: entry), tmp_path, None)
    monkeypatch.setattr(reports, "_fetch", AsyncMock())
    monkeypatch.setattr(reports, "_measure", AsyncMock(return_value={}))
    monkeypatch.setattr(dataset_reports, "_report", lambda *_: {})
    asking = asyncio.create_task(reports.get("a", ReportRequest("ds", None, None, None)))
    await is_storing.wait()
    datasets.get.side_effect = NotFound("There is no dataset ds.")

    asking.cancel()
    await asyncio.sleep(0)
    may_store.set()

    with pytest.raises(asyncio.CancelledError):
        await asking
    assert stored == set()


async def test_a_refused_upload_is_discarded_though_its_sender_leaves() -> None:
    is_discarding, is_discarded = asyncio.Event(), asyncio.Event()

    async def discard(_: str) -> None:
        is_discarding.set()
        await asyncio.sleep(0)
        is_discarded.set()

    def put_stream(_: str, stream: Any) -> None:
        while stream.read(1000):
            pass

    async def chunks() -> AsyncIterator[bytes]:
        yield REFUSED_FORM.encode()

    row = Mock(id="ds", object_key="key", account_id="a", format="csv")
    datasets = Mock(begin=AsyncMock(return_value=row), discard=discard)
    uploads = Uploads(datasets, Mock(put_stream=put_stream), 10**6, 16)
    form = "multipart/form-data; boundary=b"
    uploading = asyncio.create_task(uploads.take_form("a", "csv", form, chunks(), None))
    await is_discarding.wait()

    uploading.cancel()

    with pytest.raises(asyncio.CancelledError):
        await uploading
    async with asyncio.timeout(5):
        await is_discarded.wait()


async def test_an_account_with_many_reports_keeps_no_other_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def not_kept(_: str) -> AsyncIterator[bytes]:
        raise NotFound("There is no such object.")
        yield b""

    dataset = Mock(id="ds", object_key="accounts/a/datasets/ds", format="jsonl", columns=[])
    entry = Mock(id="model", source="source", revision=None, context_length=100)
    store = Mock(read_chunks=not_kept)
    reports = DatasetReports(
        Mock(get=AsyncMock(return_value=dataset)), store, Mock(get=lambda _: entry), tmp_path, None
    )
    may_fetch = asyncio.Event()
    monkeypatch.setattr(reports, "_fetch", lambda _: may_fetch.wait())
    monkeypatch.setattr(reports, "_make", AsyncMock(return_value={}))
    requests = [ReportRequest("ds", None, None, length) for length in range(10, 20)]
    asking = [asyncio.create_task(reports.get("a", request)) for request in requests]
    other = asyncio.create_task(reports.get("b", requests[0]))

    async with asyncio.timeout(5):
        done, _ = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
        while len(done) < len(asking) - dataset_reports.MAX_OF_ACCOUNT:
            done, _ = await asyncio.wait(asking, timeout=0.01)
    may_fetch.set()

    answers = await asyncio.gather(*asking, return_exceptions=True)
    assert [type(answer) for answer in answers] == [dict] * 4 + [LimitReached] * 6
    assert await other == {}
