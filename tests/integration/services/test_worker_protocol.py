"""Leases, events and the ends of attempts: the test is the trainer."""

from __future__ import annotations

import asyncio
import io
from typing import Any

import grpc
import pytest
from google.protobuf import json_format, struct_pb2, timestamp_pb2

from svc_kit.ids import new_id
from svc_kit.object_store import ObjectStore
from svc_kit.settings import ObjectStoreSettings
from tunery.job.v1 import fine_tuning_service_pb2, job_pb2, job_service_pb2, model_service_pb2
from tunery.trainer.v1 import worker_service_pb2 as worker_pb2

from .conftest import Metadata, Services

STEP = {
    "step": 1,
    "total_steps": 4,
    "epoch": 1,
    "loss": 2.5,
    "learning_rate": 1e-4,
    "tokens_trained": 100,
    "tokens_per_second": 50.0,
    "remaining_seconds": 6.0,
}
CHECKPOINT = {
    "epoch": 1,
    "step": 2,
    "ends_epoch": True,
    "tokens_trained": 200,
    "epochs_completed": 1,
}


def event(seq: int, kind: str = "log", **data: Any) -> worker_pb2.Event:
    time = timestamp_pb2.Timestamp()
    time.GetCurrentTime()
    struct = json_format.ParseDict(data, struct_pb2.Struct())
    return worker_pb2.Event(seq=seq, time=time, kind=kind, message=f"line {seq}", data=struct)


def checkpoint(lease: worker_pb2.Lease, seq: int | None = None, **changes: Any) -> worker_pb2.Event:
    prefix = f"{lease.attempt_prefix}checkpoints/epoch-1/"
    return event(seq or lease.next_seq, "checkpoint", **(CHECKPOINT | {"object_prefix": prefix} | changes))


async def report(services: Services, lease: worker_pb2.Lease, *events: worker_pb2.Event) -> None:
    request = worker_pb2.ReportEventsRequest(
        job_id=lease.job_id, lease_token=lease.lease_token, events=events
    )
    await services.worker.ReportEvents(request, metadata=services.process("trainer"))


async def renew(services: Services, lease: worker_pb2.Lease) -> None:
    request = worker_pb2.RenewLeaseRequest(job_id=lease.job_id, lease_token=lease.lease_token)
    await services.worker.RenewLease(request, metadata=services.process("trainer"))


async def end(services: Services, lease: worker_pb2.Lease, **outcome: Any) -> None:
    request = worker_pb2.EndAttemptRequest(job_id=lease.job_id, lease_token=lease.lease_token, **outcome)
    await services.worker.EndAttempt(request, metadata=services.process("trainer"))


def completed(lease: worker_pb2.Lease, tokens_trained: float = 400) -> worker_pb2.Completed:
    return worker_pb2.Completed(
        object_prefix=f"{lease.attempt_prefix}artifact/",
        training_loss=1.5,
        steps=4,
        epochs_completed=1,
        tokens_trained=tokens_trained,
    )


async def lease_of(services: Services, job: job_pb2.Job, trainer_id: str) -> worker_pb2.Lease:
    lease = await services.lease(trainer_id)
    assert lease is not None
    assert lease.job_id == job.id
    return lease


async def get(services: Services, account: Metadata, job: job_pb2.Job) -> job_pb2.Job:
    return await services.jobs.GetJob(job_service_pb2.GetJobRequest(job_id=job.id), metadata=account)


async def details(services: Services, account: Metadata, job: job_pb2.Job) -> job_pb2.JobDetails:
    request = job_service_pb2.GetJobDetailsRequest(job_id=job.id)
    return await services.jobs.GetJobDetails(request, metadata=account)


async def whole_log(services: Services, account: Metadata, job: job_pb2.Job) -> list[job_pb2.LogRecord]:
    request = job_service_pb2.TailLogsRequest(job_id=job.id)
    return [record async for record in services.jobs.TailLogs(request, metadata=account)]


async def refused(call: Any, code: grpc.StatusCode) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() == code
    return caught.value.details() or ""


async def test_a_run_from_lease_to_model(services: Services) -> None:
    account = services.account()
    job = await services.new_job(account, epochs=2, validation_split=0.2)
    lease = await lease_of(services, job, new_id("trainer"))
    assert lease.run.base_model == "tunery-tiny"
    assert lease.run.epochs == 2
    assert lease.HasField("validation_key")
    assert not lease.HasField("resume_prefix")
    running = await get(services, account, job)
    assert running.status == "running"
    assert not running.HasField("training_metrics")

    first = lease.next_seq
    await report(services, lease, event(first), event(first + 1, "step", **STEP))
    shown = await get(services, account, job)
    assert shown.training_metrics.training_loss == 2.5
    assert shown.training_metrics.steps_completed == 1
    more = await details(services, account, job)
    assert (more.total_steps, more.remaining_seconds, more.tokens_trained) == (4, 6.0, 100)

    await report(services, lease, checkpoint(lease, first + 2))
    await end(services, lease, completed=completed(lease))
    ended = await get(services, account, job)
    assert ended.status == "completed"
    assert ended.HasField("completed_at")
    listed = await services.models.ListFineTunedModels(
        model_service_pb2.ListFineTunedModelsRequest(), metadata=account
    )
    assert [model.id for model in listed.data] == [ended.fine_tuned_model]

    log = await whole_log(services, account, job)
    assert [record.seq for record in log] == list(range(1, len(log) + 1))
    assert log[-1].kind == "end"
    assert log[-1].message == "job completed: 4 steps, loss 1.5000"

    await end(services, lease, completed=completed(lease))  # repeated, as after a lost answer
    assert len(await whole_log(services, account, job)) == len(log)


async def test_reports_are_idempotent_and_without_gaps(services: Services) -> None:
    account = services.account()
    job = await services.new_job(account)
    lease = await lease_of(services, job, new_id("trainer"))
    first = lease.next_seq
    await report(services, lease, event(first), event(first + 1))
    await report(services, lease, event(first), event(first + 1))
    await report(services, lease, event(first + 1), event(first + 2))
    gap = report(services, lease, event(first + 5))
    assert f"seq {first + 3}" in await refused(gap, grpc.StatusCode.INVALID_ARGUMENT)
    incomplete = report(services, lease, event(first + 3, "step", step=1))
    await refused(incomplete, grpc.StatusCode.INVALID_ARGUMENT)
    await end(services, lease, failed=worker_pb2.Failed(message="bad rows", fault="job"))
    log = await whole_log(services, account, job)
    assert [record.message for record in log[first - 1 : -1]] == [f"line {first + i}" for i in range(3)]
    assert log[-1].message == "job failed: bad rows"
    failed = await details(services, account, job)
    assert (failed.error, failed.fault, failed.job.status) == ("bad rows", "job", "failed")


async def test_a_cancelled_job_shuts_its_trainer_out(services: Services) -> None:
    account = services.account()
    job = await services.new_job(account)
    lease = await lease_of(services, job, new_id("trainer"))
    await renew(services, lease)
    request = job_service_pb2.CancelJobRequest(job_id=job.id)
    assert (await services.jobs.CancelJob(request, metadata=account)).status == "cancelled"
    await refused(renew(services, lease), grpc.StatusCode.ABORTED)
    await refused(report(services, lease, event(lease.next_seq)), grpc.StatusCode.ABORTED)
    await refused(end(services, lease, completed=completed(lease)), grpc.StatusCode.ABORTED)
    again = services.jobs.CancelJob(request, metadata=account)
    assert "cancelled" in await refused(again, grpc.StatusCode.ABORTED)
    await end(services, lease, handed_back=worker_pb2.HandedBack(reason="stopped"))
    assert (await get(services, account, job)).status == "cancelled"
    assert (await whole_log(services, account, job))[-1].message == "job cancelled by its owner"


async def test_a_trainer_that_asks_again_has_lost_its_job(services: Services) -> None:
    account, trainer_id = services.account(), new_id("trainer")
    job = await services.new_job(account)
    lease = await lease_of(services, job, trainer_id)
    await report(services, lease, checkpoint(lease))
    again = await lease_of(services, job, trainer_id)
    assert again.lease_token != lease.lease_token
    assert again.attempt == 2
    assert again.resume_prefix == f"{lease.attempt_prefix}checkpoints/epoch-1/"
    await refused(report(services, lease, event(lease.next_seq + 1)), grpc.StatusCode.ABORTED)
    await end(services, again, completed=completed(again))


async def test_a_lapsed_lease_queues_the_job_again(services: Services) -> None:
    account = services.account()
    job = await services.new_job(account)
    lease = await lease_of(services, job, new_id("trainer"))
    # Nobody renews: the lease lapses after its 4 seconds, and another trainer gets the job.
    other = await services.lease(new_id("trainer"), wait_seconds=20)
    assert other is not None
    assert other.job_id == job.id
    await refused(renew(services, lease), grpc.StatusCode.ABORTED)
    await end(services, other, failed=worker_pb2.Failed(message="enough", fault="job"))
    messages = [record.message for record in await whole_log(services, account, job)]
    assert "the trainer was lost; job queued again" in messages


async def test_faults_of_the_platform_are_tried_again_up_to_a_limit(services: Services) -> None:
    account, trainer_id = services.account(), new_id("trainer")
    job = await services.new_job(account)
    fault = worker_pb2.Failed(message="the training process died", fault="platform")
    for _ in range(3):
        await end(services, await lease_of(services, job, trainer_id), failed=fault)
        assert (await get(services, account, job)).status == "queued"
    lease = await lease_of(services, job, trainer_id)
    # Progress: from here the faults are counted anew.
    await report(services, lease, checkpoint(lease))
    await end(services, lease, failed=fault)
    for _ in range(3):
        await end(services, await lease_of(services, job, trainer_id), failed=fault)
    assert (await get(services, account, job)).status == "failed"
    failed = await details(services, account, job)
    assert failed.fault == "platform"
    assert failed.attempts == 7


async def test_a_job_handed_back_is_queued_again(services: Services) -> None:
    account, trainer_id = services.account(), new_id("trainer")
    job = await services.new_job(account)
    for _ in range(5):  # no fault, so no limit
        lease = await lease_of(services, job, trainer_id)
        await end(services, lease, handed_back=worker_pb2.HandedBack(reason="the trainer was stopped"))
    lease = await lease_of(services, job, trainer_id)
    await end(services, lease, completed=completed(lease))


async def test_many_trainers_share_the_queue_without_sharing_a_job(services: Services) -> None:
    account = services.account()
    made = [await services.new_job(account) for _ in range(6)]
    # Two are left empty-handed, after less than the time in which an unrenewed lease lapses.
    leases = await asyncio.gather(*(services.lease(new_id("trainer"), 2.5) for _ in range(8)))
    given = [lease.job_id for lease in leases if lease is not None]
    assert sorted(given) == sorted(job.id for job in made)
    for lease in leases:
        if lease is not None:
            await end(services, lease, failed=worker_pb2.Failed(message="done", fault="job"))


async def test_followers_see_lines_as_they_come_and_resume(services: Services) -> None:
    account = services.account()
    job = await services.new_job(account)
    lease = await lease_of(services, job, new_id("trainer"))
    first = lease.next_seq
    follower = services.jobs.TailLogs(job_service_pb2.TailLogsRequest(job_id=job.id), metadata=account)
    before = [await follower.read() for _ in range(first - 1)]
    assert [record.seq for record in before] == list(range(1, first))
    for seq in range(first, first + 5):
        await report(services, lease, event(seq))
        record = await asyncio.wait_for(follower.read(), 5)
        assert record.seq == seq
    follower.cancel()
    resumed = services.jobs.TailLogs(
        job_service_pb2.TailLogsRequest(job_id=job.id, after_seq=first + 1), metadata=account
    )
    await end(services, lease, completed=completed(lease))
    assert [record.seq async for record in resumed] == list(range(first + 2, first + 6))
    for after_seq in (first + 5, first + 100):  # nothing will ever come: the stream ends at once
        request = job_service_pb2.TailLogsRequest(job_id=job.id, after_seq=after_seq)
        late = services.jobs.TailLogs(request, metadata=account)
        assert await asyncio.wait_for(anext(aiter(late), None), 5) is None


async def test_one_job_is_seen_through_both_contracts(services: Services) -> None:
    account = services.account()
    job = await services.new_job(account, epochs=2)
    lease = await lease_of(services, job, new_id("trainer"))
    await report(services, lease, checkpoint(lease))
    request = fine_tuning_service_pb2.GetJobStatusRequest(job_id=job.id)
    seen = await services.fine_tuning.GetJobStatus(request, metadata=account)
    assert seen.status == "running"
    assert seen.input_config.fine_tuning_options.n_epochs == 2
    files = f"http://gateway.test/fine_tuning/jobs/{job.id}/files/"
    assert list(seen.checkpoints) == [files + "checkpoints/epoch-1.tar"]
    assert seen.logs == files + "log.txt"
    await end(services, lease, completed=completed(lease))
    seen = await services.fine_tuning.GetJobStatus(request, metadata=account)
    assert seen.status == "success"
    assert not seen.HasField("error_path")


@pytest.mark.parametrize("caller", ["account", "dataset_svc", "job_svc", "inference_svc", "authz"])
async def test_only_trainers_reach_the_worker_protocol(services: Services, caller: str) -> None:
    metadata = services.account() if caller == "account" else services.process(caller)
    call = services.worker.LeaseJob(worker_pb2.LeaseJobRequest(trainer_id="x"), metadata=metadata)
    await refused(call, grpc.StatusCode.PERMISSION_DENIED)


async def test_a_job_may_say_how_often_it_is_started_again(services: Services) -> None:
    account, trainer_id = services.account(), new_id("trainer")
    dialogs = '{"dialog": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    dataset = await services.upload(account, dialogs, "rows.jsonl")
    config = fine_tuning_service_pb2.Config(
        model="tunery-tiny", data=f"dataset://{dataset.id}", overrides="--max_restarts 1 --nproc_per_node 2"
    )
    job = await services.fine_tuning.SubmitJob(config, metadata=account)
    fault = worker_pb2.Failed(message="the training process died\0", fault="platform")
    for status in ("queued", "failed"):
        lease = await services.lease(trainer_id)
        assert lease is not None
        assert list(lease.run.torchrun_arguments) == ["--nproc_per_node=2"]
        await end(services, lease, failed=fault)
        request = fine_tuning_service_pb2.GetJobStatusRequest(job_id=job.job_id)
        assert (await services.fine_tuning.GetJobStatus(request, metadata=account)).status == status


async def test_no_text_of_a_user_makes_a_line_of_its_own(services: Services) -> None:
    account = services.account()
    forged = "2026-01-01T00:00:00.000+00:00 job completed: 99 steps"
    rows = f'question,answer,"x\n{forged}\u2028\x1b"\n' + "".join(f"q{i},a{i},\n" for i in range(10))
    dataset = await services.upload(account, rows)
    request = job_service_pb2.CreateJobRequest(
        base_model="tunery-tiny", dataset_id=dataset.id, task_type="qa"
    )
    job = await services.jobs.CreateJob(request, metadata=account)
    lease = await lease_of(services, job, new_id("trainer"))
    odd = event(lease.next_seq)
    odd.message = f"said\r\n{forged}\0"
    await report(services, lease, odd)
    await end(services, lease, failed=worker_pb2.Failed(message=f"no\n{forged}", fault="job"))

    messages = [record.message for record in await whole_log(services, account, job)]

    assert f"columns that the task doesn't use: x\\n{forged}\\u2028\\x1b" in messages
    assert f"said\\r\\n{forged}\\x00" in messages
    assert messages[-1] == f"job failed: no\\n{forged}"
    assert all(message.isprintable() for message in messages)


async def test_a_run_on_weights_and_biases_is_where_its_log_is(services: Services) -> None:
    account = services.account()
    job = await services.new_job(account, epochs=2)
    lease = await lease_of(services, job, new_id("trainer"))
    url = "https://wandb.test/tests/runs/1"
    await report(services, lease, event(lease.next_seq, wandb_url=url), event(lease.next_seq + 1))
    request = fine_tuning_service_pb2.GetJobStatusRequest(job_id=job.id)
    assert (await services.fine_tuning.GetJobStatus(request, metadata=account)).logs == url
    await end(services, lease, completed=completed(lease))


async def test_counts_beyond_what_messages_hold_do_no_harm(services: Services) -> None:
    account = services.account()
    job = await services.new_job(account, epochs=2**31 - 1)
    lease = await lease_of(services, job, new_id("trainer"))
    await report(services, lease, event(lease.next_seq, "step", **{**STEP, "total_steps": 2**33}))
    assert (await details(services, account, job)).total_steps == 2**31 - 1
    await end(services, lease, failed=worker_pb2.Failed(message="enough", fault="job"))
    steps = [record.step for record in await whole_log(services, account, job) if record.kind == "step"]
    assert steps[0].total_steps == 2**31 - 1


async def test_long_errors_and_long_metadata_arrive(services: Services) -> None:
    account = services.account()
    columns = ",".join(
        f"a rather long column name, number {number:04}".replace(",", "") for number in range(900)
    )
    dataset = await services.upload(account, f"{columns}\n{',' * 899}\n")
    request = job_service_pb2.CreateJobRequest(
        base_model="tunery-tiny", dataset_id=dataset.id, task_type="qa"
    )
    call = services.jobs.CreateJob(request, metadata=(*account, ("x-long", "x" * 40_000)))
    assert "question" in await refused(call, grpc.StatusCode.INVALID_ARGUMENT)
    unknown = job_service_pb2.CreateJobRequest(
        base_model="m" * 100_000, dataset_id=dataset.id, task_type="qa"
    )
    message = await refused(
        services.jobs.CreateJob(unknown, metadata=account), grpc.StatusCode.INVALID_ARGUMENT
    )
    assert len(message) <= 2000


def probe(base_model: str = "tunery-tiny", **figures: float) -> worker_pb2.Probe:
    usual: dict[str, Any] = {
        "startup_seconds": 5.0,
        "load_seconds": 1.0,
        "seconds_per_step": 0.1,
        "seconds_per_token": 0.001,
        "base_memory_bytes": 1e9,
        "bytes_per_token": 1e5,
        "total_memory_bytes": 16e9,
        "tokens_per_pass": 1024,
    }
    return worker_pb2.Probe(
        base_model=base_model, method="lora", dtype="auto", device="cpu, 2 cores", **(usual | figures)
    )


async def put_probe(
    services: Services, measured: worker_pb2.Probe, lease: worker_pb2.Lease | None = None
) -> worker_pb2.PutProbeResponse:
    request = worker_pb2.PutProbeRequest(probe=measured)
    if lease is not None:
        request.job_id, request.lease_token = lease.job_id, lease.lease_token
    return await services.worker.PutProbe(request, metadata=services.process("trainer"))


async def test_a_job_gets_its_estimate_from_a_probe(services: Services) -> None:
    account = services.account()
    job = await services.new_job(account, epochs=2)
    lease = await lease_of(services, job, new_id("trainer"))
    if lease.needs_probe:  # the first job of this database
        told = await put_probe(services, probe(), lease)
        assert told.estimate.startswith("estimate: ")
    estimate = (await details(services, account, job)).estimate
    assert estimate.steps > 0
    assert estimate.seconds > 1
    assert estimate.memory_bytes > 1e8
    await end(services, lease, completed=completed(lease))
    actual = (await details(services, account, job)).actual
    assert actual.tokens == 400
    assert 0 < actual.seconds < 60

    # From then on the estimate is there before a trainer has the job.
    later = await services.new_job(account, epochs=2)
    lease = await lease_of(services, later, new_id("trainer"))
    assert not lease.needs_probe
    await end(services, lease, completed=completed(lease))


async def test_a_run_that_cannot_fit_is_refused_with_the_numbers(services: Services) -> None:
    account = services.account()
    await put_probe(services, probe(base_memory_bytes=64e9))
    try:
        job = await services.new_job(account, epochs=2)
        assert (await whole_log(services, account, job))[-1].kind == "end"
    finally:
        await put_probe(services, probe())
    shown = await details(services, account, job)
    assert shown.fault == "job"
    assert "needs about 59." in shown.error
    assert "has 14.9 GiB" in shown.error
    assert "smaller base model" in shown.error


async def test_a_leased_job_that_cannot_fit_ends_with_its_lease(services: Services) -> None:
    account = services.account()
    job = await services.new_job(account, epochs=2)
    lease = await lease_of(services, job, new_id("trainer"))
    await refused(put_probe(services, probe(base_memory_bytes=64e9), lease), grpc.StatusCode.ABORTED)
    await put_probe(services, probe())
    assert (await get(services, account, job)).status == "failed"
    await refused(renew(services, lease), grpc.StatusCode.ABORTED)


async def test_a_model_is_deploying_while_it_is_checked(services: Services) -> None:
    account = services.account()
    job = await services.new_job(account, epochs=2)
    lease = await lease_of(services, job, new_id("trainer"))

    async def listed() -> list[tuple[str, str]]:
        request = model_service_pb2.ListFineTunedModelsRequest()
        found = await services.models.ListFineTunedModels(request, metadata=account)
        return [(model.id, model.status) for model in found.data]

    prefix = f"{lease.attempt_prefix}artifact/"
    deploying = event(lease.next_seq, "deploying", object_prefix=prefix)
    await report(services, lease, deploying)
    await report(services, lease, deploying)
    [(model_id, status)] = await listed()
    assert status == "deploying"
    assert (await get(services, account, job)).status == "running"
    delete = model_service_pb2.DeleteFineTunedModelRequest(model_id=model_id)
    message = await refused(
        services.models.DeleteFineTunedModel(delete, metadata=account), grpc.StatusCode.NOT_FOUND
    )
    assert "still being checked" in message

    # An attempt that fails takes it back; the next one's keeps its id to the end.
    await end(services, lease, failed=worker_pb2.Failed(message="not the trained one", fault="platform"))
    assert await listed() == []
    lease = await lease_of(services, job, new_id("trainer"))
    prefix = f"{lease.attempt_prefix}artifact/"
    await report(services, lease, event(lease.next_seq, "deploying", object_prefix=prefix))
    [(model_id, _)] = await listed()
    await end(services, lease, completed=completed(lease))
    assert await listed() == [(model_id, "available")]


async def test_an_attempt_can_name_no_objects_but_its_own(services: Services) -> None:
    account, trainer_id = services.account(), new_id("trainer")
    job = await services.new_job(account, epochs=2)
    former = await lease_of(services, job, trainer_id)
    lease = await lease_of(services, job, trainer_id)
    assert former.attempt_prefix != lease.attempt_prefix
    out_of_it = f"{lease.attempt_prefix}../../../other"
    for theirs in (
        f"{former.attempt_prefix}artifact/", "accounts/other/jobs/job-x/attempt-1/artifact/", out_of_it, ""
    ):  # fmt: skip
        for kind in ("checkpoint", "deploying"):
            named = checkpoint(lease, object_prefix=theirs)
            named.kind = kind
            message = await refused(report(services, lease, named), grpc.StatusCode.INVALID_ARGUMENT)
            assert f"is not below {lease.attempt_prefix}" in message
        outcome = completed(lease)
        outcome.object_prefix = theirs
        await refused(end(services, lease, completed=outcome), grpc.StatusCode.INVALID_ARGUMENT)
    assert (await get(services, account, job)).status == "running"
    await end(services, lease, completed=completed(lease))


async def test_what_an_attempt_stores_after_its_job_was_swept_is_swept_too(
    services: Services, embedded_s3: ObjectStoreSettings
) -> None:
    settings = embedded_s3.model_copy(update={"s3_bucket": services.environment["TUNERY_S3_BUCKET"]})
    store = ObjectStore(settings)
    account = services.account()
    job = await services.new_job(account)
    lost, other = [await lease_of(services, job, trainer_id) for trainer_id in ("same", "same")]
    await end(services, other, completed=completed(other))
    prefix = lost.attempt_prefix.rpartition("attempt-")[0]

    async def until_swept() -> None:
        async with asyncio.timeout(20):
            while await store.list(prefix):  # noqa: ASYNC110  # the store tells nobody
                await asyncio.sleep(0.05)

    await until_swept()
    store.put_stream(f"{lost.attempt_prefix}checkpoints/late", io.BytesIO(b"x"))
    stopped = worker_pb2.HandedBack(reason="the run was stopped")
    await refused(end(services, lost, handed_back=stopped), grpc.StatusCode.ABORTED)
    await until_swept()


async def test_after_a_run_went_back_no_later_checkpoint_counts(services: Services) -> None:
    """Even if the trainer died before it could say that they are removed."""
    account = services.account()
    job = await services.new_job(account)
    lease = await lease_of(services, job, new_id("trainer"))
    first = lease.next_seq
    again = f"{lease.attempt_prefix}checkpoints/epoch-1-half-rate/"
    await report(
        services,
        lease,
        checkpoint(lease, first, step=4),
        checkpoint(lease, first + 1, step=8),
        checkpoint(lease, first + 2, step=4, object_prefix=again),
    )
    await end(services, lease, failed=worker_pb2.Failed(message="the trainer died", fault="platform"))
    lease = await lease_of(services, job, new_id("trainer"))
    assert lease.resume_prefix == again
    await end(services, lease, failed=worker_pb2.Failed(message="enough", fault="job"))


async def test_a_removed_checkpoint_is_gone(services: Services) -> None:
    account = services.account()
    job = await services.new_job(account, epochs=2)
    lease = await lease_of(services, job, new_id("trainer"))
    first = lease.next_seq
    await report(
        services,
        lease,
        checkpoint(lease, first, step=1, ends_epoch=False),
        checkpoint(lease, first + 1),
        event(first + 2, "checkpoint_removed", step=1),
    )
    shown = await services.fine_tuning.GetJobStatus(
        fine_tuning_service_pb2.GetJobStatusRequest(job_id=job.id), metadata=account
    )
    assert [uri.rpartition("/")[2] for uri in shown.checkpoints] == ["epoch-1.tar"]
    await end(services, lease, completed=completed(lease))
