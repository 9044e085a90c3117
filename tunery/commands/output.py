"""What commands print: tables for people, one JSON document for programs."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunery.printable import printable

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")]

_STATUS_STYLE = {
    "completed": "green",
    "available": "green",
    "running": "cyan",
    "queued": "yellow",
    "failed": "red",
    "cancelled": "magenta",
}
# Nobody's window: wide enough that a program that reads a table finds every row on one line.
_PIPE_WIDTH = 240
_COLUMN_GAP = 2


def stdout_console() -> Console:
    """Returns a console for results."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)


def stderr_console() -> Console:
    """Returns a console for progress and remarks."""
    return Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else _PIPE_WIDTH)


def print_json(document: Any) -> None:
    """Prints one JSON document."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
    # JSON itself leaves these as they are, which some terminals obey.
    print(re.sub("[\x7f-\x9f]", lambda match: f"\\u{ord(match[0]):04x}", text))


def print_table(
    headers: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    title: str | None = None,
    spare: Sequence[str] = (),
) -> None:
    """Prints a table; the first column is never cut.

    Args:
        headers: of the columns.
        rows: a cell for each column.
        title: stands above.
        spare: columns that are left out where the terminal has no room for them, the most wanted first.
    """
    console = stdout_console()
    columns = {
        header: [cell if isinstance(cell, Text) else Text(printable(cell)) for cell in cells]
        for header, *cells in zip(headers, *rows, strict=True)
    }
    left_out = _without_room(columns, spare, console.width)
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, _COLUMN_GAP, 0, 0),
    )
    shown = [header for header in headers if header not in left_out]
    for header in shown:
        table.add_column(header, header_style="dim", no_wrap=header == headers[0], overflow="fold")
    for row in zip(*(columns[header] for header in shown), strict=True):
        table.add_row(*row)
    console.print(table)
    if left_out:
        names = ", ".join(left_out)
        console.print(f"no room for {names}; a wider window or --json shows them", style="dim")


def _without_room(columns: Mapping[str, Sequence[Text]], spare: Sequence[str], width: int) -> list[str]:
    widths = {
        header: max(len(header), *(cell.cell_len for cell in cells), 0) + _COLUMN_GAP
        for header, cells in columns.items()
    }
    room = width + _COLUMN_GAP - sum(widths[header] for header in columns if header not in spare)
    left_out = []
    for header in spare:
        if widths[header] <= room:
            room -= widths[header]
        else:
            left_out.append(header)
    return left_out


def print_facts(facts: Iterable[tuple[str, str | Text | None]]) -> None:
    """Prints names and values, a line each; leaves out what is None."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        if value is not None:
            table.add_row(Text(name), value if isinstance(value, Text) else Text(printable(value)))
    stdout_console().print(table)


def status_text(status: str) -> Text:
    """Returns a status in its colour."""
    return Text(status, style=_STATUS_STYLE.get(status, ""))


def size_text(size_bytes: float) -> str:
    """Returns a size as people read it."""
    size, unit = float(size_bytes), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def time_text(timestamp: str | None) -> str:
    """Returns an RFC 3339 time in the local zone; empty for none."""
    if not timestamp:
        return ""
    return datetime.fromisoformat(timestamp).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def duration_text(seconds: float) -> str:
    """Returns a duration such as 1 h 02 min, 3 min 20 s or 12 s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole} s"
