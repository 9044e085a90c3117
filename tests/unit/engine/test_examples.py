"""Masks, token by token, against tables made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer_svc.engine.base_model import BaseModel
from trainer_svc.engine.errors import JobFault
from trainer_svc.engine.examples import load_examples, tokenize_row
from trainer_svc.engine.rows import DialogRow, TextRow, read_rows


def marked(row: DialogRow | TextRow, tiny: BaseModel) -> str:
    """The row's text with [brackets] around each run of target tokens."""
    example = tokenize_row(row, tiny.tokenizer)
    text, inside = "", False
    for token_id, is_target in zip(example.input_ids.tolist(), example.is_target.tolist(), strict=True):
        if is_target != inside:
            text += "[" if is_target else "]"
            inside = is_target
        text += tiny.tokenizer.decode([token_id])
    return text + ("]" if inside else "")


def dialog(*messages: tuple[str, str], keep_loss: list[bool] | None = None) -> DialogRow:
    turns = [{"role": role, "content": content} for role, content in messages]
    return DialogRow.model_validate({"dialog": turns, "keep_loss": keep_loss})


SYSTEM = "<|im_start|>system\nYou are Tunery.<|im_end|>\n"
ONE_TURN = (("user", "hi"), ("assistant", "yo"))
TWO_TURNS = (*ONE_TURN, ("user", "hm"), ("assistant", "ok"))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        pytest.param(
            dialog(*ONE_TURN),
            SYSTEM + "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[yo<|im_end|>]\n",
            id="assistant by default, the added system message never",
        ),
        pytest.param(
            dialog(*TWO_TURNS, keep_loss=[False, False, False, True]),
            SYSTEM + "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
            "<|im_start|>user\nhm<|im_end|>\n<|im_start|>assistant\n[ok<|im_end|>]\n",
            id="last turn only",
        ),
        pytest.param(
            dialog(*TWO_TURNS, keep_loss=[True, True, False, False]),
            SYSTEM + "<|im_start|>user\n[hi<|im_end|>]\n<|im_start|>assistant\n[yo<|im_end|>]\n"
            "<|im_start|>user\nhm<|im_end|>\n<|im_start|>assistant\nok<|im_end|>\n",
            id="a kept user message",
        ),
        pytest.param(
            dialog(("system", "Be."), *ONE_TURN, keep_loss=[True, False, False]),
            "<|im_start|>system\n[Be.<|im_end|>]\n<|im_start|>user\nhi<|im_end|>\n"
            "<|im_start|>assistant\nyo<|im_end|>\n",
            id="a kept system message",
        ),
        pytest.param(
            dialog(("user", "assistant"), ("assistant", "assistant")),
            SYSTEM + "<|im_start|>user\nassistant<|im_end|>\n<|im_start|>assistant\n[assistant<|im_end|>]\n",
            id="content that is also the header's word",
        ),
        pytest.param(
            dialog(("user", "hi"), ("assistant", "")),
            SYSTEM + "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[<|im_end|>]\n",
            id="an empty answer ends at once",
        ),
        pytest.param(
            dialog(("user", "hi"), ("assistant", "\n  é🙂\n")),
            SYSTEM
            + "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[\n  "
            + "�" * 6
            + "\n<|im_end|>]\n",
            id="white space and characters of several tokens",
        ),
        pytest.param(TextRow(text="xyz"), "x[yz<|im_end|>]", id="a text, but for its first token"),
    ],
)
def test_targets(row: DialogRow | TextRow, expected: str, tiny: BaseModel) -> None:
    assert marked(row, tiny) == expected


def test_tokens_are_the_chat_templates(tiny: BaseModel) -> None:
    row = dialog(*TWO_TURNS)
    messages = [message.model_dump() for message in row.dialog]
    expected = tiny.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert tokenize_row(row, tiny.tokenizer).input_ids.tolist() == expected


def test_a_token_never_straddles_header_and_answer(tiny: BaseModel) -> None:
    """The prompt's tokens are those that the model sees when it is asked."""
    tiny.tokenizer.add_tokens(["\n\n"])  # a vocabulary that merges newlines
    row = dialog(("user", "hi"), ("assistant", "\nyo"))
    example = tokenize_row(row, tiny.tokenizer)
    prompt = tiny.tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=False
    )
    assert example.input_ids.tolist()[: len(prompt)] == prompt
    assert example.is_target.tolist().index(True) == len(prompt)


def test_no_chat_template(tiny: BaseModel) -> None:
    tiny.tokenizer.chat_template = None
    with pytest.raises(JobFault, match=r"has no chat template.*take an instruct model"):
        tokenize_row(dialog(*ONE_TURN), tiny.tokenizer)


def test_template_that_rewrites_earlier_turns(tiny: BaseModel) -> None:
    tiny.tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role }}"
        "{{ m.content if loop.last else m.content | upper }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(JobFault, match=r"message 2: .*differently inside the dialog"):
        tokenize_row(dialog(*TWO_TURNS), tiny.tokenizer)


def test_template_without_an_end_of_turn(tiny: BaseModel) -> None:
    tiny.tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(JobFault, match="answer's end can't be trained"):
        tokenize_row(dialog(*ONE_TURN), tiny.tokenizer)


def test_template_that_refuses(tiny: BaseModel) -> None:
    tiny.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(JobFault, match="refuses the dialog: roles must alternate"):
        tokenize_row(dialog(*ONE_TURN), tiny.tokenizer)


GOOD = {"text": "good"}


def test_a_text_may_speak_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "dialog"}\n{"text": "the key \\"dialog\\""}\n')
    assert [row for _, row in read_rows(path)] == [TextRow(text="dialog"), TextRow(text='the key "dialog"')]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: Invalid JSON"),
        ("[]", "line 2: Input should be"),
        ('{"dialog": []}', "line 2: dialog: Tuple should have at least 1 item"),
        ('{"dialog": [{"role": "user"}]}', "line 2: dialog.0.content: Field required"),
        (
            '{"dialog": [{"role": "user", "content": "x"}], "keep_loss": []}',
            "keep_loss has 0 marks for 1 messages",
        ),
        ('{"prompt": "x"}', "line 2: text: Field required"),
        ('{"text": 3}', "line 2: text: Input should be a valid string"),
    ],
)
def test_broken_rows_are_named(line: str, message: str, tiny: BaseModel, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(JobFault, match=message):
        load_examples(path, tiny.tokenizer, 100, "truncate")


def test_broken_files(tiny: BaseModel, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for content, message in ((b"\n\n", "holds no rows"), (b'{"text": "\xff"}', "not UTF-8")):
        path.write_bytes(content)
        with pytest.raises(JobFault, match=message):
            load_examples(path, tiny.tokenizer, 100, "truncate")
    with pytest.raises(JobFault, match="there is no file"):
        load_examples(tmp_path / "none.jsonl", tiny.tokenizer, 100, "truncate")


def test_long_rows(tiny: BaseModel, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    unkept = {"dialog": [{"role": "user", "content": "x" * 50}, {"role": "assistant", "content": "y"}]}
    path.write_text("".join(json.dumps(row) + "\n" for row in (GOOD, {"text": "x" * 50}, unkept)))
    examples = load_examples(path, tiny.tokenizer, 20, "truncate")
    assert [example.num_tokens for example in examples.examples] == [5, 20]
    assert (examples.num_truncated, examples.num_skipped) == (2, 1)
    with pytest.raises(JobFault, match="line 2: 51 tokens, but at most 20"):
        load_examples(path, tiny.tokenizer, 20, "refuse")


def test_nothing_to_learn(tiny: BaseModel, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"dialog": [{"role": "user", "content": "x"}]}\n')
    with pytest.raises(JobFault, match="no row has anything to learn"):
        load_examples(path, tiny.tokenizer, 100, "truncate")
