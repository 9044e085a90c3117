"""The upload's multipart/form-data body, parsed while it arrives: one `file`, and perhaps a `name`."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser

from svc_kit.errors import InvalidRequest, MalformedUpload

MAX_FILENAME_CHARS = 255
MAX_BOUNDARY_CHARS = 70  # RFC 2046, 5.1.1

_PARAMETER = re.compile(r';\s*([^\s=;"]++)\s*=\s*("(?:[^"\\]|\\.)*+"|[^\s;"]*+)\s*', re.DOTALL)
_MEDIA_TYPE = re.compile(r"\s*([^\s;]*+)\s*")
# RFC 2046's boundary characters; a space may stand inside but not at the end.
_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,\-./:=? ]*[0-9A-Za-z'()+_,\-./:=?]")
_QUOTED_PAIR = re.compile(r'\\(["\\])')
# Browsers write these three, and nothing else, percent-encoded in a quoted filename (the HTML standard).
_BROWSER_ESCAPE = re.compile(r"%(0A|0D|22)", re.IGNORECASE)
# Of a part's headers: what leaves the bytes as they are.
_PLAIN_ENCODINGS = {
    "content-transfer-encoding": ("", "7bit", "8bit", "binary"),
    "content-encoding": ("", "identity"),
}
_CHARSET = re.compile(r';\s*charset\s*=\s*"?([^\s;"]*)', re.IGNORECASE)
_UTF8 = ("utf-8", "utf8", "us-ascii")
# Some clients' libraries send texts so unless told otherwise.
_NAME_CHARSETS = (*_UTF8, "iso-8859-1")


@dataclass(frozen=True)
class UploadedForm:
    """A whole body.

    Attributes:
        filename: the file's base name, without any folder.
        name: the display name, without the spaces around it; None if it wasn't given or was blank.
    """

    filename: str
    name: str | None


class UploadForm:
    """Parses a body pushed to it in chunks; the file's bytes go on as they come and are never gathered.

    `feed` every chunk, then `finish` once. The two parts may come in either order. After an error, its own
    or one that a callback raised, the form is spent.
    """

    def __init__(
        self,
        content_type: str,
        on_file_start: Callable[[str], None],
        on_file_data: Callable[[bytes], None],
        max_name_chars: int = 256,
    ) -> None:
        """Args:
            content_type: the request's Content-Type with its boundary.
            on_file_start: called once with the file's base name, before its bytes.
            on_file_data: called with the file's bytes, piece by piece; never for an empty file.
            max_name_chars: the longest `name`, in characters.

        Raises:
            MalformedUpload: the content type is not multipart/form-data with a valid boundary.
        """
        self._on_file_start = on_file_start
        self._on_file_data = on_file_data
        self._max_name_chars = max_name_chars
        self._filename: str | None = None
        self._name_bytes: bytearray | None = None
        self._name_charset = ""
        self._part: str | None = None
        self._headers: dict[str, str] = {}
        self._header_field = b""
        self._header_value = b""
        self._started = False
        self._closed = False
        self._parser = MultipartParser(
            _boundary(content_type),
            {
                "on_part_begin": self._begin_part,
                "on_header_field": self._add_header_field,
                "on_header_value": self._add_header_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._read_headers,
                "on_part_data": self._take_part_data,
                "on_end": self._close,
            },
        )

    def feed(self, chunk: bytes) -> None:
        """Takes the body's next bytes; what follows the closing boundary doesn't count.

        Raises:
            MalformedUpload: the body isn't well-formed, or `file` is there twice or lacks its filename.
            InvalidRequest: a part is unknown, or `name` or the filename is invalid; details have `field`.
        """
        if self._closed or not chunk:
            return
        try:
            self._parser.write(chunk)
        except MultipartParseError as error:
            if not self._started:
                raise MalformedUpload(
                    "The upload's body doesn't start with the boundary that its Content-Type names. Let the "
                    "HTTP client make the Content-Type header itself."
                ) from error
            raise MalformedUpload(f"The upload's multipart body is malformed: {error}.") from error

    def finish(self) -> UploadedForm:
        """Says that the body ends here.

        Raises:
            MalformedUpload: the closing boundary hasn't come (a client that goes away ends its stream just
                as a whole body does), or there was no `file`.
            InvalidRequest: `name` is invalid.
        """
        if not self._closed:
            raise MalformedUpload(
                "The upload ended before its closing boundary: it was cut off. Nothing was stored; send it "
                "again."
            )
        if self._filename is None:
            raise MalformedUpload('The upload has no part "file". Send the dataset as the form field "file".')
        return UploadedForm(self._filename, self._read_name())

    def _begin_part(self) -> None:
        self._started = True
        self._part = None
        self._headers = {}

    def _add_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_field += data[start:end]

    def _add_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        field = self._header_field.decode("ascii").lower()
        try:
            value = self._header_value.decode()
        except UnicodeDecodeError:
            raise MalformedUpload(f'The part header "{field}" is not UTF-8.') from None
        if field in self._headers:
            raise MalformedUpload(f'A part has the header "{field}" twice.')
        self._headers[field] = value
        self._header_field = self._header_value = b""

    def _read_headers(self) -> None:
        disposition = self._headers.get("content-disposition")
        if disposition is None:
            raise MalformedUpload("A part has no Content-Disposition header.")
        kind, parameters = _split_header(disposition, "The part header Content-Disposition")
        part = parameters.get("name")
        if kind != "form-data" or part is None:
            raise MalformedUpload("A part's Content-Disposition isn't of the form: form-data; name=\"...\"")
        for header, plain in _PLAIN_ENCODINGS.items():
            encoding = self._headers.get(header, "").strip().lower()
            if encoding not in plain:
                raise MalformedUpload(
                    f"A part has the {header.title()} {encoding[:40]!a}. Send the bytes as they are."
                )
        self._part = part = _unquote(part)
        if part == "file":
            self._read_charset(_UTF8)
            self._begin_file(parameters)
        elif part == "name":
            if self._name_bytes is not None:
                raise InvalidRequest('The field "name" is there twice. Send it once.', field="name")
            self._name_bytes = bytearray()
            self._name_charset = self._read_charset(_NAME_CHARSETS)
        else:
            raise InvalidRequest(
                f'Unknown field {part[:40]!a} in the upload. Its fields are "file" and "name".',
                field=part[:40],
            )

    def _read_charset(self, allowed: tuple[str, ...]) -> str:
        match = _CHARSET.search(self._headers.get("content-type", ""))
        charset = match[1].lower() if match else "utf-8"
        if charset not in allowed:
            raise MalformedUpload(
                f'The part "{self._part}" has the charset {charset[:40]!a}. Send it in UTF-8.',
                field=self._part,
            )
        return charset

    def _begin_file(self, parameters: dict[str, str]) -> None:
        if self._filename is not None:
            raise MalformedUpload(
                'The upload has two parts "file". Send one file in one upload.', field="file"
            )
        self._filename = _filename(parameters)
        self._on_file_start(self._filename)

    def _take_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._part == "file":
            # A slice of the whole is the object itself, so a chunk inside the file goes on uncopied.
            self._on_file_data(data[start:end])
            return
        assert self._name_bytes is not None
        self._name_bytes += data[start:end]
        # A character has four bytes at most.
        if len(self._name_bytes) > 4 * self._max_name_chars:
            raise self._name_too_long()

    def _close(self) -> None:
        self._closed = True
        # Wrong fields are better refused here than by whoever asks for the result.
        self._read_name()

    def _read_name(self) -> str | None:
        if self._name_bytes is None:
            return None
        try:
            name = self._name_bytes.decode(self._name_charset)
        except UnicodeDecodeError:
            raise InvalidRequest(
                f'The field "name" is not {self._name_charset.upper()}.', field="name"
            ) from None
        if len(name) > self._max_name_chars:
            raise self._name_too_long()
        name = name.strip()
        if has_control_character(name):
            raise InvalidRequest(
                'The field "name" contains a line break or another control character. Remove it.',
                field="name",
            )
        return name or None

    def _name_too_long(self) -> InvalidRequest:
        return InvalidRequest(
            f'The field "name" is longer than {self._max_name_chars} characters. Shorten it.', field="name"
        )


def _boundary(content_type: str) -> bytes:
    kind, parameters = _split_header(content_type, "The upload's Content-Type")
    if kind != "multipart/form-data":
        raise MalformedUpload(
            f"The upload's Content-Type is {kind[:80]!a}. Expected multipart/form-data with a boundary."
        )
    boundary = _unquote(parameters.get("boundary", ""))
    if not boundary:
        raise MalformedUpload(
            "The upload's Content-Type has no boundary. Let the HTTP client make the header itself."
        )
    if len(boundary) > MAX_BOUNDARY_CHARS or not _BOUNDARY.fullmatch(boundary):
        raise MalformedUpload(
            f"The boundary in the upload's Content-Type isn't 1 to {MAX_BOUNDARY_CHARS} of the characters "
            "that RFC 2046 allows."
        )
    return boundary.encode("ascii")


def _split_header(value: str, what: str) -> tuple[str, dict[str, str]]:
    """A header's value in lower case and its parameters, names in lower case, values still quoted."""
    first = _MEDIA_TYPE.match(value)
    assert first is not None
    position, parameters = first.end(), dict[str, str]()
    while position < len(value):
        match = _PARAMETER.match(value, position)
        if match is None:
            if not value[position:].strip("; \t"):
                break
            raise MalformedUpload(f"{what} is malformed at {value[position : position + 40]!a}.")
        key = match[1].lower()
        if key in parameters:
            raise MalformedUpload(f"{what} has the parameter {key[:40]!a} twice.")
        parameters[key] = match[2]
        position = match.end()
    return first[1].lower(), parameters


def _unquote(value: str) -> str:
    if not value.startswith('"'):
        return value
    # Only these two escapes: browsers of old send a Windows path with its single backslashes.
    return _QUOTED_PAIR.sub(r"\1", value[1:-1])


def _filename(parameters: dict[str, str]) -> str:
    """The file's base name from `filename*` (RFC 5987) or, without it, `filename`."""
    if "filename*" in parameters:
        filename = _extended_value(_unquote(parameters["filename*"]))
    elif "filename" in parameters:
        plain = _unquote(parameters["filename"])
        filename = _BROWSER_ESCAPE.sub(lambda escape: chr(int(escape[1], 16)), plain)
    else:
        raise MalformedUpload('The part "file" has no filename. Send it as a file.', field="file")
    base_name = base_name_of(filename)
    if not filename.strip():
        raise MalformedUpload('The filename of the part "file" is empty. Choose a file.', field="file")
    if base_name in ("", ".", ".."):
        raise InvalidRequest('The filename of the part "file" names a folder.', field="file")
    if has_control_character(base_name):
        raise InvalidRequest(
            'The filename of the part "file" contains a control character. Rename the file.', field="file"
        )
    if len(base_name) > MAX_FILENAME_CHARS:
        raise InvalidRequest(
            f'The filename of the part "file" is longer than {MAX_FILENAME_CHARS} characters. Rename the '
            "file.",
            field="file",
        )
    return base_name


def _extended_value(value: str) -> str:
    charset, _, rest = value.partition("'")
    _, tick, encoded = rest.partition("'")
    if not tick or charset.lower() not in ("utf-8", "iso-8859-1"):
        raise MalformedUpload(
            "The parameter filename* isn't of the form UTF-8''percent-encoded.", field="file"
        )
    try:
        return unquote_to_bytes(encoded).decode(charset)
    except UnicodeDecodeError:
        raise MalformedUpload(
            "The parameter filename* doesn't decode as its charset.", field="file"
        ) from None


def base_name_of(filename: str) -> str:
    """A file's name without the folders that some clients send before it."""
    return re.split(r"[/\\]", filename)[-1].strip()


def has_control_character(text: str) -> bool:
    """Tells whether a name has what would break the line that it is shown on."""
    return any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in text)
