"""The upload's body: parts, names, cut-off streams, at every cut between chunks."""

from __future__ import annotations

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset_svc.upload_form import UploadedForm, UploadForm
from svc_kit.errors import InvalidRequest, MalformedUpload
from tests.cases import num_cases

CONTENT_TYPE = "multipart/form-data; boundary=bnd"
FILE_PART = (
    b'--bnd\r\nContent-Disposition: form-data; name="file"; filename="a.csv"\r\n\r\na,b\r\n1,2\r\n\r\n'
)
END = b"--bnd--\r\n"


def part(disposition: str | bytes, data: bytes = b"x", *headers: bytes) -> bytes:
    if isinstance(disposition, str):
        disposition = disposition.encode()
    lines = [b"--bnd", b"Content-Disposition: form-data; " + disposition, *headers, b"", data, b""]
    return b"\r\n".join(lines)


class Received:
    """What the callbacks got."""

    def __init__(self) -> None:
        self.filenames: list[str] = []
        self.chunks: list[bytes] = []


def parse(
    body: bytes, chunk_sizes: list[int] | None = None, content_type: str = CONTENT_TYPE, **limits: int
) -> tuple[UploadedForm, bytes]:
    received = Received()
    form = UploadForm(content_type, received.filenames.append, received.chunks.append, **limits)
    for size in chunk_sizes or []:
        form.feed(body[:size])
        body = body[size:]
    form.feed(body)
    result = form.finish()
    assert received.filenames == [result.filename]
    assert b"" not in received.chunks
    return result, b"".join(received.chunks)


def refused(body: bytes, content_type: str = CONTENT_TYPE) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse(body, content_type=content_type)
    return caught.value


def test_takes_a_file_alone() -> None:
    assert parse(FILE_PART + END) == (UploadedForm("a.csv", None), b"a,b\r\n1,2\r\n")


@pytest.mark.parametrize("name_first", [True, False])
def test_takes_the_name_before_or_after(name_first: bool) -> None:
    name = part('name="name"', " Données ".encode())
    body = name + FILE_PART if name_first else FILE_PART + name
    assert parse(body + END)[0] == UploadedForm("a.csv", "Données")


@pytest.mark.parametrize(
    "headers",
    [
        [b"Content-Type: text/csv; charset=UTF-8", b"Content-Encoding: identity"],
        [b'Content-Type: application/vnd.ms-excel; charset="us-ascii"'],
        [b"Content-Type: nonsense"],
        [b"Content-Type: text/csv; header=present; boundary=charset"],
    ],
)
def test_takes_a_file_of_any_media_type(headers: list[bytes]) -> None:
    assert parse(part('name="file"; filename="a.csv"', b"x", *headers) + END)[1] == b"x"


def test_reads_the_name_in_its_charset() -> None:
    name = part('name="name"', b"caf\xe9", b"Content-Type: text/plain; charset=ISO-8859-1")
    assert parse(FILE_PART + name + END)[0].name == "café"


def test_takes_an_empty_file() -> None:
    assert parse(part('name="file"; filename="a.csv"', b"") + END) == (UploadedForm("a.csv", None), b"")


def test_takes_what_httpx_sends() -> None:
    request = httpx.Request(
        "POST", "http://x", files={"file": ('d"ä.csv', b"a\n--b\n\r\n--", "text/csv")}, data={"name": "n"}
    )
    form, data = parse(request.read(), content_type=request.headers["content-type"])
    assert form == UploadedForm('d"ä.csv', "n")
    assert data == b"a\n--b\n\r\n--"


@pytest.mark.parametrize(
    "content_type",
    [
        'Multipart/Form-Data; charset=utf-8; Boundary="bnd"',
        "multipart/form-data;boundary=bnd;",
        "multipart/form-data ; boundary = bnd",
    ],
)
def test_takes_content_types(content_type: str) -> None:
    assert parse(FILE_PART + END, content_type=content_type)[0].filename == "a.csv"


@pytest.mark.parametrize(
    ("content_type", "words"),
    [
        ("", "multipart/form-data"),
        ("application/json", "'application/json'"),
        ("multipart/form-data", "no boundary"),
        ("multipart/form-data; boundary=", "no boundary"),
        ('multipart/form-data; boundary="a\r\nb"', "RFC 2046"),
        ('multipart/form-data; boundary="a "', "RFC 2046"),
        ("multipart/form-data; boundary=é", "RFC 2046"),
        ("multipart/form-data; boundary=" + "b" * 71, "1 to 70"),
        ("multipart/form-data; boundary=a; boundary=b", "twice"),
        ('multipart/form-data; boundary="bnd', "malformed"),
    ],
)
def test_refuses_content_types(content_type: str, words: str) -> None:
    error = refused(FILE_PART + END, content_type)
    assert isinstance(error, MalformedUpload)
    assert words in error.message


@pytest.mark.parametrize(
    ("parameters", "filename"),
    [
        ('filename="a b.csv"', "a b.csv"),
        ("filename=a.csv", "a.csv"),
        ('filename="ä漢.csv"', "ä漢.csv"),
        ("filename=\"a.csv\"; filename*=UTF-8''%C3%A4%20b.csv", "ä b.csv"),
        ("filename*=utf-8'en'a%2Fb.csv", "b.csv"),
        ("filename*=iso-8859-1''%E4.csv", "ä.csv"),
        ('filename="../../etc/a.csv"', "a.csv"),
        (r'filename="C:\data\a.csv"', "a.csv"),
        (r'filename="a\"b.csv"', 'a"b.csv'),
        ('filename="a%22b 100%25.csv"', 'a"b 100%25.csv'),
        ('filename="a;b=c.csv"', "a;b=c.csv"),
        ('filename="' + "x" * 255 + '"', "x" * 255),
        ('FileName="a.csv"', "a.csv"),
    ],
)
def test_takes_filenames(parameters: str, filename: str) -> None:
    assert parse(part(f'name="file"; {parameters}') + END)[0].filename == filename


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (part('name="file"'), "no filename"),
        (part('name="file"; filename=""'), "Choose a file"),
        (part('name="file"; filename="a/"'), "names a folder"),
        (part('name="file"; filename=".."'), "names a folder"),
        (part('name="file"; filename="a\tb"'), "control character"),
        (part('name="file"; filename="a%0Ab"'), "control character"),
        (part("name=\"file\"; filename*=UTF-8''a%00b"), "control character"),
        (part('name="file"; filename="' + "x" * 256 + '"'), "longer than 255"),
        (part(b'name="file"; filename="\xff"'), "not UTF-8"),
        (part("name=\"file\"; filename*=UTF-8''%FF"), "doesn't decode"),
        (part('name="file"; filename*=a.csv'), "UTF-8''"),
        (part("name=\"file\"; filename*=utf-7''a.csv"), "UTF-8''"),
        (part('name="file"; filename="a'), "malformed"),
        (part('name="file"; name="name"; filename="a"'), "twice"),
        (FILE_PART + FILE_PART, 'two parts "file"'),
        (FILE_PART + part('name="name"') + part('name="name"'), "there twice"),
        (FILE_PART + part('name="purpose"'), "Unknown field 'purpose'"),
        (FILE_PART + part('name=""'), "Unknown field ''"),
        (FILE_PART + part('filename="b"'), "isn't of the form"),
        (FILE_PART + part('name="name"', b"\xff"), '"name" is not UTF-8'),
        (FILE_PART + part('name="name"', b"a\nb"), "control character"),
        (FILE_PART + part('name="name"', b"a\0b"), "control character"),
        (FILE_PART + part('name="name"', b"x" * 257), "longer than 256"),
        (FILE_PART + part('name="name"', b"x" * 100_000), "longer than 256"),
        (part('name="file"; filename="a"', b"x", b"Content-Transfer-Encoding: base64"), "as they are"),
        (part('name="file"; filename="a"', b"x", b"Content-Encoding: gzip"), "as they are"),
        (part('name="file"; filename="a"', b"x", b"Content-Type: text/csv; charset=utf-16"), "in UTF-8"),
        (part('name="file"; filename="a"', b"x", b'Content-Type: a/b;x=y; CHARSET = "latin1"'), "in UTF-8"),
        (FILE_PART + part('name="name"', b"x", b"Content-Type: text/plain;charset=utf-16"), "in UTF-8"),
        (part('name="file"; filename="a"', b"x", b"content-disposition: form-data"), "twice"),
        (b"--bnd\r\nX: y\r\n\r\nz\r\n", "no Content-Disposition"),
        (b'--bnd\r\nContent-Disposition: attachment; name="file"\r\n\r\nz\r\n', "isn't of the form"),
        (part('name="file"; filename="a"', b"x", *[b"X-%d: y" % n for n in range(20)]), "header count"),
        (part('name="file"; filename="a"', b"x", b"X: " + b"y" * 10_000), "header size"),
        (part('name="file"; filename="a"', b"x", b"X Y: z"), "malformed"),
        (b"hello\r\n" + FILE_PART, "doesn't start with the boundary"),
        (FILE_PART.replace(b"--bnd", b"--other"), "doesn't start with the boundary"),
        (b"", 'no part "file"'),
        (part('name="name"'), 'no part "file"'),
    ],
)
def test_refuses_with_a_reason(body: bytes, words: str) -> None:
    error = refused(body + END)
    assert words in error.message
    error.message.encode()
    if '"name"' in words:
        assert error.details["field"] == "name"


def test_a_name_of_256_characters_is_taken_and_a_blank_one_is_none() -> None:
    assert parse(FILE_PART + part('name="name"', ("é" * 256).encode()) + END)[0].name == "é" * 256
    assert parse(FILE_PART + part('name="name"', b" \r\n") + END)[0].name is None
    assert parse(FILE_PART + part('name="name"', b"") + END)[0].name is None
    with pytest.raises(InvalidRequest, match="longer than 3"):
        parse(FILE_PART + part('name="name"', b"1234") + END, max_name_chars=3)


@pytest.mark.parametrize("length", range(0, len(FILE_PART + END) - 2))
def test_a_body_cut_off_anywhere_is_refused(length: int) -> None:
    body = (FILE_PART + END)[:length]
    if body.endswith(b"--bnd--"):
        assert parse(body)[0].filename == "a.csv"
    else:
        assert "cut off" in refused(body).message


def test_nothing_counts_after_the_closing_boundary() -> None:
    body = b"\r\n" + FILE_PART + END
    assert parse(body + FILE_PART + b"\0junk")[1] == b"a,b\r\n1,2\r\n"
    assert parse(body + FILE_PART + b"junk", [len(body), 5])[1] == b"a,b\r\n1,2\r\n"


def test_a_chunk_inside_the_file_goes_on_uncopied() -> None:
    received = Received()
    form = UploadForm(CONTENT_TYPE, received.filenames.append, received.chunks.append)
    form.feed(FILE_PART[:-2])
    chunk = b"x" * 100_000
    form.feed(chunk)
    assert received.chunks[-1] is chunk


def test_an_error_of_a_callback_goes_through() -> None:
    def refuse(_data: bytes) -> None:
        raise KeyError("full")

    form = UploadForm(CONTENT_TYPE, lambda _filename: None, refuse)
    with pytest.raises(KeyError):
        form.feed(FILE_PART + END)


@settings(deadline=None, max_examples=num_cases(300))
@given(
    st.lists(
        st.sampled_from([b"a", b"\r", b"\n", b"-", b"\r\n--bn", b"--bnd", b"\r\n--bnd-x", b"\0", b"\xff"])
    ).map(b"".join),
    st.lists(st.integers(0, 9), max_size=60),
)
def test_cuts_never_change_the_file(data: bytes, chunk_sizes: list[int]) -> None:
    # RFC 2046 forbids the delimiter in a part; what merely resembles it must come through whole.
    data = data.replace(b"\r\n--bnd", b"\r\n--bNd")
    if (b"\r\n" + data).startswith(b"\r\n--bnd"):
        data = b"x" + data
    body = part('name="file"; filename="a.csv"', data) + part('name="name"', b"n") + END
    expected = (UploadedForm("a.csv", "n"), data)
    assert parse(body) == expected
    assert parse(body, chunk_sizes) == expected
    assert parse(body, [1] * len(body)) == expected


@settings(deadline=None, max_examples=num_cases(200))
@given(st.binary(max_size=60), st.lists(st.integers(0, 9), max_size=30))
def test_foreign_bytes_only_ever_give_our_errors(tail: bytes, chunk_sizes: list[int]) -> None:
    for body in (tail, b"--bnd\r\n" + tail, b"--bnd\r\nContent-Disposition: form-data;" + tail):
        with pytest.raises(InvalidRequest):
            parse(body, chunk_sizes)
