"""A dataset's rows looked through for a report: which are bad, which repeat others, and what to measure."""

from __future__ import annotations

import hashlib
import heapq
import json
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from dataset_svc.dialog_rows import RowProblem
from dataset_svc.training_rows import CheckedRow, Example

MAX_LISTED = 100
MAX_MEASURED_ROWS = 20_000
# A tokenizer needs some hundred bytes for each token, and text at worst has a token a byte.
MAX_MEASURED_ROW_CHARS = 1_000_000
MAX_MEASURED_CHARS = 32_000_000
_ROWS_BETWEEN_LOOKS = 1_000


@dataclass
class RowCheck:
    """What was found; lists have the first `MAX_LISTED` entries by line, counts have all.

    Attributes:
        num_rows: all rows.
        num_bad_rows: those that a job would refuse.
        bad_rows: `{"line", "column", "problem", "cure"}` of each; no `column` for a row as a whole.
        num_duplicate_rows: rows that repeat an earlier one.
        duplicate_rows: `{"line", "first_line"}` of each.
        num_unmeasured_long_rows: rows of more than `MAX_MEASURED_ROW_CHARS`.
        unmeasured_long_lines: their lines.
    """

    num_rows: int = 0
    num_bad_rows: int = 0
    bad_rows: list[dict[str, Any]] = field(default_factory=list)
    num_duplicate_rows: int = 0
    duplicate_rows: list[dict[str, int]] = field(default_factory=list)
    num_unmeasured_long_rows: int = 0
    unmeasured_long_lines: list[int] = field(default_factory=list)


def check_rows(
    rows: Iterable[CheckedRow], folder: Path, rows_file: Path, look_up: Callable[[], None]
) -> RowCheck:
    """Looks through all rows, blocking, in memory that hardly grows with their number.

    Args:
        rows: of one file, in its order.
        folder: for temporary files.
        rows_file: gets the rows to measure, as JSON lines of `{"line", "row"}`.
        look_up: called now and then; ends the work by raising.
    """
    check = RowCheck()
    with ExitStack() as files:
        output = _RowsToMeasure(files.enter_context(rows_file.open("w", encoding="utf-8")))
        seen = files.enter_context(_SeenRows(folder))
        for row in rows:
            if check.num_rows % _ROWS_BETWEEN_LOOKS == 0:
                look_up()
            check.num_rows += 1
            if row.example is None:
                _note_bad(check, row)
                continue
            text = json.dumps(row.example, ensure_ascii=False)
            seen.add(row.line, text)
            if len(text) > MAX_MEASURED_ROW_CHARS:
                check.num_unmeasured_long_rows += 1
                if len(check.unmeasured_long_lines) < MAX_LISTED:
                    check.unmeasured_long_lines.append(row.line)
            else:
                output.offer(row.line, row.example, len(text))
        pairs = heapq.nsmallest(MAX_LISTED, _counted(seen.repeats(look_up), check))
    check.duplicate_rows = [{"line": line, "first_line": first_line} for line, first_line in pairs]
    return check


def _counted(pairs: Iterable[tuple[int, int]], check: RowCheck) -> Iterator[tuple[int, int]]:
    for pair in pairs:
        check.num_duplicate_rows += 1
        yield pair


def _note_bad(check: RowCheck, row: CheckedRow) -> None:
    check.num_bad_rows += 1
    if len(check.bad_rows) < MAX_LISTED:
        check.bad_rows.append(_bad_row(row.problems))


def _bad_row(problems: tuple[RowProblem, ...]) -> dict[str, Any]:
    first, num_others = problems[0], len(problems) - 1
    others = f", and {num_others} more fault{'s' * (num_others > 1)} in this row" if num_others else ""
    column = {} if first.column is None else {"column": first.column}
    return {
        "line": first.line,
        **column,
        "problem": first.problem + others,
        "cure": f"write {first.expected}",
    }


class _RowsToMeasure:
    """Writes the first rows, up to limits."""

    def __init__(self, output: TextIO) -> None:
        self._output = output
        self._num_rows = 0
        self._num_chars = 0

    def offer(self, line: int, example: Example, num_chars: int) -> None:
        self._num_chars += num_chars
        if self._num_rows < MAX_MEASURED_ROWS and self._num_chars <= MAX_MEASURED_CHARS:
            self._num_rows += 1
            self._output.write(json.dumps({"line": line, "row": example}) + "\n")


class _SeenRows:
    """Finds rows that are alike, by a hash of 128 bits.

    The hashes of all rows may be too many for the memory, so they are sorted into files by their first
    bits, where like meets like, and each file is looked through by itself.
    """

    _RECORD = struct.Struct("<16sI")
    _NUM_FILES = 64

    def __init__(self, folder: Path) -> None:
        self._paths = [folder / f"hashes-{number:02x}" for number in range(self._NUM_FILES)]
        self._files: list[BinaryIO] = []

    def __enter__(self) -> _SeenRows:
        self._files = [path.open("wb", buffering=8192) for path in self._paths]
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()

    def add(self, line: int, text: str) -> None:
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        self._files[digest[0] % self._NUM_FILES].write(self._RECORD.pack(digest, line))

    def repeats(self, look_up: Callable[[], None]) -> Iterator[tuple[int, int]]:
        """Yields the line of each row that was there before, with the first line like it."""
        for file, path in zip(self._files, self._paths, strict=True):
            look_up()
            file.close()
            first_lines: dict[bytes, int] = {}
            for digest, line in self._RECORD.iter_unpack(path.read_bytes()):
                if (first_line := first_lines.setdefault(digest, line)) != line:
                    yield line, first_line
