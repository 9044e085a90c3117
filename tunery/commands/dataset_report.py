"""A report on a dataset, for people: in 80 columns where the terminal has no more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from tunery.commands.output import print_facts, print_table, stdout_console
from tunery.printable import printable

if TYPE_CHECKING:
    from tunery.resources import DatasetReport, ExampleRow, TokenLengthBin

_SHOWN_ROWS = 10
_SHOWN_LINES = 8
_BAR_WIDTH = 40
# Around what is trained on: signs that rows hardly ever have.
_TARGET_MARKS = ("⟦", "⟧")


def print_report(report: DatasetReport) -> None:
    """Prints a report; of long lists the beginning."""
    console = stdout_console()
    lengths = report.get("token_lengths")
    measured, good = report["num_rows_measured"], report["num_rows"] - report["num_bad_rows"]
    limit = report["max_sequence_length"]
    copies = [f"{each['line']} (as {each['first_line']})" for each in report["duplicate_rows"]]
    print_facts(
        [
            ("dataset", report["dataset_id"]),
            ("base model", report["base_model"]),
            ("task", report.get("task_type")),
            ("rows", f"{report['num_rows']:,}"),
            ("bad rows", f"{report['num_bad_rows']:,}"),
            ("duplicate rows", _count(report["num_duplicate_rows"], copies)),
            (f"over {limit:,} tokens", _count(report["num_long_rows"], report["long_row_lines"])),
            (
                "without a target",
                _count(report["num_rows_without_target"], report["without_target_lines"]),
            ),
            (
                "tokens a row",
                lengths
                and f"{lengths['min']:,} to {lengths['max']:,}, mean {lengths['mean']:,.1f}, "
                f"median {lengths['p50']:,}, p95 {lengths['p95']:,}, p99 {lengths['p99']:,}",
            ),
            ("measured", None if measured == good else f"{measured:,} of {good:,} good rows"),
        ]
    )
    if lengths:
        print()
        _print_histogram(console, lengths["histogram"])
    if report["bad_rows"]:
        print()
        _print_bad_rows(report)
    if example := report.get("example"):
        print()
        _print_example(console, example)


def _count(number: int, lines: Sequence[object]) -> str:
    if not number:
        return "0"
    shown = ", ".join(map(str, lines[:_SHOWN_LINES]))
    rest = ", …" if number > _SHOWN_LINES else ""
    return f"{number:,}: line{'s' * (number > 1)} {shown}{rest}"


def _print_histogram(console: Console, bins: Sequence[TokenLengthBin]) -> None:
    ranges = [f"{each['from_tokens']:,}–{each['to_tokens']:,}" for each in bins]
    counts = [f"{each['num_rows']:,}" for each in bins]
    most = max(each["num_rows"] for each in bins)
    width = max(map(len, ranges)), max(map(len, counts))
    console.print(Text("Rows by length in tokens", style="bold"))
    for each, range_text, count in zip(bins, ranges, counts, strict=True):
        # Rounded up: a bin with a single row among thousands shows.
        bar = "█" * -(-each["num_rows"] * _BAR_WIDTH // most)
        console.print(Text.assemble(f"{range_text:>{width[0]}}  {count:>{width[1]}}  ", (bar, "cyan")))


def _print_bad_rows(report: DatasetReport) -> None:
    shown = report["bad_rows"][:_SHOWN_ROWS]
    print_table(
        ("LINE", "COLUMN", "PROBLEM", "WHAT TO DO"),
        [(str(row["line"]), row.get("column", ""), row["problem"], row["cure"]) for row in shown],
        title="Bad rows",
    )
    if report["num_bad_rows"] > len(shown):
        console = stdout_console()
        console.print(
            f"and {report['num_bad_rows'] - len(shown):,} more; --json has the first 100", style="dim"
        )


def _print_example(console: Console, example: ExampleRow) -> None:
    start, end = _TARGET_MARKS
    title = f"Line {example['line']} as the model sees it, {start}what is trained on{end} marked"
    console.print(Text(title, style="bold"))
    text = Text()
    is_inside = False
    for token in example["tokens"]:
        if token["is_target"] != is_inside:
            is_inside = token["is_target"]
            text.append(start if is_inside else end, style="green")
        text.append(printable(token["text"]), style="green" if is_inside else "")
    if is_inside:
        text.append(end, style="green")
    if example["num_tokens"] > len(example["tokens"]):
        text.append(f"\n… {example['num_tokens'] - len(example['tokens']):,} more tokens", style="dim")
    console.print(text, soft_wrap=not console.is_terminal)
