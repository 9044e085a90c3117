"""From a CSV's columns to training examples: which column plays which part in a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dataset_svc.dialog_rows import DialogRow, Message, RowProblem
from svc_kit.errors import UnsupportedColumns

TaskType = Literal["qa", "not_qa"]


@dataclass(frozen=True)
class _Layout:
    """Column names that together make a task, as looked for in lower case.

    Attributes:
        answer: the column that is trained on.
        question: the column that asks; None if the row is plain text.
        before: optional column put before the question.
        after: optional column put after the question.
        system: optional column for the system message.
    """

    answer: str
    question: str | None = None
    before: str | None = None
    after: str | None = None
    system: str | None = None

    @property
    def required(self) -> tuple[str, ...]:
        return (self.answer,) if self.question is None else (self.question, self.answer)


# In order of preference: the first whose required columns are all there is taken.
_LAYOUTS: Mapping[TaskType, tuple[_Layout, ...]] = {
    "qa": (
        _Layout("answer", "question", before="context", system="system"),
        _Layout("completion", "prompt", before="context", system="system"),
        # The rows of Alpaca's kind: without its `input` an instruction is half a question.
        _Layout("output", "instruction", before="context", after="input", system="system"),
        _Layout("output", "input", before="context", system="system"),
    ),
    "not_qa": (
        _Layout("text"),
        _Layout("completion", "prompt"),
        _Layout("output", "instruction", after="input"),
    ),
}


@dataclass(frozen=True)
class ColumnPlan:
    """How a file's rows become examples. Every name is the file's own spelling.

    Attributes:
        task_type: `qa` or `not_qa`.
        answer: the column that is trained on; the whole text where `question` is None.
        question: the column that asks.
        before: column put before the question, a blank line between them.
        after: column put after the question, a blank line between them.
        system: column for the system message.
        unused: columns that no example will contain, in the file's order; for the job's log.
    """

    task_type: TaskType
    answer: str
    question: str | None
    before: str | None
    after: str | None
    system: str | None
    unused: tuple[str, ...]

    def to_example(self, line: int, row: Mapping[str, str]) -> dict[str, object] | RowProblem:
        """Makes a row's example; the cells' text is kept as it is.

        Args:
            line: the row's line in the file, for a problem.
            row: the cells by column name.

        Returns:
            `{"dialog": [...], "keep_loss": [...]}`, or `{"text": ...}` for plain text; a problem if the
            cell that is trained on, or the one that asks, is blank.
        """
        for column in (self.question, self.answer):
            if column is not None and not row[column].strip():
                return RowProblem(line, f'column "{column}"', "the value is empty", "some text")
        if self.question is None:
            return {"text": row[self.answer]}
        asked = [row[name] for name in (self.before, self.question, self.after) if name is not None]
        messages = [
            Message("user", "\n\n".join(text for text in asked if text.strip())),
            Message("assistant", row[self.answer]),
        ]
        if self.system is not None and row[self.system].strip():
            messages.insert(0, Message("system", row[self.system]))
        keep_loss = tuple(message.role == "assistant" for message in messages)
        return DialogRow(line, tuple(messages), keep_loss).to_example()


def plan_columns(task_type: TaskType, columns: Sequence[str]) -> ColumnPlan:
    """Finds the columns of a task among a file's, in any letter case; spaces are part of a name.

    Raises:
        UnsupportedColumns: no set of the task's columns is complete, or a column that would be used is
            there twice in different letter cases.
    """
    spellings: dict[str, list[str]] = {}
    for column in columns:
        spellings.setdefault(column.lower(), []).append(column)
    layouts = _LAYOUTS[task_type]
    layout = next((each for each in layouts if all(name in spellings for name in each.required)), None)
    if layout is None:
        raise _no_layout(task_type, layouts, columns)

    def spelled(name: str | None) -> str | None:
        if name is None or name not in spellings:
            return None
        if len(spellings[name]) > 1:
            raise UnsupportedColumns(
                f'The columns {_listed(spellings[name])} all match "{name}". Keep one and rename the others.',
                task_type=task_type,
                found=", ".join(columns),
            )
        return spellings[name][0]

    answer = spelled(layout.answer)
    assert answer is not None
    question, before = spelled(layout.question), spelled(layout.before)
    after, system = spelled(layout.after), spelled(layout.system)
    used = {answer, question, before, after, system}
    unused = tuple(column for column in columns if column not in used)
    return ColumnPlan(task_type, answer, question, before, after, system, unused)


def plan_any_task(columns: Sequence[str]) -> ColumnPlan:
    """Finds the first task that a file's columns fit, `qa` before `not_qa`.

    Raises:
        UnsupportedColumns: they fit neither; the message says what each looks for.
    """
    try:
        return plan_columns("qa", columns)
    except UnsupportedColumns as qa_error:
        try:
            return plan_columns("not_qa", columns)
        except UnsupportedColumns as error:
            message = f"{qa_error.message} {error.message}"
            raise UnsupportedColumns(message, found=", ".join(columns)) from error


def _no_layout(
    task_type: TaskType, layouts: tuple[_Layout, ...], columns: Sequence[str]
) -> UnsupportedColumns:
    looked_for = ", or ".join(" and ".join(layout.required) for layout in layouts)
    message = f'The task type "{task_type}" needs the columns {looked_for}. Found: {_listed(columns)}.'
    names = {name for layout in layouts for name in layout.required}
    if any(column != column.strip() and column.strip().lower() in names for column in columns):
        message += " Spaces are part of a column's name: remove them from the header, and from the rows."
    elif len(columns) == 1 and any(mark in columns[0] for mark in ";\t"):
        message += " Separate the columns by commas."
    else:
        other: TaskType = "not_qa" if task_type == "qa" else "qa"
        lower = {column.lower() for column in columns}
        if any(lower.issuperset(layout.required) for layout in _LAYOUTS[other]):
            message += f' They fit the task type "{other}".'
        else:
            message += " Rename the columns in the header to one of these sets."
    return UnsupportedColumns(message, task_type=task_type, looked_for=looked_for, found=", ".join(columns))


def _listed(columns: Sequence[str]) -> str:
    shown = [f'"{name if len(name) <= 60 else name[:60] + "…"}"' for name in columns[:20]]
    rest = len(columns) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")
