"""Dialog rows: every kind of fault by name and place, and the light check at every cut."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset_svc import dialog_rows
from dataset_svc.dialog_rows import (
    MAX_PROBLEMS_PER_ROW,
    DialogRow,
    JsonlChecker,
    JsonlSummary,
    Message,
    RowProblem,
    check_dialog_line,
    iter_dialog_rows,
)
from svc_kit.errors import MalformedFile
from tests.cases import num_cases

GOOD = b'{"dialog": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}'
USER = '{"role": "user", "content": "Hi"}'
REPLY = '{"role": "assistant", "content": "Hello"}'


def problems_of(text: str | bytes) -> list[RowProblem]:
    found = check_dialog_line(7, text.encode() if isinstance(text, str) else text)
    assert isinstance(found, list)
    for problem in found:
        json.dumps(problem.to_json(), ensure_ascii=False).encode()
        assert problem.line == 7
    return found


def test_a_row_without_keep_loss_trains_on_the_assistant() -> None:
    row = check_dialog_line(3, GOOD + b"\r\n")
    assert row == DialogRow(3, (Message("user", "Hi"), Message("assistant", "Hello")), (False, True))
    assert row.to_example() == {
        "dialog": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
        "keep_loss": [False, True],
    }


def test_keep_loss_is_kept_as_given() -> None:
    row = check_dialog_line(1, f'{{"keep_loss": [true, false], "dialog": [{USER}, {REPLY}]}}'.encode())
    assert isinstance(row, DialogRow)
    assert row.keep_loss == (True, False)


def test_every_role_and_an_empty_untrained_message_are_fine() -> None:
    messages = [{"role": role, "content": ""} for role in ("system", "user", "tool")]
    messages.append({"role": "assistant", "content": "é 𝄞"})
    assert isinstance(check_dialog_line(1, json.dumps({"dialog": messages}).encode()), DialogRow)


@pytest.mark.parametrize(
    ("text", "where", "problem"),
    [
        ("{", "row", "JSON breaks at character 2"),
        ("", "row", "JSON breaks at character 1"),
        ("[1]", "row", "found a list"),
        ("null", "row", "found null"),
        ('"x"', "row", "found a string"),
        ("1.5", "row", "found a number"),
        (b'{"dialog": "\xff"}', "row", "0xFF at offset 12"),
        ("{}", "row", '"dialog" is missing'),
        ('{"dialog": {}}', "dialog", "found an object"),
        ('{"dialog": []}', "dialog", "empty"),
        (f'{{"dialog": [{REPLY}], "dialogue": 1}}', "row", 'unknown key "dialogue"'),
        (f'{{"dialog": [{REPLY}], "dialog": [{REPLY}]}}', "row", '"dialog" stands twice'),
        ('{"dialog": [7]}', "dialog[0]", "found a number"),
        (f'{{"dialog": [{USER}, {{"role": "bot", "content": "x"}}]}}', "dialog[1].role", 'found "bot"'),
        ('{"dialog": [{"role": true, "content": "x"}]}', "dialog[0].role", "found a boolean"),
        ('{"dialog": [{"content": "x"}]}', "dialog[0]", '"role" is missing'),
        ('{"dialog": [{"role": "user"}]}', "dialog[0]", '"content" is missing'),
        ('{"dialog": [{"role": "user", "content": null}]}', "dialog[0].content", "found null"),
        (
            '{"dialog": [{"role": "assistant", "content": "x", "name": "y"}]}',
            "dialog[0]",
            'unknown key "name"',
        ),
        (
            '{"dialog": [{"role": "user", "role": "tool", "content": "x"}]}',
            "dialog[0]",
            '"role" stands twice',
        ),
        ('{"dialog": [{"role": "assistant", "content": "a\\ud800b"}]}', "dialog[0].content", "\\ud800"),
        (f'{{"dialog": [{REPLY}], "keep_loss": true}}', "keep_loss", "found a boolean"),
        (f'{{"dialog": [{REPLY}], "keep_loss": null}}', "keep_loss", "found null"),
        (f'{{"dialog": [{REPLY}], "keep_loss": []}}', "keep_loss", "length 0"),
        (f'{{"dialog": [{REPLY}], "keep_loss": [1]}}', "keep_loss[0]", "found a number"),
        (f'{{"dialog": [{REPLY}], "keep_loss": [false]}}', "row", "nothing to train on"),
        (f'{{"dialog": [{USER}]}}', "row", "nothing to train on"),
        ('{"dialog": [{"role": "assistant", "content": " "}]}', "row", "nothing to train on"),
        ('{"dialog": NaN}', "row", "NaN is no JSON value"),
        ('{"dialog": -Infinity}', "row", "-Infinity is no JSON value"),
        ("[" * 100_000, "row", "nested too deeply"),
        ('{"dialog": ' + "1" * 5_000 + "}", "row", "too many digits"),
        ('{"\\ud800": 1}', "row", '"\\ud800"'),
        ("\ufeff{}", "row", "BOM"),
    ],
)
def test_names_the_place_and_the_problem(text: str | bytes, where: str, problem: str) -> None:
    found = problems_of(text)
    assert any(each.where == where and problem in each.problem for each in found), found
    assert all(each.expected for each in found)


def test_lists_every_problem_of_a_row_up_to_the_limit() -> None:
    found = problems_of('{"dialog": [{"role": "x", "content": 1}], "keep_loss": "y", "z": 0}')
    assert [each.where for each in found] == ["row", "dialog[0].role", "dialog[0].content", "keep_loss"]
    assert (
        len(problems_of(json.dumps({"dialog": [0] * 1_000, "keep_loss": [0] * 1_000})))
        == MAX_PROBLEMS_PER_ROW
    )


def test_a_problem_reads_well() -> None:
    problem = RowProblem(2, "dialog[0].role", 'found "bot"', "one of system, user")
    assert str(problem) == 'line 2, dialog[0].role: found "bot"; expected one of system, user'
    assert problem.to_json() == {
        "line": 2,
        "where": "dialog[0].role",
        "problem": 'found "bot"',
        "expected": "one of system, user",
    }


def test_reads_a_file_past_blank_lines_and_a_byte_order_mark() -> None:
    file = io.BytesIO(b"\xef\xbb\xbf" + GOOD + b"\r\n\n  \n[]\n" + GOOD)
    first, second, third = iter_dialog_rows(file)
    assert isinstance(first, DialogRow)
    assert first.line == 1
    assert isinstance(second, list)
    assert second[0].line == 4
    assert isinstance(third, DialogRow)
    assert third.line == 5
    assert not file.closed


def test_a_line_that_is_too_large_is_one_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialog_rows, "MAX_LINE_BYTES", len(GOOD))
    rows = list(iter_dialog_rows(io.BytesIO(GOOD + b"\n " + GOOD + b" " * 500 + b"\n" + GOOD)))
    assert isinstance(rows[0], DialogRow)
    assert isinstance(rows[1], list)
    assert f"larger than {len(GOOD)} bytes" in rows[1][0].problem
    assert isinstance(rows[2], DialogRow)
    assert rows[2].line == 3


@settings(deadline=None, max_examples=num_cases(300))
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["dialog", "keep_loss", "role", "content", "x"]), inner)
        ),
    )
)
def test_any_json_gives_a_row_or_problems(value: object) -> None:
    found = check_dialog_line(1, json.dumps(value).encode())
    assert isinstance(found, DialogRow) or (found and all(isinstance(each, RowProblem) for each in found))


def light_check(data: bytes, chunk_sizes: list[int]) -> JsonlSummary | str:
    checker = JsonlChecker()
    try:
        for size in chunk_sizes:
            checker.feed(data[:size])
            data = data[size:]
        checker.feed(data)
        return checker.finish()
    except MalformedFile as error:
        return error.message


@settings(deadline=None, max_examples=num_cases(300))
@given(
    st.lists(
        st.sampled_from([b"x", b" ", b"\n", b"\r\n", b"\t", "é".encode(), b"\xc3", b"\0"]), max_size=20
    ).map(b"".join),
    st.lists(st.integers(0, 4), max_size=20),
)
def test_the_light_check_counts_lines_at_any_cut(data: bytes, chunk_sizes: list[int]) -> None:
    whole = light_check(data, [])
    assert light_check(data, chunk_sizes) == whole
    lines = sum(bool(line.strip()) for line in data.split(b"\n"))
    if isinstance(whole, JsonlSummary):
        assert whole == JsonlSummary(lines, len(data))
    else:
        assert not lines or b"\0" in data or b"\xc3" in data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "The file is empty. Expected one JSON object on each line."),
        (b" \n\r\n", "The file is empty. Expected one JSON object on each line."),
        (b"\xef\xbb\xbf", "The file is empty. Expected one JSON object on each line."),
        (b"{}\n\x00", "Line 2: a NUL byte at byte offset 3. Remove it, or save the file as UTF-8 text."),
    ],
)
def test_the_light_check_refuses(data: bytes, message: str) -> None:
    assert light_check(data, []) == message
