"""What is found in rows without a tokenizer: bad ones, repeated ones, and which are measured."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from dataset_svc import row_check
from dataset_svc.row_check import RowCheck, check_rows
from dataset_svc.task_columns import plan_any_task
from dataset_svc.training_rows import CheckedRow, iter_csv_examples, iter_dialog_examples
from svc_kit.errors import UnsupportedColumns


def checked_csv(text: str, folder: Path) -> RowCheck:
    rows = iter_csv_examples(io.BytesIO(text.encode()), plan_any_task)
    return check_rows(rows, folder, folder / "rows.jsonl", lambda: None)


def checked_dialogs(text: str, folder: Path) -> RowCheck:
    rows = iter_dialog_examples(io.BytesIO(text.encode()))
    return check_rows(rows, folder, folder / "rows.jsonl", lambda: None)


def to_measure(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_csv(tmp_path: Path) -> None:
    text = 'id,Question,answer\n1,a,"b\nb"\n2,a,\n3,a,"b\nb"\n4, ,x\n5,c,d\n'
    check = checked_csv(text, tmp_path)

    assert (check.num_rows, check.num_bad_rows) == (5, 2)
    assert check.bad_rows == [
        {"line": 4, "column": "answer", "problem": "the value is empty", "cure": "write some text"},
        {"line": 7, "column": "Question", "problem": "the value is empty", "cure": "write some text"},
    ]
    # The ids differ, but nobody trains on them.
    assert (check.num_duplicate_rows, check.duplicate_rows) == (1, [{"line": 5, "first_line": 2}])
    rows = to_measure(tmp_path)
    assert [row["line"] for row in rows] == [2, 5, 8]
    assert rows[0]["row"]["dialog"][1] == {"role": "assistant", "content": "b\nb"}


def test_dialogs(tmp_path: Path) -> None:
    lines = [
        '{"dialog": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
        "",
        '{"dialog": [{"role": "bot", "content": 1}], "keep": []}',
        '{"dialog": [{"content": "a", "role": "user"}, {"role": "assistant", "content": "b"}],'
        ' "keep_loss": [false, true]}',
        "{",
        '{"dialog": [{"role": "user", "content": "a"}]}',
    ]
    check = checked_dialogs("\n".join(lines), tmp_path)

    assert (check.num_rows, check.num_bad_rows) == (5, 3)
    assert [(row["line"], row.get("column")) for row in check.bad_rows] == [(3, None), (5, None), (6, None)]
    assert check.bad_rows[0]["problem"] == 'unknown key "keep", and 2 more faults in this row'
    assert check.bad_rows[0]["cure"] == "write the keys dialog and keep_loss (optional)"
    assert check.bad_rows[2]["problem"] == "there is nothing to train on"
    # The same, in other words.
    assert check.duplicate_rows == [{"line": 4, "first_line": 1}]
    assert [row["line"] for row in to_measure(tmp_path)] == [1, 4]


def test_the_place_in_a_dialog_is_its_column(tmp_path: Path) -> None:
    check = checked_dialogs('{"dialog": [{"role": "bot", "content": "a"}]}', tmp_path)
    assert check.bad_rows == [
        {
            "line": 1,
            "column": "dialog[0].role",
            "problem": 'found "bot"',
            "cure": "write one of system, user, assistant, tool",
        }
    ]


def test_lists_are_capped_by_line_and_counts_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_check, "MAX_LISTED", 3)
    # Of each number two rows, far apart, so that they meet in many files of hashes.
    check = checked_csv("text\n" + "".join(f"{n % 500}\n" for n in range(1000)) + '""\n' * 5, tmp_path)

    assert (check.num_bad_rows, [row["line"] for row in check.bad_rows]) == (5, [1002, 1003, 1004])
    assert check.num_duplicate_rows == 500
    assert check.duplicate_rows == [{"line": line, "first_line": line - 500} for line in (502, 503, 504)]


def test_what_is_measured_has_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_check, "MAX_MEASURED_ROW_CHARS", 40)
    monkeypatch.setattr(row_check, "MAX_MEASURED_ROWS", 3)
    check = checked_csv(f"text\na\n{'x' * 40}\nb\nc\nd\n", tmp_path)
    assert (check.num_unmeasured_long_rows, check.unmeasured_long_lines) == (1, [3])
    assert [row["line"] for row in to_measure(tmp_path)] == [2, 4, 5]

    monkeypatch.setattr(row_check, "MAX_MEASURED_CHARS", 30)  # two rows of {"text": "a"}
    checked_csv("text\na\nb\nc\n", tmp_path)
    assert [row["line"] for row in to_measure(tmp_path)] == [2, 3]


def test_the_work_can_be_ended(tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    looks = []

    def look_up() -> None:
        looks.append(1)
        if len(looks) == 3:
            raise Enough

    rows = (CheckedRow(line, {"text": "x"}) for line in range(1, 100_000))
    with pytest.raises(Enough):
        check_rows(rows, tmp_path, tmp_path / "rows.jsonl", look_up)


def test_the_task_is_the_one_that_columns_fit() -> None:
    assert plan_any_task(["answer", "question", "text"]).task_type == "qa"
    assert plan_any_task(["answer", "text"]).task_type == "not_qa"
    with pytest.raises(UnsupportedColumns, match=r'"qa" needs .* "not_qa" needs .*"a", "b"'):
        plan_any_task(["a", "b"])
