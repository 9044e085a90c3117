"""The rows of a training file: JSONL, each a dialog or a plain text."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from trainer_svc.engine.errors import JobFault


class Message(BaseModel):
    """One message of a dialog."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: str = Field(min_length=1)
    content: str


class DialogRow(BaseModel):
    """A dialog. Loss is taken on the messages that `keep_loss` marks, by default the assistant's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dialog: tuple[Message, ...] = Field(min_length=1)
    keep_loss: tuple[bool, ...] | None = None

    @model_validator(mode="after")
    def _one_mark_a_message(self) -> DialogRow:
        if self.keep_loss is not None and len(self.keep_loss) != len(self.dialog):
            raise ValueError(f"keep_loss has {len(self.keep_loss)} marks for {len(self.dialog)} messages")
        return self

    @property
    def kept(self) -> tuple[bool, ...]:
        """For each message, whether loss is taken on it."""
        if self.keep_loss is not None:
            return self.keep_loss
        return tuple(message.role == "assistant" for message in self.dialog)


class TextRow(BaseModel):
    """A plain text; loss is taken on all of it and on the end mark after it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str = Field(min_length=1)


Row = DialogRow | TextRow


def _kind(row: object) -> str:
    # By the key rather than by trying both: then the errors speak of the kind that was meant.
    return "dialog" if isinstance(row, dict) and "dialog" in row else "text"


_ROW: TypeAdapter[Row] = TypeAdapter(
    Annotated[Annotated[DialogRow, Tag("dialog")] | Annotated[TextRow, Tag("text")], Discriminator(_kind)]
)


def read_rows(path: Path) -> list[tuple[int, Row]]:
    """Reads a JSONL file; blank lines are skipped.

    Returns:
        Pairs of line number, from 1, and row; at least one.

    Raises:
        JobFault: the file is missing, not UTF-8, without rows, or a line breaks the format; the message
            names the line.
    """
    rows: list[tuple[int, Row]] = []
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line_number, line in enumerate(file, start=1):
                if line.strip():
                    rows.append((line_number, _parse_row(line, f"{path.name}, line {line_number}")))
    except FileNotFoundError as error:
        raise JobFault(f"there is no file {path}") from error
    except UnicodeDecodeError as error:
        raise JobFault(f"{path.name} is not UTF-8: {error.reason} at byte {error.start}") from error
    if not rows:
        raise JobFault(f"{path.name} holds no rows; expected one JSON object a line")
    return rows


def _parse_row(line: str, where: str) -> Row:
    try:
        return _ROW.validate_json(line)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in problem["loc"][1:])  # the first is the kind
        raise JobFault(
            f"{where}: {field + ': ' if field else ''}{problem['msg']}; expected "
            '{"dialog": [{"role": ..., "content": ...}, ...], "keep_loss": [...]} or {"text": ...}'
        ) from error


def file_sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
