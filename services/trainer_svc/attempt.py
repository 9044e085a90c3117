"""One attempt at a job: fetch, train, store, report."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import structlog
from google.protobuf import json_format, timestamp_pb2

from svc_kit.cancellation import see_through
from svc_kit.catalog import BaseModelEntry, Catalog
from svc_kit.errors import LeaseLost, NotFound, PermissionDenied, TuneryError, Unauthenticated
from svc_kit.object_store import ObjectStore, patiently
from trainer_svc.base_models import is_pulled, pull
from trainer_svc.event_reporter import EventReporter, JobServiceClient
from trainer_svc.event_spool import SPOOL_FILE, EventSpool
from trainer_svc.launcher import RunProcess
from trainer_svc.memory_watch import MemoryFull, MemoryWatch
from trainer_svc.probes import ProbeFailed, Probes
from tunery.trainer.v1 import worker_service_pb2 as worker_pb2

log = structlog.get_logger(__name__)

RENEW_SECONDS = 1.0
_POLL_SECONDS = 0.05
_LAST_WORDS_SECONDS = 2.0


class RunStopped(Exception):
    """The run stopped as it was told, and its last checkpoint is stored."""


class RunFailed(Exception):
    """The run ended without a model."""

    def __init__(self, message: str, fault: str) -> None:
        super().__init__(message)
        self.message = message
        self.fault = fault


class Attempt:
    """Runs one lease to its end. Everything that it leaves on the disk is under `folder`."""

    def __init__(
        self,
        lease: worker_pb2.Lease,
        client: JobServiceClient,
        store: ObjectStore,
        catalog: Catalog,
        models_dir: Path,
        probes: Probes,
        folder: Path,
        drain_seconds: float,
    ) -> None:
        """Makes the attempt, and its folder anew."""
        self._lease = lease
        self._client = client
        self._store = store
        self._catalog = catalog
        self._models_dir = models_dir
        self._probes = probes
        self._folder = folder
        self._drain_seconds = drain_seconds
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._stop_file = folder / "stop"
        self._spool = EventSpool.create(folder / SPOOL_FILE, lease)
        self._reporter = EventReporter(client, self._spool, lease.next_seq)
        self._surely_leased_until = 0.0
        self._is_renewed = asyncio.Event()
        self._told_to_stop = asyncio.Event()
        self._process: RunProcess | None = None
        self._output_dir = folder  # each run of the engine has one of its own below it
        self._checkpoints: list[tuple[int, Path]] = []  # steps and folders: stored, and still on the disk
        self._transfers: asyncio.Queue[Callable[[], Awaitable[None]]] = asyncio.Queue()

    async def run(self) -> bool:
        """Trains the job and ends the attempt at job_svc.

        A lost lease (the job was cancelled, or went to another trainer) stops the run and says so to
        job_svc. When cancelled, has the run write a last checkpoint and hands the job back.

        Returns:
            Whether the attempt failed and the job is not to blame.
        """
        # A cancel must not end whatever the attempt is at: what came of the run is still to be told.
        return await see_through(self._run_to_its_end(), self._told_to_stop.set)

    async def _run_to_its_end(self) -> bool:
        outcome = await self._train_while_leased()
        self._spool.close()
        match outcome:
            case None:
                log.info("the lease is lost; the run was stopped", job_id=self._lease.job_id)
                # Only then what it still stored is looked for.
                await self._tell(handed_back=worker_pb2.HandedBack(reason="the run was stopped"))
            case RunStopped():
                await self._tell(handed_back=worker_pb2.HandedBack(reason="the trainer was stopped"))
            case RunFailed():
                await self._tell(failed=worker_pb2.Failed(message=outcome.message, fault=outcome.fault))
            case _:
                await self._tell(completed=outcome)
        return isinstance(outcome, RunFailed) and outcome.fault == "platform"

    async def _tell(self, **outcome: Any) -> None:
        """Ends the attempt at job_svc. A trainer told to stop doesn't wait long for one that is away."""
        telling = asyncio.create_task(self._client.end_attempt(self._lease, **outcome))
        stopping = asyncio.create_task(self._told_to_stop.wait())
        await asyncio.wait([telling, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        try:
            await asyncio.wait_for(telling, _LAST_WORDS_SECONDS)
        except TimeoutError:
            log.warning("job_svc can't be told; the lease will lapse", job_id=self._lease.job_id)

    async def _train_while_leased(self) -> worker_pb2.Completed | RunFailed | RunStopped | None:
        """Returns what came of the run; None when the lease was lost."""
        training = asyncio.create_task(self._train())
        keeping = (self._renew(), self._reporter.run(), self._transfer_in_turn())
        keepers = [asyncio.create_task(work) for work in keeping]
        stopping = asyncio.create_task(self._told_to_stop.wait())
        working: list[asyncio.Task[Any]] = [training, *keepers]
        try:
            done, _ = await asyncio.wait([*working, stopping], return_when=asyncio.FIRST_COMPLETED)
            if stopping not in done:
                return await done.pop()  # a keeper only ever raises
            self._stop_file.touch()
            await asyncio.wait(working, timeout=self._drain_seconds, return_when=asyncio.FIRST_COMPLETED)
            is_complete = training.done() and training.exception() is None
            return training.result() if is_complete else RunStopped()
        except LeaseLost:
            return None
        except RunFailed as failure:
            return failure
        except (NotFound, Unauthenticated, PermissionDenied) as error:
            # What job_svc named is gone from the store, or a clock's jump made this trainer's tokens void.
            return RunFailed(error.message, "platform")
        except TuneryError as error:
            return RunFailed(error.message, "job" if error.http_status < 500 else "platform")
        except Exception as error:
            log.exception("the attempt failed", job_id=self._lease.job_id)
            return RunFailed(f"the trainer failed ({type(error).__name__}: {error})", "platform")
        finally:
            await self._stop()  # first of all: what follows may wait for a transfer's end
            for task in (*working, stopping):
                task.cancel()
            await asyncio.gather(*working, stopping, return_exceptions=True)
            await self._stop()  # one that was just being started

    async def _renew(self) -> None:
        request = worker_pb2.RenewLeaseRequest(job_id=self._lease.job_id, lease_token=self._lease.lease_token)
        while True:
            asked_at = time.monotonic()
            await self._client.call_until_answered("RenewLease", request)
            # Since job_svc counts from some time after this one.
            self._surely_leased_until = asked_at + self._lease.lease_seconds
            self._is_renewed.set()
            await asyncio.sleep(RENEW_SECONDS)

    async def _hold_lease(self) -> None:
        """Returns once the lease is this attempt's, and another's at no time yet.

        The store knows no leases. So a trainer that was paused for longer than its own lasts asks before it
        writes another object, and stops when it is told that the lease is lost.
        """
        while time.monotonic() >= self._surely_leased_until:
            self._is_renewed.clear()
            await self._is_renewed.wait()

    async def _stop(self) -> None:
        if self._process is not None:
            await self._process.kill()

    async def _train(self) -> worker_pb2.Completed:
        spec = await self._prepare()
        for number in itertools.count(1):
            self._output_dir = self._folder / f"output-{number}"
            try:
                return await self._run(spec)
            except MemoryFull as full:
                await self._settle()
                await self._stop()  # or two would share the memory
                spec |= {"tokens_per_pass": full.tokens_per_pass}
                if self._checkpoints:
                    spec["resume_from"] = str(self._checkpoints[-1][1])
                self._reporter.add(
                    "log",
                    f"{full}; the run goes on from its last checkpoint in passes of at most "
                    f"{full.tokens_per_pass} tokens, which changes no result",
                    None,
                    {"tokens_per_pass": full.tokens_per_pass},
                )
        raise AssertionError("the loop has no end")

    async def _run(self, spec: dict[str, Any]) -> worker_pb2.Completed:
        """Runs the engine once and takes what it tells.

        Raises:
            RunFailed: the run failed or its process died.
            MemoryFull: it ran out of memory, and smaller passes may help.
        """
        spec |= {
            "output_dir": str(self._output_dir),
            "readback_dir": str(self._output_dir / "readback"),
            "stop_file": str(self._stop_file),
        }
        spec_file = self._folder / "run_spec.json"
        spec_file.write_text(json.dumps(spec), encoding="utf-8")
        memory = MemoryWatch()
        self._process = RunProcess.start(
            spec_file, list(self._lease.run.torchrun_arguments), self._folder / "process.log"
        )
        async for event in self._events():
            memory.note(event)
            match event["kind"]:
                case "finished":
                    return await self._complete(event)
                case "stopped":
                    await self._settle()
                    raise RunStopped
                case "failed":
                    if event["fault"] == "memory":
                        raise MemoryFull(event["message"], event["tokens_per_pass"])
                    await self._settle()
                    raise RunFailed(event["message"], event["fault"])
                case "checkpoint":
                    self._transfers.put_nowait(partial(self._store_checkpoint, event))
                case "checkpoint_removed":
                    self._transfers.put_nowait(partial(self._remove_checkpoint, event))
                case "artifact":
                    await self._store_model(event)
                case _:
                    self._report(event)
        if memory.kernel_has_killed:
            if memory.smaller_passes is not None:
                raise MemoryFull("the memory is full, and the kernel killed the run", memory.smaller_passes)
            await self._settle()
            raise RunFailed(
                "the memory is too small even for one row at a time; lower max_sequence_length, or train a "
                "smaller base model",
                "job",
            )
        await self._settle()
        raise RunFailed(f"the training process died: {self._process.last_words()}", "platform")

    async def _transfer_in_turn(self) -> None:
        """Brings to the store what the run writes while it goes on. One that fails ends the attempt."""
        while True:
            transfer = await self._transfers.get()
            await transfer()
            self._transfers.task_done()

    async def _settle(self) -> None:
        """Waits until what the run wrote is stored and reported, its checkpoints included."""
        await self._transfers.join()
        await self._store_wandb()
        await self._reporter.drained()

    async def _store_wandb(self) -> None:
        """Keeps the files of a Weights & Biases run, which are complete only once the process has ended."""
        folder = self._output_dir / "wandb"
        if not self._lease.run.HasField("wandb_project") or not folder.exists():
            return
        assert self._process is not None
        await self._process.ended()
        prefix = f"{self._lease.attempt_prefix}wandb/"
        await self._put_folder(prefix, folder)
        self._reporter.add("log", "files of Weights & Biases stored", None, {"wandb_prefix": prefix})

    async def _prepare(self) -> dict[str, Any]:
        """Fetches what the run needs, and returns its specification but for where its output goes."""
        lease, run = self._lease, self._lease.run
        entry = self._catalog.get(run.base_model)
        if not is_pulled(entry, self._models_dir):
            self._reporter.add("log", f"fetching {entry.id} from {entry.source}", None, {})
        base_model_dir = await asyncio.to_thread(pull, entry, self._models_dir)
        if lease.needs_probe:
            await self._put_probe(entry)
        spec: dict[str, Any] = _plain_numbers(
            json_format.MessageToDict(run, preserving_proto_field_name=True)
        )
        for not_the_engines in ("torchrun_arguments", "max_restarts"):
            spec.pop(not_the_engines, None)
        spec |= {
            "base_model_dir": str(base_model_dir),
            "base_model_id": spec.pop("base_model"),
            "base_model_licence": entry.licence,
            "training_file": str(await self._fetch(lease.training_key, "training.jsonl")),
            "leaves_removed_checkpoints": True,  # to be removed from the store as well, and in turn
        }
        if lease.HasField("validation_key"):
            spec["validation_file"] = str(await self._fetch(lease.validation_key, "validation.jsonl"))
        if lease.HasField("resume_prefix"):
            resume_from = self._folder / "resume"
            await patiently(partial(self._store.get_folder, lease.resume_prefix, resume_from))
            spec["resume_from"] = str(resume_from)
        return spec

    async def _put_probe(self, entry: BaseModelEntry) -> None:
        """Says what the base model costs here; job_svc ends the lease of a job that can't fit."""
        run = self._lease.run
        method = run.method.fields["kind"].string_value
        dtype = run.extras.fields["dtype"].string_value or "auto"
        probe = self._probes.get(entry, method, dtype)
        if probe is None:
            self._reporter.add("log", f"measuring a few steps of {entry.id} for an estimate", None, {})
            try:
                probe = await self._probes.measure(entry, method, dtype)
            except ProbeFailed as error:
                # An estimate is a help and no condition: the run itself says better what is wrong.
                self._reporter.add("log", f"no estimate: {error}", None, {})
                return
        request = worker_pb2.PutProbeRequest(
            probe=probe, job_id=self._lease.job_id, lease_token=self._lease.lease_token
        )
        answer = await self._client.call_until_answered("PutProbe", request)
        self._reporter.add("log", answer.estimate, None, {})

    async def _fetch(self, key: str, name: str) -> Path:
        path = self._folder / name
        await patiently(partial(self._store.get_file, key, path))
        return path

    async def _events(self) -> AsyncIterator[dict[str, Any]]:
        """Yields the run's events as it writes them, until its process has ended and all are read."""
        assert self._process is not None
        path = self._output_dir / "events.jsonl"
        unfinished, position = b"", 0
        while True:
            has_ended = self._process.has_ended  # asked before reading: what it wrote last is still read
            written = b""
            if path.exists():
                with path.open("rb") as file:
                    file.seek(position)
                    written = file.read()
            position += len(written)
            *lines, unfinished = (unfinished + written).split(b"\n")
            for line in lines:
                yield json.loads(line)
            if has_ended and not written:
                return
            await asyncio.sleep(_POLL_SECONDS)

    def _report(self, event: dict[str, Any]) -> None:
        time = timestamp_pb2.Timestamp()
        time.FromJsonString(event["time"])
        data = {key: value for key, value in event.items() if key not in ("time", "kind", "message")}
        self._reporter.add(event["kind"], event["message"], time, data)

    async def _store_checkpoint(self, event: dict[str, Any]) -> None:
        prefix, folder = f"{self._lease.attempt_prefix}{event['path']}/", self._output_dir / event["path"]
        await self._put_folder(prefix, folder)
        names = ("epoch", "step", "ends_epoch", "tokens_trained", "epochs_completed")
        message = event["message"].replace("written", "stored")
        data = {name: event[name] for name in names} | {"object_prefix": prefix}
        self._reporter.add("checkpoint", message, None, data)
        before = self._checkpoints
        self._checkpoints = with_newest(before, event["step"], folder, event["changed_at_step"])
        for old in before:
            if old not in self._checkpoints:
                shutil.rmtree(old[1])

    async def _remove_checkpoint(self, event: dict[str, Any]) -> None:
        self._report(event)
        await self._reporter.drained()  # the row goes before its bytes
        prefix = f"{self._lease.attempt_prefix}{event['path']}/"
        await patiently(partial(self._store.delete_prefix, prefix))

    async def _store_model(self, event: dict[str, Any]) -> None:
        """Stores the model, and reads it back for the engine to hold it against what it trained."""
        await self._transfers.join()
        await self._put_folder(self._artifact_prefix, self._output_dir / event["path"])
        self._reporter.add(
            "deploying", "model stored, and now checked", None, {"object_prefix": self._artifact_prefix}
        )
        partial_readback = self._output_dir / "readback.partial"
        await patiently(partial(self._store.get_folder, self._artifact_prefix, partial_readback))
        partial_readback.rename(self._output_dir / "readback")

    async def _put_folder(self, prefix: str, folder: Path) -> None:
        await patiently(partial(self._store.put_folder, prefix, folder, self._hold_lease))

    async def _complete(self, event: dict[str, Any]) -> worker_pb2.Completed:
        self._reporter.add("log", event["message"], None, {"parity_difference": event["parity_difference"]})
        await self._settle()
        return worker_pb2.Completed(
            object_prefix=self._artifact_prefix,
            training_loss=event["training_loss"],
            validation_loss=event["validation_loss"],
            steps=event["steps"],
            epochs_completed=event["epochs_completed"],
            tokens_trained=event["tokens_trained"],
        )

    @property
    def _artifact_prefix(self) -> str:
        return f"{self._lease.attempt_prefix}artifact/"


def with_newest(
    checkpoints: Sequence[tuple[int, Path]], step: int, folder: Path, changed_at_step: int
) -> list[tuple[int, Path]]:
    """Returns the checkpoints that the engine may still need: steps and folders, by step.

    Args:
        checkpoints: those so far.
        step: of the newest. If there are later ones, the run went back to this step.
        folder: of the newest.
        changed_at_step: when the newest one's weights last changed. A run that diverges goes back to the
            last checkpoint before that.
    """
    kept = [old for old in checkpoints if old[0] < step] + [(step, folder)]
    while len(kept) > 1 and kept[1][0] < changed_at_step:
        del kept[0]
    return kept


def _plain_numbers(value: Any) -> Any:
    """A Struct knows only doubles, so counts come as 8.0."""
    match value:
        case dict():
            return {key: _plain_numbers(item) for key, item in value.items()}
        case list():
            return [_plain_numbers(item) for item in value]
        case float() if value.is_integer():
            return int(value)
    return value
