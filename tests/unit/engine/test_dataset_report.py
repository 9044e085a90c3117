"""What a report says of rows, against cases made by hand.

The tiny model has a token for each byte, and for few words more.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from trainer_svc.engine import dataset_report
from trainer_svc.engine.dataset_report import (
    Bin,
    ExampleToken,
    TokenReport,
    histogram,
    load_tokenizer,
    main,
    measure_rows,
    token_lengths,
)
from trainer_svc.engine.errors import JOB_FAULT_EXIT_CODE
from trainer_svc.engine.rows import DialogRow, Row, TextRow

HEAD = "<|im_start|>system\nYou are Tunery.<|im_end|>\n<|im_start|>user\n"


@pytest.fixture
def tokenizer(tiny_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny_dir)


def dialog(question: str, answer: str, keep_loss: tuple[bool, bool] | None = None) -> DialogRow:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return DialogRow.model_validate({"dialog": turns, "keep_loss": keep_loss})


def measured(tokenizer: PreTrainedTokenizerBase, *rows: Row, limit: int = 2048) -> TokenReport:
    return measure_rows(list(enumerate(rows, start=1)), tokenizer, limit)


def test_the_example_is_marked_token_by_token(tokenizer: PreTrainedTokenizerBase) -> None:
    example = measured(tokenizer, dialog("hi", "yé🙂")).example

    assert example is not None
    assert example.line == 1
    assert example.text == HEAD + "hi<|im_end|>\n<|im_start|>assistant\nyé🙂<|im_end|>\n"
    # Characters of several tokens come with their last one.
    answer = [
        *(ExampleToken("y", True), ExampleToken("", True), ExampleToken("é", True)),
        *(ExampleToken("", True), ExampleToken("", True), ExampleToken("", True), ExampleToken("🙂", True)),
        *(ExampleToken("<|im_end|>", True), ExampleToken("\n", False)),
    ]
    assert example.tokens[-len(answer) :] == answer
    assert not any(token.is_target for token in example.tokens[: -len(answer)])
    assert example.num_tokens == len(example.tokens)
    assert [token.text for token in example.tokens[:3]] == ["<|im_start|>", "system", "\n"]


def test_a_texts_first_token_is_no_target(tokenizer: PreTrainedTokenizerBase) -> None:
    example = measured(tokenizer, TextRow(text="xy")).example

    assert example is not None
    assert example.tokens == [
        ExampleToken("x", False),
        ExampleToken("y", True),
        ExampleToken("<|im_end|>", True),
    ]


def test_the_example_is_cut_where_training_cuts_it(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = measured(tokenizer, TextRow(text="xxxxé"), limit=5).example
    assert example is not None
    # Half of the last character is left over.
    assert (example.text, len(example.tokens), example.num_tokens) == ("xxxx\ufffd", 5, 7)

    monkeypatch.setattr(dataset_report, "MAX_EXAMPLE_TOKENS", 3)
    example = measured(tokenizer, TextRow(text="xxxxé"), limit=5).example
    assert example is not None
    assert (example.text, example.num_tokens) == ("xxx", 7)


def test_a_replacement_character_of_the_users_own_is_kept(tokenizer: PreTrainedTokenizerBase) -> None:
    example = measured(tokenizer, TextRow(text="a\ufffdb\ufffd")).example
    assert example is not None
    assert example.text == "a\ufffdb\ufffd<|im_end|>"


def test_long_rows_and_rows_whose_targets_are_cut_off(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = (
        TextRow(text="x" * 9),  # 10 tokens, which fit
        TextRow(text="x" * 10),
        dialog("a", "b"),  # its target comes late
        dialog("c", "d", (False, False)),
    )
    report = measured(tokenizer, *rows, limit=10)

    assert (report.num_rows_measured, report.num_refused_rows) == (4, 0)
    assert (report.num_long_rows, report.long_row_lines) == (3, [2, 3, 4])
    assert (report.num_rows_without_target, report.without_target_lines) == (2, [3, 4])
    whole = measured(tokenizer, *rows)
    assert (whole.num_long_rows, whole.without_target_lines) == (0, [4])
    # Lengths are those before the cut.
    assert report.token_lengths == whole.token_lengths


def test_lists_are_capped_and_counts_are_not(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_report, "MAX_LISTED", 2)
    report = measured(tokenizer, *[dialog("a", "b")] * 5, limit=3)
    assert (report.num_long_rows, report.long_row_lines) == (5, [1, 2])
    assert (report.num_rows_without_target, report.without_target_lines) == (5, [1, 2])


def test_rows_that_the_template_refuses(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('no; never') }}{% endif %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content }}<|im_end|>\n{% endfor %}"
    )
    report = measured(tokenizer, dialog("no", "x"), dialog("a", "b"), TextRow(text="y"))
    assert (report.num_refused_rows, report.num_rows_measured) == (1, 2)
    [refused] = report.refused_rows
    assert refused.line == 1
    assert refused.problem.endswith("refuses the dialog: no; never")
    assert refused.cure.startswith("change the row")
    assert report.example is not None
    assert report.example.line == 2


def test_a_model_without_a_template(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    report = measured(tokenizer, dialog("a", "b"))
    [refused] = report.refused_rows
    assert refused.problem == "the base model has no chat template, so it can't read dialogs"
    assert refused.cure.startswith("take an instruct model")
    assert (report.token_lengths, report.example) == (None, None)


def test_percentiles_by_nearest_rank() -> None:
    found = token_lengths(list(range(200, 0, -1)))
    assert found is not None
    assert (found.min, found.p50, found.p95, found.p99, found.max) == (1, 100, 190, 198, 200)
    assert found.mean == 100.5
    one = token_lengths([7])
    assert one is not None
    assert (one.min, one.p50, one.p99, one.max, one.histogram) == (7, 7, 7, 7, [Bin(7, 7, 1)])


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([5, 5, 6, 16], [(5, 5, 2), (6, 6, 1), *((at, at, 0) for at in range(7, 16)), (16, 16, 1)]),
        ([3, 17], [(2, 3, 1), *((at, at + 1, 0) for at in range(4, 16, 2)), (16, 17, 1)]),
        ([99, 100, 1000], [(0, 99, 1), (100, 199, 1), *((a, a + 99, 0) for a in range(200, 1000, 100)),
                           (1000, 1099, 1)]),
    ],
)  # fmt: skip
def test_histogram(lengths: list[int], expected: list[tuple[int, int, int]]) -> None:
    assert histogram(lengths) == [Bin(*each) for each in expected]


def spec(folder: Path, base_model_dir: Path, rows: list[dict[str, Any]]) -> tuple[str, Path]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "base_model_dir": str(base_model_dir),
        "rows_file": str(folder / "rows.jsonl"),
        "report_file": str(folder / "report.json"),
        "max_sequence_length": 100,
    }
    (folder / "spec.json").write_text(json.dumps(values))
    return str(folder / "spec.json"), folder / "report.json"


def test_the_program_writes_the_report(tiny_dir: Path, tmp_path: Path) -> None:
    rows = [{"line": 3, "row": {"text": "ab"}}, {"line": 9, "row": dialog("a", "b").model_dump()}]
    spec_file, report_file = spec(tmp_path, tiny_dir, rows)
    assert main([spec_file]) == 0
    report = json.loads(report_file.read_text())
    assert set(report) == set(TokenReport.__dataclass_fields__)
    assert (report["num_rows_measured"], report["example"]["line"]) == (2, 3)

    spec_file, report_file = spec(tmp_path, tiny_dir, [])
    assert main([spec_file]) == 0
    report = json.loads(report_file.read_text())
    assert (report["num_rows_measured"], report["token_lengths"], report["example"]) == (0, None, None)


def test_a_model_that_can_not_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec_file, _ = spec(tmp_path, tmp_path, [])
    assert main([spec_file]) == JOB_FAULT_EXIT_CODE
    assert "can't be loaded" in capsys.readouterr().err
    assert main([]) == 2
