"""Which rows are drawn for validation, and what stays of a job that is cancelled meanwhile."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from unittest.mock import AsyncMock, MagicMock, Mock

import pytest
from minio.error import MinioException

from dataset_svc import job_data
from dataset_svc.job_data import TRAINING, DataFile, DataRequest, JobData, PreparedData, _select
from dataset_svc.training_rows import CheckedRow


@pytest.mark.parametrize(("num_drawn", "num_rows"), [(1, 2), (3, 10), (99, 100), (500, 1000)])
def test_exactly_as_many_as_asked_for_are_drawn(num_drawn: int, num_rows: int) -> None:
    for seed in range(20):
        drawn = list(_select(random.Random(seed), num_drawn, num_rows))
        assert (len(drawn), sum(drawn)) == (num_rows, num_drawn)
        assert drawn == list(_select(random.Random(seed), num_drawn, num_rows))


def test_every_row_is_as_likely_as_another() -> None:
    counts = [0] * 10
    for seed in range(2000):
        for index, is_drawn in enumerate(_select(random.Random(seed), 3, 10)):
            counts[index] += is_drawn
    assert all(500 < count < 700 for count in counts)


async def test_rows_of_a_cancelled_job_are_not_read_to_their_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread is one of a few, which all calls to the store need."""
    num_rows, num_read = 200_000, 0
    is_reading, loop = asyncio.Event(), asyncio.get_running_loop()

    def examples(_: BinaryIO) -> Iterator[CheckedRow]:
        nonlocal num_read
        for num_read in range(num_rows):
            if num_read == 0:
                loop.call_soon_threadsafe(is_reading.set)
            yield CheckedRow(num_read + 1, {"dialog": []}, [])

    async def fetch(_account_id: str, _uri: str, path: Path) -> str:
        path.touch()
        return "jsonl"

    monkeypatch.setattr(job_data, "iter_dialog_examples", examples)
    data = JobData(Mock(fetch=fetch), Mock(), AsyncMock(), MagicMock(), tmp_path)
    request = DataRequest("acct", "job-a", "dataset://ds", None, None, 0, 0, "tunery-tiny")
    monkeypatch.setattr(job_data, "base_model_dir", lambda *_: tmp_path)
    preparing = asyncio.create_task(data.prepare(request))
    await is_reading.wait()

    preparing.cancel()

    with pytest.raises(asyncio.CancelledError):
        await preparing
    num_read_until_then = num_read
    assert num_read_until_then < num_rows - 1
    await asyncio.sleep(0.05)
    assert num_read == num_read_until_then


@pytest.mark.parametrize("num_bad_rows", [0, 1])
async def test_what_still_reaches_the_store_of_a_cancelled_job_is_removed(
    num_bad_rows: int, tmp_path: Path
) -> None:
    """Its job may have been swept before: the store took long, or this process stood still."""
    store = Mock(
        put_file=AsyncMock(side_effect=asyncio.CancelledError),
        delete_prefix=AsyncMock(side_effect=[MinioException("away for a moment"), None]),
    )
    data = JobData(Mock(), Mock(), store, Mock(), tmp_path)
    request = DataRequest("acct", "job-a", "dataset://ds", None, "qa", 0, 0, "tunery-tiny")
    prepared = PreparedData({TRAINING: DataFile("", 1, 1, Mock())}, num_bad_rows=num_bad_rows)
    with pytest.raises(asyncio.CancelledError):
        await data._store_results(request, tmp_path, prepared)
    [put] = store.put_file.call_args_list
    [_, removal] = store.delete_prefix.call_args_list
    assert put.args[0].startswith(removal.args[0])
    # And nothing else: another try has a place of its own.
    assert removal.args[0].startswith("accounts/acct/jobs/job-a/data/")
    assert len(removal.args[0]) > len("accounts/acct/jobs/job-a/data/")


async def test_the_error_report_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of two bytes a row would fill the disk with what is wrong in each."""
    monkeypatch.setattr(job_data, "MAX_REPORTED_ROWS", 100)
    num_rows = 50 * job_data.MAX_REPORTED_ROWS

    async def fetch(_account_id: str, _uri: str, path: Path) -> str:
        path.write_bytes(b"x\n" * num_rows)
        return "jsonl"

    reports = []

    async def put_file(_key: str, path: Path) -> None:
        reports.append(path.read_text())

    data = JobData(Mock(fetch=fetch), Mock(), Mock(put_file=put_file), MagicMock(), tmp_path)
    request = DataRequest("acct", "job-a", "dataset://ds", None, None, 0, 0, "tunery-tiny")
    monkeypatch.setattr(job_data, "base_model_dir", lambda *_: tmp_path)

    prepared = await data.prepare(request)

    assert prepared.num_bad_rows == num_rows
    report = json.loads(reports[0])
    assert report["num_bad_rows"] == num_rows
    assert [row["line"] for row in report["rows"]] == list(range(1, job_data.MAX_REPORTED_ROWS + 1))
