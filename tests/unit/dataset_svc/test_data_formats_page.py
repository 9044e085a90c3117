"""docs/data-formats.md keeps its word: its examples are fed to the code."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

from dataset_svc.csv_rows import CsvChecker, iter_csv_rows
from dataset_svc.dialog_rows import DialogRow, RowProblem, check_dialog_line
from dataset_svc.task_columns import plan_columns

PAGE = (Path(__file__).parents[3] / "docs" / "data-formats.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[bytes]:
    return [block.encode() for block in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)]


def test_the_csv_examples_are_valid_and_the_last_becomes_the_dialog_below_it() -> None:
    for block in blocks("csv"):
        checker = CsvChecker()
        checker.feed(block)
        summary = checker.finish()
        examples = [
            plan_columns("qa", summary.columns).to_example(line, row)
            for line, row in iter_csv_rows(io.BytesIO(block))
        ]
        assert not any(isinstance(example, RowProblem) for example in examples)
    assert examples == [json.loads(blocks("json")[0])]


def test_the_dialog_examples_are_valid() -> None:
    for line in b"".join(blocks("json")[:2]).splitlines():
        assert isinstance(check_dialog_line(1, line), DialogRow)


def test_the_problem_shown_is_the_one_reported() -> None:
    found = check_dialog_line(
        3, b'{"dialog": [{"role": "user", "content": "x"}, {"role": "bot", "content": "y"}]}'
    )
    assert isinstance(found, list)
    assert found[0].to_json() == json.loads(blocks("json")[2])
