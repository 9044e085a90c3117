"""A stored file as the examples that are trained on: the one reading that jobs and reports share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from dataset_svc.csv_rows import iter_csv_rows
from dataset_svc.dialog_rows import DialogRow, RowProblem, iter_dialog_rows
from dataset_svc.task_columns import ColumnPlan

Example = dict[str, Any]


@dataclass(frozen=True)
class CheckedRow:
    """A row of a file.

    Attributes:
        line: the line on which it starts, from 1.
        example: `{"dialog": [...], "keep_loss": [...]}` or `{"text": ...}`; None for a bad row.
        problems: a bad row's faults, at least one; none otherwise.
    """

    line: int
    example: Example | None
    problems: tuple[RowProblem, ...] = ()


def iter_csv_examples(
    binary_file: BinaryIO, plan_columns: Callable[[list[str]], ColumnPlan]
) -> Iterator[CheckedRow]:
    """Reads a file that `CsvChecker` has accepted, blocking.

    Args:
        binary_file: the file; it stays open.
        plan_columns: asked once, with the file's columns, at the first row.
    """
    plan = None
    for line, row in iter_csv_rows(binary_file):
        plan = plan or plan_columns(list(row))
        example = plan.to_example(line, row)
        if isinstance(example, RowProblem):
            yield CheckedRow(line, None, (example,))
        else:
            yield CheckedRow(line, example)


def iter_dialog_examples(binary_file: BinaryIO) -> Iterator[CheckedRow]:
    """Reads and checks JSON lines, blocking; the file stays open."""
    for row in iter_dialog_rows(binary_file):
        if isinstance(row, DialogRow):
            yield CheckedRow(row.line, row.to_example())
        else:
            yield CheckedRow(row[0].line, None, tuple(row))
