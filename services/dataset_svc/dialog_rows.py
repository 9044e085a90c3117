"""Dialogs as JSON lines: rows with every fault named, and the light check while a file arrives.

A row is `{"dialog": [{"role": ..., "content": ...}, ...], "keep_loss": [...]}`; `docs/data-formats.md`
states the rule for users. Faults in rows are values, not exceptions: a report lists many of them.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, NoReturn

from dataset_svc.text_gate import BadByte, TextGate
from svc_kit.errors import MalformedFile

ROLES = ("system", "user", "assistant", "tool")
MAX_LINE_BYTES = 16 * 1024 * 1024
MAX_PROBLEMS_PER_ROW = 20

_WHOLE_ROW = "row"
_ROW_KEYS = ("dialog", "keep_loss")
_MESSAGE_KEYS = ("role", "content")
_SURROGATE = re.compile("[\ud800-\udfff]")
_JSON_TYPES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}


@dataclass(frozen=True)
class RowProblem:
    """One fault of one row, in words for the user.

    Attributes:
        line: the line of the file on which the row starts, from 1.
        where: the place in the row: `row`, `dialog[1].role`, or `column "answer"`.
        problem: what was found.
        expected: what should be there.
    """

    line: int
    where: str
    problem: str
    expected: str

    def __str__(self) -> str:
        return f"line {self.line}, {self.where}: {self.problem}; expected {self.expected}"

    @property
    def column(self) -> str | None:
        """The CSV column, or the place in a dialog's row; None for the row as a whole."""
        return None if self.where == _WHOLE_ROW else self.where.removeprefix('column "').removesuffix('"')

    def to_json(self) -> dict[str, object]:
        """The problem as a JSON object; always encodable in UTF-8."""
        return {
            "line": self.line,
            "where": self.where,
            "problem": self.problem,
            "expected": self.expected,
        }


@dataclass(frozen=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True)
class DialogRow:
    """A faultless row.

    Attributes:
        line: the row's line in the file, from 1.
        messages: at least one.
        keep_loss: one flag a message, whether it is trained on; filled in where the row had none.
    """

    line: int
    messages: tuple[Message, ...]
    keep_loss: tuple[bool, ...]

    def to_example(self) -> dict[str, object]:
        """The row as a training example: `{"dialog": [...], "keep_loss": [...]}`."""
        return {
            "dialog": [{"role": message.role, "content": message.content} for message in self.messages],
            "keep_loss": list(self.keep_loss),
        }


class _RepeatedKey(dict[str, object]):
    """A parsed JSON object in which a key stood twice."""

    key: str


def check_dialog_line(line_number: int, raw: bytes) -> DialogRow | list[RowProblem]:
    """Checks one line, without a byte-order mark; its line end may be left on.

    Returns:
        The row, or its faults: at least one, at most `MAX_PROBLEMS_PER_ROW`.
    """
    parsed = _parse_json(line_number, raw)
    if isinstance(parsed, RowProblem):
        return [parsed]
    problems = _Problems(line_number)
    if not isinstance(parsed, dict):
        problems.add_type(_WHOLE_ROW, parsed, 'a JSON object with the key "dialog"')
        return problems.found
    problems.check_keys(_WHOLE_ROW, parsed, _ROW_KEYS)
    messages = _read_messages(parsed, problems)
    keep_loss = _read_keep_loss(parsed, messages, problems)
    if not problems.found and not any(
        kept and message.content.strip() for kept, message in zip(keep_loss, messages, strict=True)
    ):
        problems.add(
            _WHOLE_ROW,
            "there is nothing to train on",
            "an assistant message that isn't blank, or a true in keep_loss beside a message that isn't blank",
        )
    return problems.found or DialogRow(line_number, messages, keep_loss)


def iter_dialog_rows(binary_file: BinaryIO) -> Iterator[DialogRow | list[RowProblem]]:
    """Reads and checks a file line by line, blocking; the file stays open.

    Blank lines are skipped and a byte-order mark at the start is too. No more than `MAX_LINE_BYTES` of the
    file is held at a time.
    """
    line_number = 0
    while raw := binary_file.readline(MAX_LINE_BYTES + 1):
        line_number += 1
        if line_number == 1:
            raw = raw.removeprefix(codecs.BOM_UTF8)
        if len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
            _skip_rest_of_line(binary_file)
            yield [
                RowProblem(
                    line_number,
                    _WHOLE_ROW,
                    f"the line is larger than {MAX_LINE_BYTES:,} bytes",
                    "one JSON object a line, each within that size",
                )
            ]
        elif raw.strip():
            yield check_dialog_line(line_number, raw)


def _skip_rest_of_line(binary_file: BinaryIO) -> None:
    while (rest := binary_file.readline(1024 * 1024)) and not rest.endswith(b"\n"):
        pass


def _parse_json(line_number: int, raw: bytes) -> object | RowProblem:
    expected = "one JSON object in UTF-8 on the line"
    try:
        return json.loads(raw.decode(), object_pairs_hook=_as_object, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        problem = f"the byte 0x{raw[error.start]:02X} at offset {error.start} of the line is not UTF-8"
    except json.JSONDecodeError as error:
        problem = f"the JSON breaks at character {error.colno}: {error.msg}"
    except _NotJson as error:
        problem = str(error)
    except RecursionError:
        problem = "the JSON is nested too deeply"
    except ValueError:
        # Python's own limit on an integer's digits, the one ValueError left; no number belongs in a row.
        problem = "a number has too many digits"
    return RowProblem(line_number, _WHOLE_ROW, problem, expected)


class _NotJson(ValueError):
    """Python's json module would take this, JSON doesn't."""


def _refuse_constant(name: str) -> NoReturn:
    raise _NotJson(f"{name} is no JSON value")


def _as_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    parsed = dict(pairs)
    if len(parsed) == len(pairs):
        return parsed
    repeated = _RepeatedKey(pairs)
    seen: set[str] = set()
    repeated.key = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    return repeated


class _Problems:
    """Collects a row's faults up to the limit."""

    def __init__(self, line_number: int) -> None:
        self.found: list[RowProblem] = []
        self._line_number = line_number

    @property
    def full(self) -> bool:
        return len(self.found) >= MAX_PROBLEMS_PER_ROW

    def add(self, where: str, problem: str, expected: str) -> None:
        if not self.full:
            self.found.append(RowProblem(self._line_number, where, problem, expected))

    def add_type(self, where: str, value: object, expected: str) -> None:
        kind = "an object" if isinstance(value, dict) else _JSON_TYPES[type(value)]
        self.add(where, f"found {kind}", expected)

    def check_keys(self, where: str, parsed: dict[str, object], known: tuple[str, ...]) -> None:
        expected = "the keys " + " and ".join(known) + (" (optional)" if known is _ROW_KEYS else "")
        if isinstance(parsed, _RepeatedKey):
            self.add(where, f"the key {_show(parsed.key)} stands twice", "every key once")
        for key in parsed:
            if key not in known:
                self.add(where, f"unknown key {_show(key)}", expected)


def _read_messages(row: dict[str, object], problems: _Problems) -> tuple[Message, ...]:
    """The row's messages; incomplete if problems were found."""
    expected = "a list of at least one message"
    if "dialog" not in row:
        problems.add(_WHOLE_ROW, 'the key "dialog" is missing', expected)
        return ()
    dialog = row["dialog"]
    if not isinstance(dialog, list):
        problems.add_type("dialog", dialog, expected)
        return ()
    if not dialog:
        problems.add("dialog", "the list is empty", expected)
    messages = []
    for index, item in enumerate(dialog):
        if problems.full:
            break
        where = f"dialog[{index}]"
        if not isinstance(item, dict):
            problems.add_type(where, item, "an object with the keys role and content")
            continue
        problems.check_keys(where, item, _MESSAGE_KEYS)
        role = _read_text(item, "role", where, problems, "one of " + ", ".join(ROLES))
        if role is not None and role not in ROLES:
            problems.add(f"{where}.role", f"found {_show(role)}", "one of " + ", ".join(ROLES))
        content = _read_text(item, "content", where, problems, "a string")
        messages.append(Message(role or "", content or ""))
    return tuple(messages)


def _read_text(
    message: dict[str, object], key: str, where: str, problems: _Problems, expected: str
) -> str | None:
    if key not in message:
        problems.add(where, f'the key "{key}" is missing', expected)
        return None
    value = message[key]
    if not isinstance(value, str):
        problems.add_type(f"{where}.{key}", value, expected)
        return None
    surrogate = _SURROGATE.search(value)
    if surrogate:
        problems.add(
            f"{where}.{key}",
            f"character {surrogate.start() + 1} is half of a surrogate pair (\\u{ord(surrogate[0]):04x})",
            "whole characters: a \\ud800-\\udbff escape with a \\udc00-\\udfff escape after it",
        )
        return None
    return value


def _read_keep_loss(
    row: dict[str, object], messages: tuple[Message, ...], problems: _Problems
) -> tuple[bool, ...]:
    """The row's flags, one a message; incomplete if problems were found."""
    if "keep_loss" not in row:
        return tuple(message.role == "assistant" for message in messages)
    keep_loss, dialog = row["keep_loss"], row.get("dialog")
    expected = "a list of booleans, one for each message"
    if not isinstance(keep_loss, list):
        problems.add_type("keep_loss", keep_loss, expected)
        return ()
    if isinstance(dialog, list) and len(keep_loss) != len(dialog):
        problems.add("keep_loss", f"the list has length {len(keep_loss)}", f"length {len(dialog)}, as dialog")
    for index, flag in enumerate(keep_loss):
        if problems.full:
            break
        if not isinstance(flag, bool):
            problems.add_type(f"keep_loss[{index}]", flag, "true or false")
    return tuple(keep_loss)


def _show(text: str) -> str:
    """Foreign text for a message: quoted, in ASCII, short."""
    return json.dumps(text if len(text) <= 40 else text[:40] + "...")


@dataclass(frozen=True)
class JsonlSummary:
    """What the light check knows: the lines that aren't blank, and the file's size in bytes."""

    row_count: int
    size_bytes: int


class JsonlChecker:
    """The light check of a JSON-lines file pushed to it in chunks: UTF-8 text with something in it.

    Its rows are checked by the job that trains on them. `feed` every chunk, then `finish` once; after an
    error the checker is spent.
    """

    def __init__(self) -> None:
        self._gate = TextGate()
        self._line = 1
        self._row_count = 0
        self._line_has_text = False

    def feed(self, chunk: bytes) -> None:
        """Takes the file's next bytes.

        Raises:
            MalformedFile: a byte is NUL or not UTF-8.
        """
        text, bad = self._gate.push(chunk)
        lines = text.translate(None, b" \t\r\v\f").split(b"\n")
        self._line_has_text |= bool(lines[0])
        if len(lines) > 1:
            whole_lines = len(lines) - 2
            blank_lines = lines[1:-1].count(b"")
            self._row_count += self._line_has_text + whole_lines - blank_lines
            self._line_has_text = bool(lines[-1])
            self._line += len(lines) - 1
        if bad:
            self._fail_at_byte(bad)

    def finish(self) -> JsonlSummary:
        """Says that the file ends here.

        Raises:
            MalformedFile: every line is blank, or the file ends inside a character.
        """
        bad = self._gate.finish()
        if bad:
            self._fail_at_byte(bad)
        row_count = self._row_count + self._line_has_text
        if not row_count:
            raise MalformedFile("The file is empty. Expected one JSON object on each line.", line=1)
        return JsonlSummary(row_count, self._gate.size_bytes)

    def _fail_at_byte(self, bad: BadByte) -> NoReturn:
        raise MalformedFile(f"Line {self._line}: {bad.found}. {bad.mend}.", line=self._line)
