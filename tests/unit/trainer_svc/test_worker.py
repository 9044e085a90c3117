"""What a worker finds when it starts, and what it does after attempts that failed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest

from svc_kit.errors import LeaseLost
from trainer_svc import worker as worker_module
from trainer_svc.event_spool import SPOOL_FILE, EventSpool
from trainer_svc.worker import Worker
from tunery.trainer.v1 import worker_service_pb2 as worker_pb2

LEASE = worker_pb2.Lease(job_id="job-a", lease_token="lease-a")


@pytest.fixture
def client() -> AsyncMock:
    return AsyncMock()


@pytest.fixture
def worker(client: AsyncMock, tmp_path: Path) -> Worker:
    probes = Mock(all=list)
    return Worker("trainer", client, Mock(), Mock(), tmp_path, probes, tmp_path / "work", 1)


def spool_of(worker: Worker, content: bytes | None = None) -> Path:
    path = worker._work_dir / "job-a" / SPOOL_FILE
    path.parent.mkdir(parents=True)
    if content is None:
        spool = EventSpool.create(path, LEASE)
        spool.add(worker_pb2.Event(seq=7, kind="log", message="the last words"))
        spool.close()
    else:
        path.write_bytes(content)
    return path


async def test_what_a_killed_trainer_had_not_sent_is_sent(worker: Worker, client: AsyncMock) -> None:
    spool_of(worker)
    await worker._clear_work_dir()
    [sent] = client.call_until_answered.call_args_list
    assert [event.seq for event in sent.args[1].events] == [7]
    client.end_attempt.assert_not_called()
    assert not worker._work_dir.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"\0\0\0", b'{"jobId": "job-a"}\n\0\0\0\n', b'{"no": 1}\n'])
async def test_a_damaged_spool_keeps_no_trainer_from_starting(
    content: bytes, worker: Worker, client: AsyncMock
) -> None:
    """Of a machine that lost its power, or a disk that was full."""
    spool_of(worker, content)
    await worker._clear_work_dir()
    client.call_until_answered.assert_not_called()
    assert not worker._work_dir.exists()


async def test_the_end_of_a_killed_run_whose_lease_is_lost_is_told(worker: Worker, client: AsyncMock) -> None:
    """Its job may have been swept before the last thing that it stored."""
    spool_of(worker)
    client.call_until_answered.side_effect = LeaseLost("lost")
    await worker._clear_work_dir()
    [told] = client.end_attempt.call_args_list
    assert (told.args[0].job_id, told.args[0].lease_token) == ("job-a", "lease-a")
    assert told.kwargs["handed_back"].reason == "the run was stopped"


async def test_pauses_grow_while_attempts_fail_here(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = [True, True, True, False, True, *[True] * 9]
    attempt: Any = Mock(return_value=Mock(run=AsyncMock(side_effect=outcomes)))
    pauses = AsyncMock()
    monkeypatch.setattr(worker_module, "Attempt", attempt)
    monkeypatch.setattr(asyncio, "sleep", pauses)
    for _ in outcomes:
        await worker._attempt(LEASE)
    assert [call.args[0] for call in pauses.call_args_list] == [1, 2, 4, 1, 2, 4, 8, 16, *[30] * 5]


async def test_a_folder_that_cant_be_made_is_no_endless_loop(
    worker: Worker, client: AsyncMock, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses = AsyncMock()
    monkeypatch.setattr(worker_module, "Attempt", Mock(side_effect=FileExistsError(17, "File exists")))
    monkeypatch.setattr(asyncio, "sleep", pauses)
    for _ in range(3):
        await worker._attempt(LEASE)
    assert [call.args[0] for call in pauses.call_args_list] == [1, 2, 4]
    assert len(client.end_attempt.call_args_list) == 3


def test_a_spool_on_a_full_disk_closes(tmp_path: Path) -> None:
    """What it refused was told when it was added; its end must not end the trainer."""
    spool = EventSpool.create(tmp_path / SPOOL_FILE, LEASE)
    spool._writer.close()
    spool._writer = open("/dev/full", "ab")  # noqa: SIM115  # the spool closes it
    with pytest.raises(OSError, match="No space left"):
        spool.add(worker_pb2.Event(seq=1, kind="log", message="x"))
    spool.close()
    assert spool._writer.closed
