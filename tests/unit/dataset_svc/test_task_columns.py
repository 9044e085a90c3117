"""Which columns a task takes, and the examples that come of them."""

from __future__ import annotations

import pytest

from dataset_svc.dialog_rows import RowProblem
from dataset_svc.task_columns import TaskType, plan_columns
from svc_kit.errors import UnsupportedColumns


def dialog(*messages: tuple[str, str]) -> dict[str, object]:
    return {
        "dialog": [{"role": role, "content": content} for role, content in messages],
        "keep_loss": [role == "assistant" for role, _ in messages],
    }


@pytest.mark.parametrize(
    ("task_type", "row", "example", "unused"),
    [
        ("qa", {"question": "q", "answer": "a"}, dialog(("user", "q"), ("assistant", "a")), ()),
        ("qa", {"ANSWER": " a ", "Question": "q\n"}, dialog(("user", "q\n"), ("assistant", " a ")), ()),
        ("qa", {"prompt": "q", "completion": "a"}, dialog(("user", "q"), ("assistant", "a")), ()),
        ("qa", {"instruction": "q", "output": "a"}, dialog(("user", "q"), ("assistant", "a")), ()),
        ("qa", {"input": "q", "output": "a"}, dialog(("user", "q"), ("assistant", "a")), ()),
        (
            "qa",
            {"id": "7", "question": "q", "answer": "a", "prompt": "p", "completion": "c"},
            dialog(("user", "q"), ("assistant", "a")),
            ("id", "prompt", "completion"),
        ),
        (
            "qa",
            {"context": "c", "question": "q", "answer": "a", "System": "s"},
            dialog(("system", "s"), ("user", "c\n\nq"), ("assistant", "a")),
            (),
        ),
        (
            "qa",
            {"context": " ", "question": "q", "answer": "a", "system": ""},
            dialog(("user", "q"), ("assistant", "a")),
            (),
        ),
        (
            "qa",
            {"instruction": "do", "input": "this", "output": "a"},
            dialog(("user", "do\n\nthis"), ("assistant", "a")),
            (),
        ),
        (
            "not_qa",
            {"text": "  t", "prompt": "p", "completion": "c"},
            {"text": "  t"},
            ("prompt", "completion"),
        ),
        ("not_qa", {"prompt": "p", "completion": "c"}, dialog(("user", "p"), ("assistant", "c")), ()),
        (
            "not_qa",
            {"instruction": "do", "input": "this", "output": "a", "system": "s"},
            dialog(("user", "do\n\nthis"), ("assistant", "a")),
            ("system",),
        ),
        (
            "not_qa",
            {"instruction": "do", "input": "", "output": "a"},
            dialog(("user", "do"), ("assistant", "a")),
            (),
        ),
        ("not_qa", {"instruction": "do", "output": "a"}, dialog(("user", "do"), ("assistant", "a")), ()),
    ],
)
def test_makes_examples(
    task_type: TaskType, row: dict[str, str], example: dict[str, object], unused: tuple[str, ...]
) -> None:
    plan = plan_columns(task_type, tuple(row))
    assert plan.task_type == task_type
    assert plan.unused == unused
    assert plan.to_example(2, row) == example


@pytest.mark.parametrize(
    ("task_type", "row", "column"),
    [
        ("qa", {"Question": "q", "Answer": " \n"}, "Answer"),
        ("qa", {"question": "", "answer": "a", "context": "c"}, "question"),
        ("not_qa", {"text": "\t"}, "text"),
        ("not_qa", {"prompt": "p", "completion": ""}, "completion"),
    ],
)
def test_a_blank_cell_is_a_problem(task_type: TaskType, row: dict[str, str], column: str) -> None:
    problem = plan_columns(task_type, tuple(row)).to_example(9, row)
    assert problem == RowProblem(9, f'column "{column}"', "the value is empty", "some text")


@pytest.mark.parametrize(
    ("task_type", "columns", "words"),
    [
        ("qa", ("a", "b"), ["question and answer, or prompt and completion", 'Found: "a", "b"', "Rename"]),
        ("qa", ("question", "output"), ['Found: "question", "output"']),
        ("qa", ("text",), ['fit the task type "not_qa"']),
        ("not_qa", ("question", "answer"), ["text, or prompt and completion", 'fit the task type "qa"']),
        ("qa", ("question", " answer"), ['" answer"', "Spaces are part"]),
        ("qa", ("question;answer",), ["by commas"]),
        ("qa", ("question", "Question", "answer"), ['"question", "Question" all match "question"']),
        ("qa", ("question", "answer", "Context", "context"), ['all match "context"']),
        ("qa", tuple(f"c{number}" for number in range(100)), ['"c19" and 80 more']),
    ],
)
def test_refuses_columns_that_do_not_fit(
    task_type: TaskType, columns: tuple[str, ...], words: list[str]
) -> None:
    with pytest.raises(UnsupportedColumns) as caught:
        plan_columns(task_type, columns)
    for word in words:
        assert word in caught.value.message


def test_columns_alike_that_are_not_used_are_legal() -> None:
    assert plan_columns("qa", ("question", "answer", "Id", "id")).unused == ("Id", "id")
    assert plan_columns("qa", ("question", "answer", "Prompt", "prompt")).unused == ("Prompt", "prompt")
