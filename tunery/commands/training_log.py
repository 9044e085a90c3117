"""Shows a job's log as it comes: lines, and on a terminal a progress bar under them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from tunery.commands.output import duration_text
from tunery.printable import printable

if TYPE_CHECKING:
    from tunery.client import LogRecord

_KIND_STYLE = {"step": "dim", "validation": "cyan", "checkpoint": "blue", "end": "bold"}
_TIMED_LINE = re.compile(r"(?P<time>\d{4}-\d\d-\d\dT\S+) (?P<message>.*)")


class TrainingLog:
    """A job's log on a console. To be used as a context."""

    def __init__(self, console: Console, *, is_quiet: bool = False) -> None:
        """Args:
        console: where to.
        is_quiet: shows nothing at all.
        """
        self._console = console
        self._is_quiet = is_quiet
        self._bar: TaskID | None = None
        self._progress = Progress(
            TextColumn("[bold]training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss [bold]{task.fields[loss]:.3f}"),
            TextColumn("{task.fields[speed]:,.0f} tokens/s"),
            TextColumn("{task.fields[left]}", style="cyan"),
            console=console,
            transient=True,
            expand=True,
            disable=is_quiet or not console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, record: LogRecord) -> None:
        """Shows the next record."""
        if self._is_quiet:
            return
        if record.HasField("step"):
            self._advance(record)
        time = record.time.ToDatetime().astimezone().strftime("%H:%M:%S")
        line = Text(f"{time}  {printable(record.message)}", style=_KIND_STYLE.get(record.kind, ""))
        if self._console.is_terminal:
            # A step's line may lose its end to a narrow window: the bar has it.
            self._console.print(line, no_wrap=record.HasField("step"), overflow="ellipsis")
        else:
            print(line.plain, flush=True)

    def _advance(self, record: LogRecord) -> None:
        step = record.step
        fields: dict[str, Any] = {
            "loss": step.loss,
            "speed": step.tokens_per_second,
            "left": f"{duration_text(step.remaining_seconds)} left",
        }
        if self._bar is None:
            self._bar = self._progress.add_task("training", total=step.total_steps, **fields)
        self._progress.update(self._bar, completed=step.step, total=step.total_steps, **fields)


def record_json(record: LogRecord) -> dict[str, Any]:
    """Returns a record as JSON, its fields named as in the proto."""
    document: dict[str, Any] = {
        "seq": record.seq,
        "time": record.time.ToJsonString(),
        "kind": record.kind,
        "message": record.message,
    }
    if record.HasField("step"):
        document["step"] = {field.name: value for field, value in record.step.ListFields()}
    return document


def parse_log_lines(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """Yields the entries of a log file; a line without a time belongs to the entry before it."""
    entry: dict[str, str] | None = None
    for line in lines:
        if match := _TIMED_LINE.fullmatch(line):
            if entry:
                yield entry
            entry = {"time": match["time"], "message": match["message"]}
        elif entry:
            entry["message"] += f"\n{line}"
    if entry:
        yield entry
