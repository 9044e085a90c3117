"""The CSV checker against the csv module, against an oracle regex, and at every cut between chunks."""

from __future__ import annotations

import csv
import io
import random
import re
import tracemalloc

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from dataset_svc.csv_rows import CsvChecker, CsvSummary, iter_csv_rows
from svc_kit.errors import MalformedFile
from tests.cases import num_cases

# Few characters, all with a part to play, so that short files reach every transition.
MARKS = st.sampled_from(["a", "b", " ", ",", '"', '""', '",', ',"', "\n", "\r\n", "\r", "é", "𝄞", "\ufeff"])
CSV_LIKE = st.lists(MARKS, max_size=24).map(lambda marks: "".join(marks).encode())
TABLES = st.integers(1, 4).flatmap(
    lambda width: st.lists(
        st.lists(st.text('ab ,"\r\né\ufeff', max_size=6), min_size=width, max_size=width), max_size=6
    ).map(lambda rows: [[f"c{number}" for number in range(width)], *rows])
)


class ScanOnlyChecker(CsvChecker):
    """Judges without the fast way, which must never change a verdict."""

    def _skim(self, data: bytes) -> bool:
        return False


def check(data: bytes, chunk_sizes: list[int] | None = None, checker: CsvChecker | None = None) -> CsvSummary:
    checker = checker or CsvChecker()
    start = 0
    for size in chunk_sizes or []:
        checker.feed(data[start : start + size])
        start += size
    checker.feed(data[start:])
    return checker.finish()


def verdict(
    data: bytes, chunk_sizes: list[int] | None = None, checker: CsvChecker | None = None
) -> CsvSummary | tuple[str, dict[str, str]]:
    try:
        return check(data, chunk_sizes, checker)
    except MalformedFile as error:
        return error.message, dict(error.details)


def fails(data: bytes, **limits: int) -> MalformedFile:
    with pytest.raises(MalformedFile) as caught:
        check(data, checker=CsvChecker(**limits))
    return caught.value


def oracle_row_count(text: str) -> int | None:
    """The rule once more, as one regular expression over a whole file; None if it isn't met."""
    field = r'(?:"(?:[^"]|"")*"|[^",\r\n]*)'
    header = re.match(rf"(?!\r?\n){field}(?:,{field})*(?=\r?\n|\Z)", text)
    if header is None or not header[0]:
        return None
    names = next(csv.reader([header[0]], strict=True))
    if len(set(names)) < len(names) or not all(name.strip() for name in names):
        return None
    record = rf"(?!\r?\n|\Z){field}(?:,{field}){{{len(names) - 1}}}(?=\r?\n|\Z)"
    rest = text[header.end() :]
    body = re.fullmatch(rf"((?:\r?\n{record})*)(?:\r?\n)*", rest)
    return None if body is None else len(re.findall(rf"\r?\n{record}", body[1]))


@pytest.mark.parametrize(
    ("data", "columns", "row_count"),
    [
        (b"a,b\n1,2\n", ("a", "b"), 1),
        (b"a,b\r\n1,2\r\n", ("a", "b"), 1),
        (b"a,b\n1,2", ("a", "b"), 1),
        (b"a,b\n1,2\r\n3,4\n", ("a", "b"), 2),
        (b"a,b", ("a", "b"), 0),
        (b"a,b\n", ("a", "b"), 0),
        (b"\xef\xbb\xbfa,b\n1,2\n", ("a", "b"), 1),
        (b'\xef\xbb\xbf"a",b\n1,2\n', ("a", "b"), 1),
        (b'a,b\n"x\ny","p ""q"", r"\n', ("a", "b"), 1),
        (b'a,b\n"x\r\ny\rz",\n', ("a", "b"), 1),
        (b'"a\nb","c,""d"\n1,2\n', ("a\nb", 'c,"d'), 1),
        (b'a\n""\nx\n', ("a",), 2),
        (b"a,b\n,\n", ("a", "b"), 1),
        (b"a,b\n1,2\n\n\r\n\n", ("a", "b"), 1),
        (b"a\n1\n\n", ("a",), 1),
        (" a,é\n1,ö\n".encode(), (" a", "é"), 1),
        (b"a\n  \n", ("a",), 1),
    ],
)
def test_accepts(data: bytes, columns: tuple[str, ...], row_count: int) -> None:
    assert check(data) == CsvSummary(columns, row_count, len(data))


@pytest.mark.parametrize(
    ("data", "words", "details"),
    [
        (b"", ["empty", "header row"], {"line": "1"}),
        (b"\xef\xbb\xbf", ["empty"], {"line": "1"}),
        (b"\na,b\n", ["Line 1 is blank"], {"line": "1"}),
        (b"a,,b\n", ["column 2 has no name"], {"line": "1", "column": "2"}),
        (b",question\n", ["column 1 has no name", "index=False"], {"column": "1"}),
        (b"a, \n", ["column 2 has no name"], {"column": "2"}),
        (b"a,b,a\n", ['columns 1 and 3 have the same name "a"'], {"column": "3"}),
        (b"a,b\n1,2\n1,2,3\n", ["Line 3", "3 columns", "2 columns", "in quotes"], {"line": "3"}),
        (b"a,b\n1\n", ["Line 2", "1 column,", 'column 2 ("b")'], {"line": "2", "column": "2"}),
        (b'a,b\n"1\n\n",2\n5\n', ["Line 5"], {"line": "5"}),
        (b"a;b\n1,5;2\n", ["Line 2", "semicolons"], {"line": "2"}),
        (b"a\tb\n1,5\t2\n", ["tabs"], {"line": "2"}),
        (b'a,b\n1,x"y\n', ['Line 2, column 2 ("b")', "quote inside a value", "twice"], {"column": "2"}),
        (b'a,b\n1, "y"\n', ["quote inside a value"], {"line": "2", "column_name": "b"}),
        (b'a,b\n"1"x,2\n', ['Line 2, column 1 ("a")', "after a value's closing quote"], {"line": "2"}),
        (
            b'a,b\n"1\n2" ,2\n',
            ['Line 3 (in the row that starts on line 2), column 1 ("a")'],
            {"line": "3", "row_line": "2"},
        ),
        (b'a,b\n1,2\n3,"x\ny\n', ["Line 3", "line 3", "not closed by the end"], {"line": "3", "column": "2"}),
        (
            b'a,b\n"p\nq","x ""y""\nz\n',
            ["Line 3 (in the row that starts on line 2), column 2"],
            {"line": "3", "row_line": "2"},
        ),
        (b'"a,b\n', ["Line 1, column 1", "not closed"], {"line": "1"}),
        (b"a,b\n1,2\n\n3,4\n", ["Line 3 is blank, but rows follow", '""'], {"line": "3"}),
        (b"a\n1\n\n\n2\n", ["Line 3 is blank"], {"line": "3"}),
        (b"a,b\r1,2\r", ["carriage return", "LF or CRLF"], {"line": "1"}),
        (b"a,b\n1,2\r", ["carriage return"], {"line": "2"}),
        (b'a,b\n1,"2"\rx\n', ["carriage return"], {"line": "2"}),
        (b"a,b\n1,\x002\n", ["Line 2, column 2", "NUL byte at byte offset 6"], {"line": "2"}),
        (
            b"a,b\n1,2\n3,caf\xe9\n",
            ["Line 3, column 2", "0xE9 at byte offset 13", "CSV UTF-8"],
            {"line": "3"},
        ),
        (b"a,b\n1,\xc3", ["0xC3 at byte offset 6"], {"line": "2"}),
        (b"a,b\n1,\xed\xa0\x80\n", ["0xED", "not UTF-8"], {"line": "2"}),
        (b"PK\x03\x04\x14\x00\x06", ["Excel workbook"], {"line": "1"}),
        ("a,b\n".encode("utf-16"), ["UTF-16"], {"line": "1"}),
        (b"\x1f\x8b\x08\x00", ["gzip"], {"line": "1"}),
    ],
)
def test_refuses_with_place_and_remedy(data: bytes, words: list[str], details: dict[str, str]) -> None:
    error = fails(data)
    for word in words:
        assert word in error.message
    assert details.items() <= dict(error.details).items()
    assert verdict(data, [1] * len(data)) == (error.message, dict(error.details))


def test_the_earliest_fault_is_the_one_named() -> None:
    assert 'column 1 ("a")' in fails(b'a,b\nx"y,\x00\xff\n').message
    assert "NUL" in fails(b'a,b\n\x00,x"y\xff\n').message


def test_caps_the_columns() -> None:
    names = [f"c{number}" for number in range(1_001)]
    assert len(check(",".join(names[:1_000]).encode()).columns) == 1_000
    assert "1,001 columns" in fails(",".join(names).encode()).message
    assert "At most 2 are allowed" in fails(b"a,b,c\n", max_columns=2).message


def test_caps_a_record() -> None:
    assert check(b'a\n"1234567890"\n', checker=CsvChecker(max_record_bytes=12)).row_count == 1
    error = fails(b'a\n"12345678901"\n', max_record_bytes=12)
    assert "starts on line 2 is larger than 12 bytes" in error.message
    # Even one that never ends, after which its other faults don't matter.
    assert fails(b'a\n"' + b"x\n" * 50, max_record_bytes=12).message == error.message
    assert fails(b"a\n1234567890123" + b'x"', max_record_bytes=12).message == error.message
    assert "header row" in fails(b"x" * 70_000).message


@pytest.mark.parametrize(
    "row",
    [b"x" * 100, b'"' + b"y\n" * 50 + b'"', b"," * 100, b'""' * 50],
    ids=["plain", "lines in quotes", "commas", "quotes"],
)
def test_a_row_without_end_is_refused_in_flat_memory(row: bytes) -> None:
    checker = CsvChecker(max_record_bytes=4_000_000)
    checker.feed(b"a,b\n" + row[:1])
    chunk = row[1:-1] * 500

    def feed_without_end() -> None:
        while True:
            checker.feed(chunk)

    tracemalloc.start()
    try:
        with pytest.raises(MalformedFile, match="larger than 4,000,000 bytes"):
            feed_without_end()
        assert tracemalloc.get_traced_memory()[1] < 3_000_000
    finally:
        tracemalloc.stop()


@settings(deadline=None, max_examples=num_cases(600))
@given(CSV_LIKE, st.lists(st.integers(0, 5), max_size=30))
@example(b'a\n"x""y\n', [6])
@example(b"a,b\nx,y\r\n", [8])
@example(b'a\n"\n""\n', [5])
def test_cuts_never_change_the_verdict(data: bytes, chunk_sizes: list[int]) -> None:
    for header in (b"", b"a,b\n"):
        whole = verdict(header + data)
        assert verdict(header + data, chunk_sizes) == whole
        assert verdict(header + data, [1] * len(data) + [1] * len(header)) == whole
        assert verdict(header + data, checker=ScanOnlyChecker()) == whole


@settings(deadline=None, max_examples=num_cases(300))
@given(
    st.lists(
        st.sampled_from([b"a", b",", b'"', b"\n", b"\r", b"\xc3", b"\xa9", b"\xe2\x82", b"\0"]), max_size=20
    ),
    st.lists(st.integers(0, 3), max_size=30),
    st.integers(1, 8),
)
def test_cuts_never_change_the_verdict_on_foreign_bytes(
    pieces: list[bytes], chunk_sizes: list[int], max_record_bytes: int
) -> None:
    data = b"a,b\n" + b"".join(pieces)
    whole = verdict(data, checker=CsvChecker(max_record_bytes=max_record_bytes))
    assert verdict(data, chunk_sizes, CsvChecker(max_record_bytes=max_record_bytes)) == whole
    assert verdict(data, checker=ScanOnlyChecker(max_record_bytes=max_record_bytes)) == whole


@settings(deadline=None, max_examples=num_cases(600))
@given(CSV_LIKE)
def test_agrees_with_the_rule_as_one_regex(data: bytes) -> None:
    for header in (b"", b"a,b\n", b"a\n"):
        text = (header + data).decode().removeprefix("\ufeff")
        try:
            row_count: int | None = check(header + data).row_count
        except MalformedFile:
            row_count = None
        assert row_count == oracle_row_count(text)


@settings(deadline=None, max_examples=num_cases(200))
@given(TABLES, st.sampled_from(["\n", "\r\n"]), st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]))
def test_accepts_and_reads_back_what_the_csv_module_writes(
    table: list[list[str]], line_end: str, quoting: int
) -> None:
    # Python 3.11's writer leaves a lone CR unquoted where its own line end has none, against RFC 4180.
    assume(
        line_end == "\r\n"
        or quoting == csv.QUOTE_ALL
        or not any("\r" in cell for row in table for cell in row)
    )
    written = io.StringIO(newline="")
    csv.writer(written, lineterminator=line_end, quoting=quoting).writerows(table)  # type: ignore[arg-type]
    data = written.getvalue().encode()
    assert check(data) == CsvSummary(tuple(table[0]), len(table) - 1, len(data))
    rows = list(iter_csv_rows(io.BytesIO(data)))
    assert [list(row.values()) for _, row in rows] == table[1:]
    starts = [line for line, _ in rows]
    assert starts == sorted(set(starts))


def test_rows_carry_their_line() -> None:
    data = b'\xef\xbb\xbfa,b\r\n"x\ny\r","1"\r\nz,2\r\n\r\n'
    file = io.BytesIO(data)
    assert list(iter_csv_rows(file)) == [(2, {"a": "x\ny\r", "b": "1"}), (4, {"a": "z", "b": "2"})]
    assert not file.closed


def test_reads_cells_past_the_csv_modules_own_limit() -> None:
    data = b"a\n" + b"x" * 200_000 + b"\n"
    assert check(data).row_count == 1
    assert [len(row["a"]) for _, row in iter_csv_rows(io.BytesIO(data))] == [200_000]


def test_a_large_file_with_one_late_fault_names_its_line() -> None:
    rng = random.Random(7)
    rows = [f'"question {n}\nwith ""two"" lines é","{"x" * rng.randrange(400)}"\n' for n in range(8_000)]
    good = ("question,answer\n" + "".join(rows)).encode()
    assert len(good) > 1_500_000
    assert check(good).row_count == 8_000
    sizes = [rng.randrange(1, 9_000) for _ in range(500)]
    assert check(good, sizes).row_count == 8_000
    broken = good + b'"a","b" c\n'
    assert fails(broken).details["line"] == str(2 + 2 * 8_000)
    assert verdict(broken, sizes) == verdict(broken)
