"""Section 3, Upload: what is taken, what is refused and why, and that nothing of a refused file stays."""

from __future__ import annotations

import concurrent.futures
import csv
import io
import os
import socket
from collections.abc import Callable, Iterator

import httpx
import hypothesis
import hypothesis.strategies as st
import pytest
import sqlalchemy as sa

from tests.cases import num_cases
from tests.contract.account import DATASETS, DIALOGS, Account, ok, qa_csv, refused
from tests.contract.processes import eventually

FIELDS = {"id", "name", "size_bytes", "row_count", "columns", "created_at"}


@pytest.fixture
def stored_datasets(stored_keys: Callable[[str], list[str]]) -> Callable[[], list[str]]:
    """Lists the keys of datasets; those of jobs come and go meanwhile."""
    return lambda: [key for key in stored_keys("accounts/") if "/datasets/" in key]


@pytest.fixture
def nothing_stored(account: Account) -> Iterator[None]:
    """Checks that the test stores nothing."""
    before = ok(account.http.get(DATASETS))
    yield
    assert ok(account.http.get(DATASETS)) == before


def test_dataset_has_exactly_the_contracts_fields(account: Account) -> None:
    content = qa_csv(3)
    made = ok(account.upload(content), 201)

    assert set(made) == FIELDS
    assert made["name"] == "rows.csv"
    assert made["size_bytes"] == len(content)
    assert type(made["size_bytes"]) is int
    assert type(made["row_count"]) is int
    assert made["row_count"] == 3
    assert made["columns"] == ["question", "answer"]
    assert ok(account.http.get(f"{DATASETS}/{made['id']}")) == made
    assert ok(account.http.get(DATASETS))["data"][0] == made


def test_datasets_are_listed_newest_first(account: Account) -> None:
    made = [account.dataset() for _ in range(3)]

    listed = ok(account.http.get(DATASETS))
    assert set(listed) == {"data"}
    assert [dataset["id"] for dataset in listed["data"][:3]] == made[::-1]


def test_new_account_has_an_empty_list(other_account: Account) -> None:
    assert ok(other_account.http.get(DATASETS)) == {"data": []}


def test_delete_answers_204_once_then_404(account: Account) -> None:
    dataset_id = account.dataset()

    assert account.http.delete(f"{DATASETS}/{dataset_id}").status_code == 204
    refused(account.http.delete(f"{DATASETS}/{dataset_id}"), 404, "not_found", dataset_id)
    refused(account.http.get(f"{DATASETS}/{dataset_id}"), 404, "not_found", dataset_id)
    assert dataset_id not in [each["id"] for each in ok(account.http.get(DATASETS))["data"]]


def test_connection_goes_on_after_a_204(account: Account) -> None:
    with httpx.Client(
        base_url=account.url,
        headers=account.http.headers,
        limits=httpx.Limits(max_connections=1),
        trust_env=False,
    ) as one_connection:
        for _ in range(3):
            dataset_id = account.dataset()
            assert one_connection.delete(f"{DATASETS}/{dataset_id}").status_code == 204
            assert one_connection.get(DATASETS).status_code == 200


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("My rows", "My rows"),
        ("n" * 256, "n" * 256),
        ("\U0001f600" * 256, "\U0001f600" * 256),
        ('a "quoted" \\ / ../name', 'a "quoted" \\ / ../name'),
        ("без имени", "без имени"),
        ("", "rows.csv"),
        ("   ", "rows.csv"),
    ],
)
def test_name_is_shown_instead_of_the_file_name(account: Account, given: str, shown: str) -> None:
    assert ok(account.upload(name=given), 201)["name"] == shown


@pytest.mark.usefixtures("nothing_stored")
@pytest.mark.parametrize("name", ["n" * 257, "\U0001f600" * 257, "n" * 100_000])
def test_name_over_256_characters_is_refused(account: Account, name: str) -> None:
    refused(account.upload(name=name), 400, "invalid_request", "name", "256")


@pytest.mark.parametrize(
    "file_name", ["rows.csv", "ROWS.CSV", "rows.Csv", "a.b.csv", "né.csv", ".csv", "a b.csv"]
)
def test_csv_by_name_in_any_letter_case(account: Account, file_name: str) -> None:
    assert ok(account.upload(file_name=file_name), 201)["name"] == file_name


@pytest.mark.usefixtures("nothing_stored")
@pytest.mark.parametrize(
    "file_name", ["rows.txt", "rows", "rows.csv.gz", "rows.tsv", "rows.jsonl", "csv", "rows.csv ."]
)
def test_any_other_name_is_refused(account: Account, file_name: str) -> None:
    refused(account.upload(file_name=file_name), 400, "invalid_request", ".csv")
    refused(account.upload(file_name=file_name, name="rows.csv"), 400, "invalid_request", ".csv")


def test_folders_of_a_file_name_are_left_out(account: Account) -> None:
    assert ok(account.upload(file_name="C:\\data\\..\\rows.csv"), 201)["name"] == "rows.csv"
    assert ok(account.upload(file_name="../../etc/rows.csv"), 201)["name"] == "rows.csv"


@pytest.mark.parametrize(
    ("content", "columns", "row_count"),
    [
        (b"\xef\xbb\xbfquestion,answer\na,b\n", ["question", "answer"], 1),
        (b'\xef\xbb\xbf"question",answer\na,b\n', ["question", "answer"], 1),
        (b"question,answer\r\na,b\r\nc,d\r\n", ["question", "answer"], 2),
        (b"question,answer\na,b", ["question", "answer"], 1),
        (b'question,answer\n"a\nb\r\nc","d ""e"", f"\n', ["question", "answer"], 1),
        (b'"a ""b""","c,d"\n1,2\n', ['a "b"', "c,d"], 1),
        (b'"a\nb",c\n1,2\n', ["a\nb", "c"], 1),
        (b"text\n" + b"x" * 3_000_000 + b"\n", ["text"], 1),
        (b"question,answer\n", ["question", "answer"], 0),
        (b"question,answer", ["question", "answer"], 0),
        (b"question,Question\n,\n", ["question", "Question"], 1),
        (" spaced ,ünï,\U0001f600\n1,2,3\n".encode(), [" spaced ", "ünï", "\U0001f600"], 1),
        (b"a,b\n1,2\n\n\r\n\n", ["a", "b"], 1),
        (b"a,b\n,\n,\n", ["a", "b"], 2),
        (b"a\n=1+1\n", ["a"], 1),
        (",".join(f"c{n}" for n in range(1000)).encode(), [f"c{n}" for n in range(1000)], 0),
    ],
    ids=[
        *("bom", "bom and quote", "crlf", "no last line end", "quoted newlines", "quoted header"),
        *(
            "newline in a name",
            "long value",
            "header only",
            "header without line end",
            "names differ in case",
        ),
        *("names as they are", "blank lines at the end", "empty values", "formula", "1000 columns"),
    ],
)
def test_rfc_4180_is_taken(account: Account, content: bytes, columns: list[str], row_count: int) -> None:
    made = ok(account.upload(content), 201)

    assert made["columns"] == columns
    assert made["row_count"] == row_count
    assert made["size_bytes"] == len(content)


@pytest.mark.usefixtures("nothing_stored")
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\n", ("ine 1", "header")),
        (b"   \n1\n", ("ine 1", "column 1", "no name")),
        (b"a,,c\n1,2,3\n", ("ine 1", "column 2", "no name")),
        (b"a,b,\n1,2,3\n", ("ine 1", "column 3", "no name")),
        (b"a,b,a\n1,2,3\n", ("ine 1", "columns 1 and 3", "same name", '"a"')),
        (b'"a",a\n1,2\n', ("ine 1", "columns 1 and 2", "same name")),
        (b"a,b\n1,2\n3\n", ("ine 3", "1 column", "2 columns", '"b"')),
        (b"a,b\n1,2\n3,4,5\n", ("ine 3", "3 columns", "2 columns", "quotes")),
        (b"a,b\r\n1,2\r\n\r\n3,4\r\n", ("ine 3", "blank")),
        (b'a,b\n"1\n2",3\n4\n', ("ine 4", "1 column")),
        (b'a,b\n1,2\n3,"4\n5,6\n', ("ine 3", "column 2", '"b"', "not closed")),
        (b'a,b\n1,2"3\n', ("ine 2", "column 2", '"b"', "quote")),
        (b'a,b\n"1"2,3\n', ("ine 2", "column 1", '"a"', "closing quote")),
        (b"a,b\n1,2\n3,\x004\n", ("ine 3", "column 2", "NUL")),
        (b"a,b\n1,2\n\xff\xfe,3\n", ("ine 3", "column 1", "0xFF", "UTF-8")),
        (b"a,b\n1,caf\xe9\n", ("ine 2", "column 2", "0xE9", "UTF-8")),
        (b"a,b\n1,2\xc3", ("ine 2", "column 2", "UTF-8")),
        (b"a,b\n1,\xed\xa0\x80\n", ("ine 2", "column 2", "UTF-8")),
        (b"a,b\n1,\xc0\xaf\n", ("ine 2", "column 2", "UTF-8")),
        ("a,b\n1,2\n".encode("utf-16"), ("ine 1", "UTF-16")),
        (b"PK\x03\x04\x14\x00rest", ("Excel",)),
        (b"a,b\r1,2\r", ("ine 1", "carriage return")),
        (b"a;b\n1;2,3\n", ("ine 2", "semicolons")),
        (",".join(f"c{n}" for n in range(1001)).encode(), ("ine 1", "1,001", "1,000")),
    ],
)
def test_broken_file_names_line_column_and_what_was_expected(
    account: Account, content: bytes, words: tuple[str, ...]
) -> None:
    refused(account.upload(content), 400, "malformed_file", *words)


@pytest.mark.usefixtures("nothing_stored")
def test_error_far_into_a_file_is_found(account: Account) -> None:
    content = b"question,answer\n" + b"What?,That.\n" * 200_000 + b"What?\n"

    refused(account.upload(content), 400, "malformed_file", "ine 200002", '"answer"')


BOUNDARY = "x" * 20


def multipart(*parts: tuple[str, bytes], end: bool = True) -> bytes:
    """A form's body from each part's headers and content."""
    body = b"".join(
        b"--" + BOUNDARY.encode() + b"\r\n" + headers.encode() + b"\r\n\r\n" + content + b"\r\n"
        for headers, content in parts
    )
    return body + (b"--" + BOUNDARY.encode() + b"--\r\n" if end else b"")


FILE = ('Content-Disposition: form-data; name="file"; filename="rows.csv"', qa_csv().encode())
NAME = ('Content-Disposition: form-data; name="name"', b"A name")
CONTENT_TYPE = f"multipart/form-data; boundary={BOUNDARY}"


def post_form(account: Account, body: bytes, content_type: str = CONTENT_TYPE) -> httpx.Response:
    return account.http.post(DATASETS, content=body, headers={"Content-Type": content_type})


def test_parts_may_come_in_either_order(account: Account) -> None:
    assert ok(post_form(account, multipart(FILE, NAME)), 201)["name"] == "A name"
    assert ok(post_form(account, multipart(NAME, FILE)), 201)["name"] == "A name"


def test_body_of_unknown_length_is_taken(account: Account) -> None:
    body = multipart(FILE, NAME)
    pieces = (body[start : start + 7] for start in range(0, len(body), 7))

    assert ok(account.http.post(DATASETS, content=pieces, headers={"Content-Type": CONTENT_TYPE}), 201)


@pytest.mark.usefixtures("nothing_stored")
@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        (multipart(), "malformed_upload", ("file",)),
        (multipart(NAME), "malformed_upload", ('"file"',)),
        (multipart(FILE, FILE), "malformed_upload", ("two", '"file"')),
        (multipart(FILE, NAME, NAME), "invalid_request", ('"name"', "twice")),
        (multipart(FILE, ('Content-Disposition: form-data; name="x"', b"1")), "invalid_request", ("'x'",)),
        (
            multipart(('Content-Disposition: form-data; name="file"', b"a\n1\n")),
            "malformed_upload",
            ("filename",),
        ),
        (
            multipart(('Content-Disposition: form-data; name="file"; filename=""', b"a\n1\n")),
            "malformed_upload",
            ("filename",),
        ),
        (multipart(FILE, (NAME[0], b"\xff")), "invalid_request", ('"name"', "UTF-8")),
        (multipart(FILE, (NAME[0], b"a\nb")), "invalid_request", ('"name"', "control character")),
        (multipart(FILE, end=False), "malformed_upload", ("cut off",)),
        (multipart(FILE)[:-6], "malformed_upload", ("cut off",)),
        (b"", "malformed_upload", ()),
        (b"hello", "malformed_upload", ()),
    ],
)
def test_broken_form_is_refused(account: Account, body: bytes, code: str, words: tuple[str, ...]) -> None:
    refused(post_form(account, body), 400, code, *words)


@pytest.mark.usefixtures("nothing_stored")
@pytest.mark.parametrize(
    "content_type",
    [
        *("application/json", "text/csv", "multipart/form-data", "multipart/form-data; boundary="),
        *("multipart/mixed; boundary=" + BOUNDARY, "application/x-www-form-urlencoded"),
    ],
)
def test_other_content_types_are_refused(account: Account, content_type: str) -> None:
    refused(post_form(account, multipart(FILE), content_type), 400, "malformed_upload", "Content-Type")


@pytest.mark.usefixtures("nothing_stored")
def test_empty_file_is_refused(account: Account) -> None:
    refused(post_form(account, multipart((FILE[0], b""))), 400, "malformed_file", "empty", "header")
    refused(post_form(account, multipart((FILE[0], b"\xef\xbb\xbf"))), 400, "malformed_file", "empty")


@pytest.mark.usefixtures("nothing_stored")
@pytest.mark.parametrize("announced", [True, False], ids=["content-length", "chunked"])
def test_aborted_upload_stores_nothing(
    account: Account,
    announced: bool,
    stored_datasets: Callable[[], list[str]],
    stack_environment: dict[str, str],
) -> None:
    database = sa.create_engine(stack_environment["TUNERY_DATABASE_URL"].replace("+aiosqlite", ""))

    def uploads_under_way() -> int:
        with database.connect() as connection:
            query = sa.text("SELECT count(*) FROM datasets WHERE status = 'uploading'")
            return int(connection.execute(query).scalar_one())

    before = stored_datasets()
    host, _, port = account.url.removeprefix("http://").partition(":")
    # Over one part of the store's multipart upload, so that bytes have been sent there.
    body = multipart((FILE[0], b"text\n" + b"Some text.\n" * 2_000_000), NAME)[:-10]
    size = f"Content-Length: {len(body) + 10}" if announced else "Transfer-Encoding: chunked"
    head = (
        f"POST {DATASETS} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {account.api_key}\r\n"
        f"Content-Type: {CONTENT_TYPE}\r\n{size}\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head.encode() + (body if announced else b"%x\r\n%s\r\n" % (len(body), body)))
        eventually(lambda: uploads_under_way() == 1, 15, "the upload to be noted")
    eventually(lambda: uploads_under_way() == 0, 15, "the aborted upload to be forgotten")
    database.dispose()
    assert stored_datasets() == before


@pytest.mark.usefixtures("nothing_stored")
def test_refused_files_leave_no_object(account: Account, stored_datasets: Callable[[], list[str]]) -> None:
    before = stored_datasets()
    # Over one part of the store's multipart upload, so that bytes have been sent there.
    refused(account.upload(b"a,b\n" + b"1,2\n" * 5_000_000 + b"3\n"), 400, "malformed_file", "ine 5000002")
    assert stored_datasets() == before


def test_deleted_dataset_leaves_no_object(account: Account, stored_keys: Callable[[str], list[str]]) -> None:
    dataset_id = account.dataset()
    assert [key for key in stored_keys("") if dataset_id in key]

    account.http.delete(f"{DATASETS}/{dataset_id}")
    assert not [key for key in stored_keys("") if dataset_id in key]


def test_uploads_side_by_side_keep_apart(account: Account) -> None:
    contents = [f"c{n}\n".encode() + os.urandom(200_000 + n).hex().encode() + b"\n" for n in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        made = [ok(response, 201) for response in threads.map(account.upload, contents)]

    assert [dataset["columns"] for dataset in made] == [[f"c{n}"] for n in range(8)]
    assert [dataset["size_bytes"] for dataset in made] == [len(content) for content in contents]


@hypothesis.settings(
    max_examples=num_cases(40),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(data=st.data())
def test_whatever_pythons_csv_module_writes_is_taken(account: Account, data: st.DataObject) -> None:
    line_end = data.draw(st.sampled_from(["\n", "\r\n"]))
    quoting = data.draw(st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]))
    # Where lines end with LF, the module quotes no value for its carriage return, and can't read it again.
    is_lost = line_end == "\n" and quoting == csv.QUOTE_MINIMAL
    cells = st.text(st.characters(codec="utf-8", exclude_characters="\0\r" if is_lost else "\0"), max_size=12)
    columns = data.draw(
        st.lists(
            cells.filter(lambda name: bool(name.strip("\ufeff").strip())),
            min_size=1,
            max_size=4,
            unique=True,
        )
    )
    width = len(columns)
    rows = data.draw(st.lists(st.lists(cells, min_size=width, max_size=width), max_size=5))
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator=line_end, quoting=quoting)
    writer.writerows([columns, *rows])

    made = ok(account.upload("\ufeff" + text.getvalue()), 201)
    assert made["columns"] == columns
    assert made["row_count"] == len(rows)
    account.http.delete(f"{DATASETS}/{made['id']}")  # an account may have only so many


@pytest.mark.parametrize("file_name", ["rows.csv", "rows.json", "rows.txt"])
def test_dialogs_are_taken_as_jsonl_by_name_only(account: Account, file_name: str) -> None:
    response = account.http.post(DIALOGS, files={"file": (file_name, b"{}\n")})

    refused(response, 400, "invalid_request", ".jsonl")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("empty",)),
        (b"\n \n", ("empty",)),
        (b"{}\n\xff\n", ("ine 2", "0xFF")),
        (b"{}\n{}\n\x00", ("ine 3", "NUL")),
    ],
)
def test_jsonl_that_is_no_text_is_refused(account: Account, content: bytes, words: tuple[str, ...]) -> None:
    response = account.http.post(DIALOGS, files={"file": ("rows.jsonl", content)})

    refused(response, 400, "malformed_file", *words)


def test_dialogs_dataset_looks_like_any_other(account: Account) -> None:
    content = b'\xef\xbb\xbf{"dialog": []}\r\n\r\n{}'
    files = {"file": ("Rows.JSONL", content)}
    made = ok(account.http.post(DIALOGS, files=files, data={"name": "Some dialogs"}), 201)

    assert set(made) == FIELDS
    assert made["name"] == "Some dialogs"
    assert made["columns"] == []
    assert made["row_count"] == 2
    assert ok(account.http.get(f"{DATASETS}/{made['id']}")) == made
