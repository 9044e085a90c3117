"""Reports on datasets: made on demand, one at a time, and kept in the store beside the dataset."""

from __future__ import annotations

import asyncio
import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import sqlalchemy as sa
from minio.error import MinioException

from dataset_svc.datasets import Datasets, reports_prefix
from dataset_svc.row_check import MAX_LISTED, RowCheck, check_rows
from dataset_svc.task_columns import ColumnPlan, TaskType, plan_any_task, plan_columns
from dataset_svc.training_rows import iter_csv_examples, iter_dialog_examples
from svc_kit.cancellation import in_stoppable_thread, see_through
from svc_kit.catalog import BaseModelEntry, Catalog
from svc_kit.child_process import run_module
from svc_kit.errors import InvalidRequest, LimitReached, NotFound, Unavailable
from svc_kit.object_store import ObjectStore
from svc_kit.shared_calls import SharedCalls
from svc_kit.under_way import UnderWay
from trainer_svc.base_models import base_model_dir, is_pulled

# Below what the gateway gives a report, so that the answer says what it waited for.
ANSWER_SECONDS = 280
MAX_OF_ACCOUNT = 4
MIN_SEQUENCE_LENGTH = 2

# Part of each key: reports of an older form are not found, and go with their dataset.
_FORM = 1


@dataclass(frozen=True)
class ReportRequest:
    """What is asked for; None stands for the default, see `GetDatasetReportRequest`."""

    dataset_id: str
    base_model: str | None
    task_type: str | None
    max_sequence_length: int | None


@dataclass(frozen=True)
class _Question:
    """A request with its defaults filled in, all of it checked.

    Attributes:
        dataset: its row.
        entry: the base model's.
        plan: how a CSV file's rows become examples; None for JSONL.
        max_sequence_length: the longest row, in tokens.
    """

    dataset: sa.Row[Any]
    entry: BaseModelEntry
    plan: ColumnPlan | None
    max_sequence_length: int

    @property
    def object_key(self) -> str:
        """Where the report is kept: a function of all that the report depends on."""
        entry = self.entry
        facts = [_FORM, entry.id, entry.source, entry.revision, entry.context_length]
        facts += [self.plan and self.plan.task_type, self.max_sequence_length]
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        return f"{reports_prefix(self.dataset.object_key)}{digest[:32]}.json"


class DatasetReports:
    """Makes reports and keeps them."""

    def __init__(
        self,
        datasets: Datasets,
        store: ObjectStore,
        catalog: Catalog,
        models_dir: Path,
        catalog_file: Path | None,
    ) -> None:
        """Args:
        datasets: of all accounts.
        store: has the datasets' bytes, and gets the reports.
        catalog: the base models.
        models_dir: where they lie; those missing are fetched into it.
        catalog_file: what `catalog` was read from; None for the packaged one.
        """
        self._datasets = datasets
        self._store = store
        self._catalog = catalog
        self._models_dir = models_dir
        self._catalog_file = catalog_file
        self._fetches: SharedCalls[None] = SharedCalls()
        # torch for one report takes some hundred megabytes.
        self._turn = asyncio.Lock()
        self._under_way = UnderWay()

    async def close(self) -> None:
        """Ends what goes on without a caller."""
        await self._fetches.close()

    async def get(self, account_id: str, request: ReportRequest) -> dict[str, Any]:
        """Returns a report as JSON in the shape of `DatasetReport`. Repeatable; made once.

        Raises:
            NotFound: the account has no such dataset, or it was deleted meanwhile.
            UnknownBaseModel: the catalog has no such model.
            UnsupportedColumns: a CSV's columns don't fit the task, or any task.
            InvalidRequest: the task or the length is none that can be asked for.
            LimitReached: as many reports of the account's are being made as may.
            Unavailable: the base model can't be fetched, or time ran out.
        """
        question = self._question(await self._datasets.get(account_id, request.dataset_id), request)
        doing = "the store is slow"
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                if (known := await self._kept(question)) is not None:
                    return known
                # Accounts wait for each other: none may keep the others waiting for long.
                if self._under_way.of(account_id) >= MAX_OF_ACCOUNT:
                    raise LimitReached(
                        f"{MAX_OF_ACCOUNT} reports of the account are being made, and that is the limit; "
                        "wait for one to be ready."
                    )
                with self._under_way.one_more(account_id):
                    doing = f"the base model {question.entry.id} is still being fetched"
                    await self._fetch(question.entry)
                    doing = "other reports are made before this one"
                    async with self._turn:
                        if (known := await self._kept(question)) is not None:
                            return known
                        doing = "there is so much to look through; try it with a part of the rows"
                        return await self._make(account_id, question)
        except TimeoutError as error:
            raise Unavailable(
                f"The report isn't ready after {ANSWER_SECONDS} s: {doing}. Ask again later."
            ) from error

    def _question(self, dataset: sa.Row[Any], request: ReportRequest) -> _Question:
        model_id = self._catalog.default if request.base_model is None else request.base_model
        entry = self._catalog.get(model_id)
        length = request.max_sequence_length
        if length is None:
            length = entry.context_length
        if not MIN_SEQUENCE_LENGTH <= length <= entry.context_length:
            raise InvalidRequest(
                f"`max_sequence_length` is {length}; for {entry.id} it must be from {MIN_SEQUENCE_LENGTH} to "
                f"{entry.context_length}.",
                field="max_sequence_length",
            )
        return _Question(dataset, entry, _plan(dataset, request.task_type), length)

    async def _kept(self, question: _Question) -> dict[str, Any] | None:
        try:
            chunks = [chunk async for chunk in self._store.read_chunks(question.object_key)]
        except NotFound:
            return None
        return cast(dict[str, Any], json.loads(b"".join(chunks)))

    async def _fetch(self, entry: BaseModelEntry) -> None:
        if not await asyncio.to_thread(is_pulled, entry, self._models_dir):
            await self._fetches.run(entry.id, lambda: self._pull(entry))

    async def _pull(self, entry: BaseModelEntry) -> None:
        # In a process of its own: to convert or make a model it imports torch.
        arguments = ["pull", entry.id, "--models-dir", str(self._models_dir)]
        if self._catalog_file is not None:
            arguments += ["--catalog", str(self._catalog_file)]
        exit_code, last_words = await run_module("trainer_svc.base_models", *arguments)
        if exit_code != 0:
            raise Unavailable(f"The base model {entry.id} can't be fetched: {last_words or exit_code}.")

    async def _make(self, account_id: str, question: _Question) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="tunery-report-") as name:
            folder = Path(name)
            source = folder / "dataset"
            try:
                await self._store.get_file(question.dataset.object_key, source)
            except MinioException:
                await self._datasets.get(account_id, question.dataset.id)  # it may have been deleted
                raise
            rows_file, report_file = folder / "rows.jsonl", folder / "report.json"
            check = await in_stoppable_thread(
                lambda look_up: _check(source, question.plan, folder, rows_file, look_up)
            )
            source.unlink()
            measured = await self._measure(question, folder, rows_file)
            report = _report(question, check, measured)
            report_file.write_text(json.dumps(report), encoding="utf-8")
            await see_through(self._keep(account_id, question, report_file))
        return report

    async def _keep(self, account_id: str, question: _Question, report_file: Path) -> None:
        await self._store.put_file(question.object_key, report_file)
        try:
            await self._datasets.get(account_id, question.dataset.id)
        except NotFound:
            # Deleted meanwhile, perhaps before the report was there to go with it.
            await self._store.delete(question.object_key)
            raise

    async def _measure(self, question: _Question, folder: Path, rows_file: Path) -> dict[str, Any]:
        spec_file, measured_file = folder / "spec.json", folder / "measured.json"
        spec = {
            "base_model_dir": str(base_model_dir(question.entry, self._models_dir)),
            "rows_file": str(rows_file),
            "report_file": str(measured_file),
            "max_sequence_length": question.max_sequence_length,
        }
        spec_file.write_text(json.dumps(spec), encoding="utf-8")
        exit_code, last_words = await run_module("trainer_svc.engine.dataset_report", str(spec_file))
        if exit_code != 0:
            raise RuntimeError(f"measuring rows ended with {exit_code}: {last_words}")
        return cast(dict[str, Any], json.loads(measured_file.read_bytes()))


def _plan(dataset: sa.Row[Any], task_type: str | None) -> ColumnPlan | None:
    if task_type is not None and task_type not in get_args(TaskType):
        raise InvalidRequest(
            f'`task_type` is "{task_type[:60]}"; it must be "qa" or "not_qa".', field="task_type"
        )
    if dataset.format != "csv":
        if task_type is not None:
            raise InvalidRequest(
                "`task_type` is for CSV files; this dataset is JSONL, whose rows say themselves what is "
                "trained on. Leave it out.",
                field="task_type",
            )
        return None
    if task_type is None:
        return plan_any_task(dataset.columns)
    return plan_columns(cast(TaskType, task_type), dataset.columns)


def _check(
    source: Path, plan: ColumnPlan | None, folder: Path, rows_file: Path, look_up: Callable[[], None]
) -> RowCheck:
    with source.open("rb") as file:
        rows = iter_dialog_examples(file) if plan is None else iter_csv_examples(file, lambda _: plan)
        return check_rows(rows, folder, rows_file, look_up)


def _report(question: _Question, check: RowCheck, measured: dict[str, Any]) -> dict[str, Any]:
    """A `DatasetReport` of what was found in the rows and in their tokens (a `TokenReport`)."""
    bad_rows = [*check.bad_rows, *measured["refused_rows"]]
    long_row_lines = [*check.unmeasured_long_lines, *measured["long_row_lines"]]
    return {
        "dataset_id": question.dataset.id,
        "format": question.dataset.format,
        "base_model": question.entry.id,
        "task_type": question.plan.task_type if question.plan else None,
        "num_rows": check.num_rows,
        "num_bad_rows": check.num_bad_rows + measured["num_refused_rows"],
        "bad_rows": sorted(bad_rows, key=lambda row: cast(int, row["line"]))[:MAX_LISTED],
        "token_lengths": measured["token_lengths"],
        "num_rows_measured": measured["num_rows_measured"],
        "max_sequence_length": question.max_sequence_length,
        "num_long_rows": check.num_unmeasured_long_rows + measured["num_long_rows"],
        "long_row_lines": sorted(long_row_lines)[:MAX_LISTED],
        "num_duplicate_rows": check.num_duplicate_rows,
        "duplicate_rows": check.duplicate_rows,
        "num_rows_without_target": measured["num_rows_without_target"],
        "without_target_lines": measured["without_target_lines"],
        "example": measured["example"],
    }
