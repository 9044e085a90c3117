"""What every uploaded file must be first of all: UTF-8 text."""

from __future__ import annotations

import codecs
from dataclasses import dataclass


@dataclass(frozen=True)
class BadByte:
    """The first byte that can't be in a UTF-8 text file: its offset from 0, and words for people."""

    offset: int
    found: str
    mend: str


class TextGate:
    """Passes on whole UTF-8 characters and stops at the first byte that is no text.

    A byte-order mark at the file's start is dropped. Up to three bytes of a character that a chunk's end
    cuts are held back for the next chunk.
    """

    def __init__(self) -> None:
        self.size_bytes = 0
        self._held = b""
        self._head = b""
        self._started = False

    def push(self, chunk: bytes) -> tuple[bytes, BadByte | None]:
        """Returns the text up to the first bad byte, and that byte if there is one."""
        data = self._held + chunk if self._held else chunk
        data_offset = self.size_bytes - len(self._held)
        self.size_bytes += len(chunk)
        if len(self._head) < 4:
            self._head += chunk[: 4 - len(self._head)]
        end, bad = len(data), None
        if not data.isascii():
            try:
                _, end = codecs.utf_8_decode(data, "strict", False)
            except UnicodeDecodeError as error:
                end = error.start
                bad = self._not_utf8(data_offset + end, data[end])
        nul_index = data.find(b"\0", 0, end)
        if nul_index >= 0:
            end = nul_index
            mend = self._disguise(data_offset + end) or "Remove it, or save the file as UTF-8 text"
            bad = BadByte(data_offset + end, f"a NUL byte at byte offset {data_offset + end}", mend)
        self._held = b"" if bad else data[end:]
        start = 0
        if end and not self._started:
            self._started = True
            start = 3 if data.startswith(codecs.BOM_UTF8) else 0
        return data[start:end], bad

    def finish(self) -> BadByte | None:
        """Returns the byte where a character begins that the file's end cuts off."""
        if not self._held:
            return None
        return self._not_utf8(self.size_bytes - len(self._held), self._held[0])

    def _not_utf8(self, offset: int, value: int) -> BadByte:
        mend = self._disguise(offset) or 'Save the file as UTF-8 (in Excel: "CSV UTF-8")'
        return BadByte(offset, f"the byte 0x{value:02X} at byte offset {offset}, which is not UTF-8", mend)

    def _disguise(self, offset: int) -> str | None:
        # Only bytes up to the offset, so that the words don't depend on how much has arrived already.
        head = self._head[: offset + 1]
        if head[:1] in (b"\xff", b"\xfe"):
            return "The file looks like UTF-16: save it as UTF-8"
        if head.startswith(b"PK\x03\x04"):
            return "The file looks like an Excel workbook or a ZIP archive: save it as plain text in UTF-8"
        if head.startswith(b"\x1f\x8b"):
            return "The file looks gzip-compressed: upload it uncompressed"
        return None
