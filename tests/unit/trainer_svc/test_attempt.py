"""Which checkpoints stay on a trainer's disk, and what becomes of one that can't be stored."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from unittest.mock import AsyncMock, Mock

import pytest

from svc_kit.errors import LeaseLost
from trainer_svc.attempt import Attempt, with_newest
from tunery.trainer.v1 import worker_service_pb2 as worker_pb2

LEASE_SECONDS = 0.1


@pytest.mark.parametrize(
    ("steps", "step", "changed_at_step", "kept"),
    [
        ([], 4, 4, [4]),
        ([4], 8, 8, [4, 8]),
        ([4, 8], 12, 12, [8, 12]),
        # The weights of 12 are those of 8, and a run that diverges goes back to 4.
        ([4, 8], 12, 8, [4, 8, 12]),
        ([4, 8, 12], 16, 16, [12, 16]),
        # It went back.
        ([4, 8, 12], 4, 4, [4]),
        ([4, 8], 0, 0, [0]),
    ],
)
def test_what_the_engine_may_go_back_to_is_kept(
    steps: list[int], step: int, changed_at_step: int, kept: list[int]
) -> None:
    old = [(each, Path(f"step-{each}")) for each in steps]
    newest = Path("newest")
    found = with_newest(old, step, newest, changed_at_step)
    assert [each for each, _ in found] == kept
    assert found[-1] == (step, newest)


async def write_a_checkpoint_and_go_on(attempt: Attempt) -> worker_pb2.Completed:
    """A run that has no end of its own."""
    attempt._transfers.put_nowait(partial(attempt._store_checkpoint, {"path": "checkpoints/epoch-1"}))
    await asyncio.Event().wait()
    raise AssertionError


@pytest.mark.parametrize("moment", ["killing", "telling", "waiting for job_svc"])
async def test_what_came_of_a_run_is_told_though_the_trainer_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    lease = worker_pb2.Lease(job_id="job-a", lease_token="lease-a", lease_seconds=60)
    client = AsyncMock()
    attempt = Attempt(lease, client, Mock(), Mock(), tmp_path, Mock(), tmp_path / "run", 1)
    is_at_it, told = asyncio.Event(), []

    async def kill() -> None:
        if moment == "killing":
            is_at_it.set()
            await asyncio.sleep(0.1)

    async def end_attempt(_: worker_pb2.Lease, **outcome: worker_pb2.Completed) -> None:
        is_at_it.set()
        await asyncio.sleep(0.1)
        if moment == "waiting for job_svc":
            await asyncio.Event().wait()
        told.append(outcome["completed"])

    client.end_attempt = end_attempt
    monkeypatch.setattr(attempt, "_process", Mock(kill=kill))
    monkeypatch.setattr(attempt, "_train", AsyncMock(return_value=worker_pb2.Completed(steps=3)))
    running = asyncio.create_task(attempt.run())
    await is_at_it.wait()

    running.cancel()

    async with asyncio.timeout(20):
        with pytest.raises(asyncio.CancelledError):
            await running
    assert told == ([] if moment == "waiting for job_svc" else [worker_pb2.Completed(steps=3)])


async def test_a_checkpoint_that_can_not_be_stored_ends_the_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, and not only when the run is done."""
    store = Mock(put_folder=AsyncMock(side_effect=ValueError("no such bucket")))
    lease = worker_pb2.Lease(job_id="job-a", lease_token="lease-a", lease_seconds=60)
    client = AsyncMock()
    attempt = Attempt(lease, client, store, Mock(), tmp_path, Mock(), tmp_path / "run", 1)

    monkeypatch.setattr(attempt, "_train", partial(write_a_checkpoint_and_go_on, attempt))

    async with asyncio.timeout(20):
        await attempt.run()

    failed = client.end_attempt.call_args.kwargs["failed"]
    assert failed.fault == "platform"
    assert "no such bucket" in failed.message


async def test_nothing_is_stored_once_the_lease_may_be_anothers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store knows no leases: a trainer that stood still asks first, and hears that its own is lost."""
    num_renewals, stored = 0, []

    async def call(method: str, _: worker_pb2.RenewLeaseRequest) -> None:
        nonlocal num_renewals
        assert method == "RenewLease"
        num_renewals += 1
        if num_renewals > 1:
            raise LeaseLost("lost")

    async def put_folder(_prefix: str, _folder: Path, before_each: Callable[[], Awaitable[None]]) -> None:
        for name in ("first", "second", "third"):
            await before_each()
            stored.append(name)
            await asyncio.sleep(2 * LEASE_SECONDS)  # the trainer stands still

    lease = worker_pb2.Lease(job_id="job-a", lease_token="lease-a", lease_seconds=LEASE_SECONDS)
    client = AsyncMock(call_until_answered=call)
    attempt = Attempt(
        lease, client, Mock(put_folder=put_folder), Mock(), tmp_path, Mock(), tmp_path / "run", 1
    )

    monkeypatch.setattr(attempt, "_train", partial(write_a_checkpoint_and_go_on, attempt))
    async with asyncio.timeout(20):
        await attempt.run()
    assert stored == ["first"]
    assert client.end_attempt.call_args.kwargs["handed_back"].reason == "the run was stopped"
