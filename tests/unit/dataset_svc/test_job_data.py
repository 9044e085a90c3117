"""Which rows are drawn for validation, and what stays of a job that is cancelled meanwhile."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from unittest.mock import AsyncMock, Mock

import pytest
from minio.error import MinioException

from dataset_svc.job_data import TRAINING, DataFile, DataRequest, JobData, PreparedData, _select


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
