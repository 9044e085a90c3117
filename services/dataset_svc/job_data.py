"""A job's data, copied into the job's own folder as the rows that a trainer reads, every row checked."""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TextIO

from dataset_svc.csv_rows import iter_csv_rows
from dataset_svc.data_sources import DataSources
from dataset_svc.datasets import Datasets
from dataset_svc.dialog_rows import RowProblem
from dataset_svc.task_columns import ColumnPlan, TaskType, plan_columns
from dataset_svc.token_counts import RowSample, TokenCounts, count_tokens
from dataset_svc.training_rows import CheckedRow, iter_csv_examples, iter_dialog_examples
from svc_kit.cancellation import in_stoppable_thread
from svc_kit.catalog import Catalog
from svc_kit.errors import InvalidRequest
from svc_kit.ids import random_id
from svc_kit.object_store import ObjectStore, account_prefix, patiently
from trainer_svc.base_models import base_model_dir

TRAINING, VALIDATION = "training", "validation"
# Bad rows that the error report names, with up to some tens of problems each; those after them are counted.
MAX_REPORTED_ROWS = 50_000


@dataclass(frozen=True)
class DataRequest:
    """What to make of a job's data; the fields are those of `PrepareJobDataRequest`."""

    account_id: str
    job_id: str
    training_uri: str
    validation_uri: str | None
    task_type: TaskType | None
    num_validation_rows: int
    seed: int
    base_model: str


@dataclass(frozen=True)
class DataFile:
    """A JSONL file in the store."""

    object_key: str
    size_bytes: int
    num_rows: int
    tokens: TokenCounts


@dataclass
class PreparedData:
    """What came of it: files by use (`training`, `validation`), or broken rows and their report."""

    files: dict[str, DataFile] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    num_bad_rows: int = 0
    first_problem: str | None = None
    report_key: str | None = None


class JobData:
    """Makes jobs' data ready."""

    def __init__(
        self,
        sources: DataSources,
        datasets: Datasets,
        store: ObjectStore,
        catalog: Catalog,
        models_dir: Path,
    ) -> None:
        self._sources = sources
        self._datasets = datasets
        self._store = store
        self._catalog = catalog
        self._models_dir = models_dir

    async def prepare(self, request: DataRequest) -> PreparedData:
        """Copies and checks a job's data. Repeatable: what is stored has a place of its own each time.

        When cancelled nothing stays that only now reaches the store, after the job was swept.

        Raises:
            InvalidRequest: the data can't be read as what it should be.
            Unavailable: a source or the store can't be reached for now.
        """
        with tempfile.TemporaryDirectory(prefix="tunery-data-") as name:
            folder = Path(name)
            prepared = PreparedData()
            model_dir = base_model_dir(self._catalog.get(request.base_model), self._models_dir)
            with (folder / "report.json").open("w", encoding="utf-8") as report:
                report.write(json.dumps({"job_id": request.job_id})[:-1] + ', "rows": [')
                for use, uri in ((TRAINING, request.training_uri), (VALIDATION, request.validation_uri)):
                    if uri is not None:
                        source = folder / f"{use}.source"
                        format_ = await self._sources.fetch(request.account_id, uri, source)
                        job = _Conversion(request, use, uri, format_, folder, model_dir, prepared, report)
                        await in_stoppable_thread(partial(job.run, source))
                report.write(f'\n], "num_bad_rows": {prepared.num_bad_rows}}}\n')
            await self._store_results(request, folder, prepared)
            return prepared

    async def _store_results(self, request: DataRequest, folder: Path, prepared: PreparedData) -> None:
        prefix = f"{account_prefix(request.account_id)}jobs/{request.job_id}/data/{random_id(8)}/"
        try:
            if prepared.num_bad_rows:
                prepared.report_key = f"{prefix}error_report.json"
                prepared.files.clear()
                await self._store.put_file(prepared.report_key, folder / "report.json")
                return
            for use, file in prepared.files.items():
                key = f"{prefix}{use}.jsonl"
                await self._store.put_file(key, folder / f"{use}.jsonl")
                prepared.files[use] = replace(file, object_key=key)
        except asyncio.CancelledError:
            await asyncio.shield(patiently(partial(self._store.delete_prefix, prefix)))
            raise


class _Conversion:
    """Turns one source file into JSONL. Runs in a thread; ends early when `look_up` raises."""

    def __init__(
        self,
        request: DataRequest,
        use: str,
        uri: str,
        format_: str,
        folder: Path,
        model_dir: Path,
        prepared: PreparedData,
        report: TextIO,
    ) -> None:
        self._request = request
        self._use = use
        self._uri = uri
        self._format = format_
        self._folder = folder
        self._model_dir = model_dir
        self._prepared = prepared
        self._report = report

    def run(self, source: Path, look_up: Callable[[], None]) -> None:
        with source.open("rb") as file:
            is_csv = self._format == "csv"
            rows = iter_csv_examples(file, self._plan) if is_csv else iter_dialog_examples(file)
            samples = self._write(rows, look_up)
        if self._prepared.num_bad_rows:
            return
        if not samples[self._use].num_rows:
            raise InvalidRequest(f"{self._uri} has no rows.")
        for use, sample in samples.items():
            size_bytes = (self._folder / f"{use}.jsonl").stat().st_size
            tokens = count_tokens(sample, self._model_dir)
            self._prepared.files[use] = DataFile("", size_bytes, sample.num_rows, tokens)

    def _plan(self, columns: list[str]) -> ColumnPlan:
        assert self._request.task_type is not None, "CSV goes with a task"
        plan = plan_columns(self._request.task_type, columns)
        if plan.unused:
            listed = ", ".join(plan.unused)
            self._prepared.remarks.append(f"columns that the task doesn't use: {listed}")
        return plan

    def _write(self, rows: Iterable[CheckedRow], look_up: Callable[[], None]) -> dict[str, RowSample]:
        """Writes the rows, those drawn for validation apart, and returns what went where."""
        draws = self._draw(look_up)
        uses = [self._use] if draws is None else [TRAINING, VALIDATION]
        samples = {use: RowSample() for use in uses}
        outputs = {use: (self._folder / f"{use}.jsonl").open("w", encoding="utf-8") for use in uses}
        try:
            for row in rows:
                look_up()
                is_drawn = draws is not None and next(draws)
                if row.example is None:
                    self._note(row.problems)
                    continue
                use = VALIDATION if is_drawn else self._use
                line = json.dumps(row.example, ensure_ascii=False) + "\n"
                outputs[use].write(line)
                samples[use].note(line)
        finally:
            for output in outputs.values():
                output.close()
        return samples

    def _draw(self, look_up: Callable[[], None]) -> Iterator[bool] | None:
        """Which rows are kept for validation: a function of the seed and the number of rows.

        Selection sampling (Knuth, The Art of Computer Programming 3.4.2, algorithm S): exactly as many as
        asked for, each set as likely as another, and nothing to remember however many rows there are.
        """
        num_drawn = self._request.num_validation_rows
        if self._use != TRAINING or not num_drawn:
            return None
        with (self._folder / f"{self._use}.source").open("rb") as file:
            num_rows = 0
            for _ in iter_csv_rows(file):
                look_up()
                num_rows += 1
        return _select(random.Random(self._request.seed), num_drawn, num_rows)  # noqa: S311  # no secret

    def _note(self, problems: Sequence[RowProblem]) -> None:
        prepared = self._prepared
        prepared.num_bad_rows += 1
        if prepared.num_bad_rows > MAX_REPORTED_ROWS:
            return
        for problem in problems:
            separator = ",\n" if prepared.first_problem else "\n"
            if prepared.first_problem is None:
                prepared.first_problem = str(problem)
            entry = {"data": self._uri, **problem.to_json()}
            self._report.write(separator + json.dumps(entry, ensure_ascii=False))


def _select(generator: random.Random, num_drawn: int, num_rows: int) -> Iterator[bool]:
    for num_left in range(num_rows, 0, -1):
        is_drawn = generator.random() * num_left < num_drawn
        num_drawn -= is_drawn
        yield is_drawn
