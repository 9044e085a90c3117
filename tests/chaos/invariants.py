"""What must hold once all is well again: nothing acknowledged is lost, doubled or left behind.

Each check yields what is wrong, in words. They read the databases and the store themselves, and hold them
against what an account was told.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import sqlalchemy as sa

from dataset_svc.tables import datasets as dataset_rows
from job_svc.job_state import ENDED, JobStatus
from job_svc.tables import checkpoints, credit_entries, events, jobs, models
from svc_kit.object_store import account_prefix
from tests.chaos.stack import ChaosStack
from tests.chaos.workload import DATASETS, Account, FollowedJob
from tests.integration.tunery.running import wait_for

SWEEP_SECONDS = 60
_IDLE_SECONDS = 30


@dataclass(frozen=True)
class Reference:
    """What an undisturbed run comes to; the engine computes the same bit for bit, however often it resumes.

    Attributes:
        losses: of each step, from 1.
        tokens: trained on so far, after each step.
    """

    losses: tuple[float, ...]
    tokens: tuple[int, ...]


# Where it isn't asked whether a job's numbers are the undisturbed ones.
NO_REFERENCE = Reference((), ())


def reference_of(account: Account, job: FollowedJob) -> Reference:
    """Returns what a job came to that ran undisturbed."""
    steps = [event.data for event in _Database(account.stack).events(job.id) if event.kind == "step"]
    return Reference(
        tuple(step["loss"] for step in steps), tuple(int(step["tokens_trained"]) for step in steps)
    )


class _Database:
    """The services' tables, read around the services."""

    def __init__(self, stack: ChaosStack) -> None:
        self._urls = {name: stack.database_url(name) for name in ("dataset_svc", "job_svc")}

    def _rows(self, service: str, query: sa.Select[Any]) -> list[sa.Row[Any]]:
        engine = sa.create_engine(self._urls[service], poolclass=sa.NullPool)
        with engine.connect() as connection:
            return list(connection.execute(query))

    def datasets(self, account_id: str) -> list[sa.Row[Any]]:
        return self._rows("dataset_svc", dataset_rows.select().where(dataset_rows.c.account_id == account_id))

    def jobs(self, account_id: str) -> list[sa.Row[Any]]:
        return self._rows("job_svc", jobs.select().where(jobs.c.account_id == account_id))

    def events(self, job_id: str) -> list[sa.Row[Any]]:
        query = events.select().where(events.c.job_id == job_id).order_by(events.c.seq)
        return self._rows("job_svc", query)

    def checkpoints(self, job_id: str) -> list[sa.Row[Any]]:
        query = checkpoints.select().where(checkpoints.c.job_id == job_id).order_by(checkpoints.c.step)
        return self._rows("job_svc", query)

    def models(self, job_id: str) -> list[sa.Row[Any]]:
        return self._rows("job_svc", models.select().where(models.c.job_id == job_id))

    def entries(self, account_id: str) -> list[sa.Row[Any]]:
        query = credit_entries.select().where(credit_entries.c.account_id == account_id)
        return self._rows("job_svc", query.order_by(credit_entries.c.number))


def violations(account: Account, reference: Reference) -> Iterator[str]:
    """Yields what is wrong with what an account was told and has; nothing where all holds.

    Args:
        account: one whose jobs have ended, as far as they do.
        reference: of an undisturbed run of the same data.
    """
    database = _Database(account.stack)
    yield from (f"the workload failed: {error!r}" for error in account.failures)
    yield from _datasets(account)
    found = {job.id: job for job in database.jobs(account.id)}
    if lost := account.jobs.keys() - found.keys():
        yield f"acknowledged jobs are lost: {sorted(lost)}"
        return
    if len(extra := found.keys() - account.jobs.keys()) > account.doubtful_jobs:
        yield f"there are jobs that nobody made: {sorted(extra)}"
    for job in account.jobs.values():
        name = f"{job.id} ({found[job.id].status})"
        log = database.events(job.id)
        yield from (f"{name}: {problem}" for problem in _state(job, found[job.id]))
        yield from (f"{name}: {problem}" for problem in _log(job, found[job.id], log))
        yield from (f"{name}: {problem}" for problem in _steps(log, found[job.id], reference))
        yield from (f"{name}: {problem}" for problem in _metrics(job, log))
        yield from (f"{name}: {problem}" for problem in _outcome(account, database, found[job.id]))
    yield from _credits(account, database, found)
    yield from _objects(account, database)
    yield from _processes(account.stack)


def _datasets(account: Account) -> Iterator[str]:
    shown = {dataset["id"]: dataset for dataset in account.get(DATASETS)["data"]}
    for dataset_id, (told, sha256) in account.datasets.items():
        if shown.get(dataset_id) != told:
            yield f"{dataset_id} was acknowledged as {told} and is {shown.get(dataset_id)}"
            continue
        key = f"{account_prefix(account.id)}datasets/{dataset_id}"
        with account.stack.store.open(key) as file:
            if hashlib.sha256(file.read()).hexdigest() != sha256:
                yield f"the bytes of {dataset_id} are not those that were uploaded"
    extra = len(shown.keys() - account.datasets.keys())
    if extra > account.doubtful_uploads:
        yield f"{extra} datasets are shown that nobody uploaded"


def _state(job: FollowedJob, row: sa.Row[Any]) -> Iterator[str]:
    if row.status not in ENDED:
        yield "has not ended"
    elif job.cancelled and row.status != JobStatus.CANCELLED:
        yield "its cancelling was acknowledged"
    elif not job.cancel_asked and row.status != JobStatus.COMPLETED:
        yield f"should have completed: {row.error}"


def _log(job: FollowedJob, row: sa.Row[Any], log: list[sa.Row[Any]]) -> Iterator[str]:
    yield from (f"a follower failed: {error!r}" for error in job.errors)
    seqs = [event.seq for event in log]
    if seqs != list(range(1, row.next_seq)):
        yield f"its log has the lines {_shown(seqs)} where 1 to {row.next_seq - 1} are expected"
    kinds = Counter(event.kind for event in log)
    if kinds["end"] != 1 or log[-1].kind != "end":
        yield f"its log has {kinds['end']} ends, and the last line is {log[-1].kind}"
    told = [(record.seq, record.kind, record.message) for record in job.log]
    if told != [(event.seq, event.kind, event.message) for event in log]:
        yield f"its follower saw the lines {_shown([seq for seq, _, _ in told])} of {_shown(seqs)}"


def _steps(log: list[sa.Row[Any]], row: sa.Row[Any], reference: Reference) -> Iterator[str]:
    """Each step comes once, and again only after an attempt that went on from a checkpoint before it."""
    step, stored = 0, {0}
    for event in log:
        data = event.data or {}
        if event.kind == "log" and event.message.startswith("training starts"):
            step = max(stored)
        elif event.kind == "checkpoint":
            stored.add(int(data["step"]))
        elif event.kind == "step":
            if data["step"] != step + 1:
                yield f"step {data['step']:g} follows step {step} (line {event.seq})"
            step = int(data["step"])
            if step <= len(reference.losses) and data["loss"] != reference.losses[step - 1]:
                yield f"step {step} has the loss {data['loss']}, undisturbed {reference.losses[step - 1]}"
            if step <= len(reference.tokens) and data["tokens_trained"] != reference.tokens[step - 1]:
                yield f"{data['tokens_trained']} tokens after step {step}, not {reference.tokens[step - 1]}"
    if row.status == JobStatus.COMPLETED and not step == row.total_steps == row.steps_completed:
        yield f"ends with step {step} of {row.total_steps}, of which {row.steps_completed} are counted"


def _metrics(job: FollowedJob, log: list[sa.Row[Any]]) -> Iterator[str]:
    if job.metrics is None:
        return
    told = [metric["seq"] for metric in job.metrics]
    stored = [event.seq for event in log if event.kind in ("step", "validation")]
    if told != stored:
        yield f"its metrics' follower saw {_shown(told)} of {_shown(stored)}"


def _outcome(account: Account, database: _Database, row: sa.Row[Any]) -> Iterator[str]:
    """A completed job has a checkpoint for each epoch and one model; any other has none that is shown."""
    kept, made = database.checkpoints(row.id), database.models(row.id)
    if row.status != JobStatus.COMPLETED:
        if made or (kept and row.status == JobStatus.CANCELLED):
            yield f"has {len(kept)} checkpoints and {len(made)} models"
        return
    dataset, _ = account.datasets[row.dataset_id]
    steps_per_epoch = math.ceil(dataset["row_count"] / row.run["batch_size"])
    expected = list(range(steps_per_epoch, row.total_steps + 1, steps_per_epoch))
    if [checkpoint.step for checkpoint in kept] != expected:
        yield f"has checkpoints of the steps {[checkpoint.step for checkpoint in kept]}, not {expected}"
    for checkpoint in kept:
        with account.stack.store.open(f"{checkpoint.object_prefix}training_state/state.json") as file:
            state = json.loads(file.read())
        if state["step"] != checkpoint.step:
            yield f"its checkpoint of step {checkpoint.step} holds step {state['step']}"
    if [model.status for model in made] != ["available"]:
        yield f"its models are {[model.status for model in made]}"
    for model in made:
        with account.stack.store.open(f"{model.object_prefix}adapter_model.safetensors") as file:
            if not file.read():
                yield "its model has no weights"
    shown = account.get("/api/v1/fine-tuning/models")["data"]
    if [model["id"] for model in shown if model["job_id"] == row.id] != [model.id for model in made]:
        yield f"its models are shown as {shown}"


def _credits(account: Account, database: _Database, found: dict[str, sa.Row[Any]]) -> Iterator[str]:
    entries = database.entries(account.id)
    balance = account.get("/api/v1/credits")["balance"]
    if round(balance * 1e6) != sum(entry.amount for entry in entries):
        yield f"the balance is {balance} and the ledger's sum {sum(entry.amount for entry in entries)}"
    if sum(entry.kind == "grant" for entry in entries) != 1:
        yield "the account was not granted its credits once"
    for job_id, row in found.items():
        amounts = {entry.kind: entry.amount for entry in entries if entry.job_id == job_id}
        if len(amounts) != sum(entry.job_id == job_id for entry in entries):
            yield f"{job_id} has an entry twice: {amounts}"
        if amounts.get("hold", 0) != -amounts.get("release", 0) or "hold" not in amounts:
            yield f"{job_id}'s hold is not settled: {amounts}"
        charged = -amounts.get("charge", 0)
        if charged != (row.credits_charged or 0):
            yield f"{job_id} shows a charge of {row.credits_charged} and has {amounts}"
        if row.status == JobStatus.COMPLETED and charged != row.tokens_trained * 1000:
            yield f"{job_id} trained {row.tokens_trained} tokens and was charged {charged}"


def _objects(account: Account, database: _Database) -> Iterator[str]:
    """After the sweep, every object under the account's prefix is one that a row names."""
    stack = account.stack

    def orphans() -> list[str]:
        named = [row.object_key for row in database.datasets(account.id)]
        for row in database.jobs(account.id):
            if not row.swept:
                return [f"{row.id} is not swept"]
            named += [checkpoint.object_prefix for checkpoint in database.checkpoints(row.id)]
            named += [model.object_prefix for model in database.models(row.id)]
            named += [key for key in (row.error_report_key, row.wandb_prefix) if key]
        return [key for key in stored_keys(stack, account.id) if not key.startswith(tuple(named))]

    try:
        wait_for(lambda: not orphans(), "the sweep", SWEEP_SECONDS)
    except AssertionError:
        yield f"objects are left that no row names: {orphans()}"


def stored_keys(stack: ChaosStack, account_id: str) -> list[str]:
    """The keys of what an account has in the store, uploads included of which only parts came."""
    client, prefix = stack.store._client, account_prefix(account_id)
    whole = client.list_objects(stack.store.bucket, prefix=prefix, recursive=True)
    begun = client._list_multipart_uploads(stack.store.bucket, prefix=prefix).uploads
    return [str(found.object_name) for found in (*whole, *begun)]


def _processes(stack: ChaosStack) -> Iterator[str]:
    """With no job there is no run, and nothing of one on the trainer's disk."""
    runs = stack.work_dir / "runs"

    def left() -> list[str]:
        return stack.strays() + ([str(path) for path in runs.iterdir()] if runs.exists() else [])

    try:
        wait_for(lambda: not left(), "the end of the run", _IDLE_SECONDS)
    except AssertionError:
        yield f"of runs there are left: {left()}"


def _shown(seqs: list[int]) -> str:
    """Numbers in order as ranges: `1-5 7 7-9`."""
    if not seqs:
        return "none"
    starts = [0] + [n + 1 for n, (a, b) in enumerate(pairwise(seqs)) if b != a + 1]
    ends = [*(start - 1 for start in starts[1:]), len(seqs) - 1]
    return " ".join(
        str(seqs[a]) if a == b else f"{seqs[a]}-{seqs[b]}" for a, b in zip(starts, ends, strict=True)
    )
