"""CSV files: checked while they arrive, and read row by row afterwards.

The rule is RFC 4180 in UTF-8 with a header row; `docs/data-formats.md` states it for users. The checker
is an automaton over bytes with two ways through a piece of data: `_skim` judges a whole piece with a few
C-speed passes and `_scan` steps from mark to mark. `_skim` only ever says "faultless" or "don't know", so
`_scan` alone decides what is an error, and the place of the cuts between chunks never changes the verdict.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import BinaryIO, NoReturn

from dataset_svc.text_gate import BadByte, TextGate
from svc_kit.errors import MalformedFile

MAX_RECORD_BYTES = 16 * 1024 * 1024
MAX_HEADER_BYTES = 64 * 1024
MAX_COLUMNS = 1_000

_PIECE_BYTES = 1024 * 1024
_QUOTE, _COMMA, _CR, _LF = b'",\r\n'
_PLAIN_RUN = re.compile(rb'[^",\r\n]++')
_LINE_ENDS = re.compile(rb"(?:\r?\n)++")
_TO_CLASSES = bytes(byte if byte in b'",\r\n' else ord("x") for byte in range(256))


class _Place(Enum):
    """Where in a record the automaton stands; the value's first byte is what `_skim` writes for it."""

    RECORD_START = b"\n"
    FIELD_START = b","
    UNQUOTED = b"x"
    QUOTED = b'"open'
    QUOTE_CLOSED = b'"'
    CARRIAGE_RETURN = b"\r"


@dataclass(frozen=True)
class CsvSummary:
    """What is known of a faultless file.

    Attributes:
        columns: the header's names, in order.
        row_count: rows below the header; 0 if there is only a header.
        size_bytes: the file's size, a byte-order mark included.
    """

    columns: tuple[str, ...]
    row_count: int
    size_bytes: int


class CsvChecker:
    """Checks a CSV file pushed to it in chunks of any size, in memory that doesn't grow with the file.

    `feed` every chunk, then `finish` once. After an error the checker is spent.
    """

    def __init__(self, *, max_record_bytes: int = MAX_RECORD_BYTES, max_columns: int = MAX_COLUMNS) -> None:
        """Args:
        max_record_bytes: the largest row, its line end left out.
        max_columns: the most columns a header may have.
        """
        self._max_record_bytes = max_record_bytes
        self._max_columns = max_columns
        self._gate = TextGate()
        self._header = bytearray()
        self._columns: tuple[str, ...] = ()
        self._row_count = 0
        self._line = 1
        self._first_blank_line: int | None = None
        # The record under way.
        self._place = _Place.RECORD_START
        self._record_line = 1
        self._record_bytes = 0
        self._num_commas = 0
        self._quote_line = 1

    def feed(self, chunk: bytes) -> None:
        """Takes the file's next bytes.

        Raises:
            MalformedFile: the bytes so far can't be the start of a valid file.
        """
        for start in range(0, len(chunk), _PIECE_BYTES):
            text, bad = self._gate.push(chunk[start : start + _PIECE_BYTES])
            self._take(text)
            if bad:
                self._fail_at_byte(bad)

    def finish(self) -> CsvSummary:
        """Says that the file ends here.

        Raises:
            MalformedFile: the file is empty, or ends inside a quoted value or a character, or its last row
                is wrong.
        """
        bad = self._gate.finish()
        if bad:
            self._fail_at_byte(bad)
        if self._place is _Place.QUOTED:
            self._fail(
                f"the value that opens with a quote on line {self._quote_line} is not closed by the end of "
                "the file. Close it with a quote, and write a quote inside a quoted value twice",
                line=self._quote_line,
            )
        if self._place is _Place.CARRIAGE_RETURN:
            self._fail_at_carriage_return()
        if self._place is not _Place.RECORD_START:
            self._end_record()
        if not self._columns:
            raise MalformedFile("The file is empty. Expected a header row with the column names.", line=1)
        return CsvSummary(self._columns, self._row_count, self._gate.size_bytes)

    def _take(self, text: bytes) -> None:
        if text and not self._columns:
            consumed = self._scan(text, stop_after_record=True)
            text = text[consumed:]
        if text and not self._skim(text):
            self._scan(text)

    def _skim(self, data: bytes) -> bool:
        """Judges all of `data` at once; False, with nothing changed, if it may hold anything unusual.

        Every quoted stretch shrinks to one quote (so a doubled quote shows as two in a row) and every
        other byte to its class. What stays of a faultless row is its commas and its line end, so the rows
        are right if that skeleton is the header's, repeated.
        """
        if self._first_blank_line is not None or self._record_bytes + len(data) > self._max_record_bytes:
            return False
        parts = data.split(b'"')
        starts_quoted = self._place is _Place.QUOTED
        ends_quoted = starts_quoted != (len(parts) % 2 == 0)
        quoted, outside = (parts[::2], parts[1::2]) if starts_quoted else (parts[1::2], parts[::2])
        known = self._record_so_far()
        shrunk = known + b'"'.join(outside).translate(_TO_CLASSES)
        if ends_quoted and len(parts) > 1:
            shrunk += b'"'
        if b'"' in shrunk and (b'x"' in shrunk or b'"x' in shrunk):
            return False
        if b"\r" in shrunk:
            if shrunk.count(b"\r") != shrunk.count(b"\r\n") + shrunk.endswith(b"\r"):
                return False
            shrunk = shrunk.replace(b"\r\n", b"\n")
        if b"\n\n" in shrunk:
            return False
        tail_start = shrunk.rfind(b"\n") + 1
        skeleton = shrunk[:tail_start].translate(None, b'x"')
        num_rows = skeleton.count(b"\n") - 1
        if skeleton != b"\n" + (b"," * (len(self._columns) - 1) + b"\n") * num_rows:
            return False
        self._line += data.count(b"\n")
        self._row_count += num_rows
        tail = shrunk[tail_start:]
        self._resume_after(data, tail, known[1:] if not num_rows else None, quoted, ends_quoted)
        return True

    def _record_so_far(self) -> bytes:
        """The record under way as `_skim` shrinks it, after the line end before it."""
        # More commas than the header has are wrong already, however many.
        commas = b"," * min(self._num_commas, len(self._columns))
        if self._place in (_Place.RECORD_START, _Place.FIELD_START):
            return b"\n" + commas
        return b"\n" + commas + self._place.value[:1]

    def _resume_after(
        self, data: bytes, tail: bytes, known: bytes | None, quoted: list[bytes], ends_quoted: bool
    ) -> None:
        """Sets the state at the end of a skimmed piece.

        Args:
            data: the piece.
            tail: the shrunken record under way at its end.
            known: the part of `tail` from before the piece; None if the record began in the piece.
            quoted: the piece's quoted stretches.
            ends_quoted: whether the last stretch is still open.
        """

        def last_stretches(count: int) -> bytes:
            return b"".join(quoted[len(quoted) - count :])

        if known is None:
            num_stretches = tail.count(b'"')
            in_quotes = last_stretches(num_stretches)
            self._record_line = self._line - in_quotes.count(b"\n")
            self._record_bytes = len(tail) + num_stretches - ends_quoted + len(in_quotes)
            self._num_commas = tail.count(b",")
        else:
            self._record_bytes += len(data)
            self._num_commas += tail.count(b",") - known.count(b",")
        if tail.endswith(b'"'):
            before_value = len(tail.rstrip(b'"'))
            if known is None or before_value >= len(known):
                self._quote_line = self._line - last_stretches(len(tail) - before_value).count(b"\n")
        self._place = _Place.QUOTED if ends_quoted else _Place(tail[-1:] or b"\n")

    def _scan(self, data: bytes, *, stop_after_record: bool = False) -> int:
        """Steps through `data` from mark to mark; returns how much of it was taken."""
        index = 0
        while index < len(data):
            byte = data[index]
            end = index + 1
            if self._place is _Place.QUOTED:
                end = data.find(b'"', index) + 1 or len(data)
                self._line += data.count(b"\n", index, end)
                if data[end - 1] == _QUOTE:
                    self._place = _Place.QUOTE_CLOSED
            elif self._place is _Place.CARRIAGE_RETURN and byte != _LF:
                self._fail_at_carriage_return()
            elif self._place is _Place.RECORD_START and (blank := _LINE_ENDS.match(data, index)):
                end = blank.end()
                self._pass_blank_lines(data.count(b"\n", index, end))
            elif byte == _LF and self._place is _Place.CARRIAGE_RETURN and self._record_bytes == 1:
                self._pass_blank_lines(1)
            elif byte == _LF:
                if not self._columns:
                    self._header += data[:index]
                self._end_record()
                self._start_record(self._line + 1)
            else:
                end = self._step_outside_quotes(data, index)
            if self._place is not _Place.RECORD_START:
                self._record_bytes += end - index
            elif stop_after_record:
                return end
            index = end
        if not self._columns:
            self._header += data
        self._check_record_size()
        return len(data)

    def _step_outside_quotes(self, data: bytes, index: int) -> int:
        """Takes one mark, or one run of other bytes, of a record; returns its end."""
        byte = data[index]
        at_start = self._place in (_Place.RECORD_START, _Place.FIELD_START)
        if byte == _CR:
            # At a record's start this may still turn out to be a blank line.
            self._place = _Place.CARRIAGE_RETURN
            return index + 1
        if self._first_blank_line is not None:
            self._fail_at_blank_line()
        if byte == _COMMA:
            self._num_commas += 1
            self._place = _Place.FIELD_START
            return index + 1
        if byte == _QUOTE:
            if self._place is _Place.UNQUOTED:
                self._fail(
                    "a quote inside a value that doesn't start with one. Put the whole value in quotes and "
                    "write the quote inside it twice"
                )
            if at_start:
                self._quote_line = self._line
            self._place = _Place.QUOTED
            return index + 1
        if self._place is _Place.QUOTE_CLOSED:
            self._fail(
                "text after a value's closing quote. Expected a comma or the end of the line; write a quote "
                "inside a quoted value twice"
            )
        self._place = _Place.UNQUOTED
        run = _PLAIN_RUN.match(data, index)
        assert run is not None
        return run.end()

    def _pass_blank_lines(self, count: int) -> None:
        if not self._columns:
            raise MalformedFile("Line 1 is blank. Expected a header row with the column names.", line=1)
        if self._first_blank_line is None:
            self._first_blank_line = self._line
        self._start_record(self._line + count)

    def _start_record(self, line: int) -> None:
        self._line = self._record_line = line
        self._place = _Place.RECORD_START
        self._record_bytes = 0
        self._num_commas = 0

    def _end_record(self) -> None:
        self._check_record_size()
        if not self._columns:
            self._columns = self._read_header()
            return
        found, expected = self._num_commas + 1, len(self._columns)
        if found != expected:
            if found < expected:
                what = f'column {found + 1} ("{_shorten(self._columns[found])}") is the first that is missing'
            else:
                what = "a value that contains a comma or a line break must stand in quotes"
            if expected == 1 and (separator := _other_separator(self._columns[0])):
                what = f"the header has no comma but {separator}; columns must be separated by commas"
            raise MalformedFile(
                f"Line {self._record_line}: this row has {_count(found)}, but the header has "
                f"{_count(expected)}: {what}.",
                line=self._record_line,
                column=min(found, expected) + 1,
            )
        self._row_count += 1

    def _read_header(self) -> tuple[str, ...]:
        if self._num_commas >= self._max_columns:
            raise MalformedFile(
                f"The header on line 1 has {self._num_commas + 1:,} columns. At most {self._max_columns:,} "
                "are allowed.",
                line=1,
            )
        text = self._header.decode().removesuffix("\r")
        self._header.clear()
        columns: tuple[str, ...] = tuple(next(csv.reader([text], strict=True), [""]))
        first_number: dict[str, int] = {}
        for number, name in enumerate(columns, start=1):
            if not name.strip():
                raise MalformedFile(
                    f"Line 1: column {number} has no name. Name every column in the header (pandas writes an "
                    "unnamed first column unless told index=False).",
                    line=1,
                    column=number,
                )
            if name in first_number:
                raise MalformedFile(
                    f"Line 1: columns {first_number[name]} and {number} have the same name "
                    f'"{_shorten(name)}". Give every column a name of its own.',
                    line=1,
                    column=number,
                )
            first_number[name] = number
        return columns

    def _check_record_size(self) -> None:
        limit = self._max_record_bytes if self._columns else min(self._max_record_bytes, MAX_HEADER_BYTES)
        if self._record_bytes > limit:
            what = "row" if self._columns else "header row"
            raise MalformedFile(
                f"The {what} that starts on line {self._record_line} is larger than {limit:,} bytes, the "
                "most that is allowed. If it should be smaller, look for a quote that is never closed.",
                line=self._record_line,
            )

    def _fail_at_blank_line(self) -> NoReturn:
        raise MalformedFile(
            f"Line {self._first_blank_line} is blank, but rows follow it. Remove it: blank lines may stand "
            'only at the end of the file (write a row with one empty value as "").',
            line=self._first_blank_line,
        )

    def _fail_at_carriage_return(self) -> NoReturn:
        self._fail(
            "a carriage return that no line feed follows. End lines with LF or CRLF, and put a value that "
            "contains a carriage return in quotes"
        )

    def _fail_at_byte(self, bad: BadByte) -> NoReturn:
        self._fail(f"{bad.found}. {bad.mend}")

    def _fail(self, problem: str, *, line: int | None = None) -> NoReturn:
        """Raises for a fault at the present place in the record, unless the record is too large already."""
        self._check_record_size()
        line = line or self._line
        number = self._num_commas + 1
        where = f"Line {line}"
        if line != self._record_line:
            where += f" (in the row that starts on line {self._record_line})"
        where += f", column {number}"
        details: dict[str, object] = {"line": line, "row_line": self._record_line, "column": number}
        if number <= len(self._columns):
            where += f' ("{_shorten(self._columns[number - 1])}")'
            details["column_name"] = self._columns[number - 1]
        raise MalformedFile(f"{where}: {problem}.", **details)


def _shorten(name: str) -> str:
    return name if len(name) <= 60 else name[:60] + "…"


def _count(columns: int) -> str:
    return f"{columns:,} column" + "s" * (columns != 1)


def _other_separator(name: str) -> str | None:
    return next((word for mark, word in ((";", "semicolons"), ("\t", "tabs")) if mark in name), None)


def iter_csv_rows(binary_file: BinaryIO) -> Iterator[tuple[int, dict[str, str]]]:
    """Reads a file that `CsvChecker` has accepted, row by row, blocking; the file stays open.

    Yields:
        The line on which the row starts (from 1), and the row's values by column name.
    """
    # The csv module's limit is one for the process and lower than ours; raising it harms nobody.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_RECORD_BYTES))
    # newline="\n" keeps every byte and counts lines as the checker does: a lone CR in quotes is no line.
    text = io.TextIOWrapper(binary_file, encoding="utf-8-sig", newline="\n")
    try:
        reader = csv.reader(text, strict=True)
        columns = next(reader)
        line = reader.line_num + 1
        for values in reader:
            if values:
                yield line, dict(zip(columns, values, strict=True))
            line = reader.line_num + 1
    finally:
        text.detach()
