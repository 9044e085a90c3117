"""Rows into tokens, and for each token whether the model is trained to say it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import jinja2
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trainer_svc.engine.errors import JobFault
from trainer_svc.engine.rows import DialogRow, Message, Row, TextRow, read_rows

# Stands in for a message's content, to see what a template writes before and after it. Of characters
# that no template and no user writes (Unicode's private use area).
_SENTINEL = "\ue000\ue001\ue002"


@dataclass(frozen=True)
class Example:
    """One row as tokens.

    Attributes:
        input_ids: int64, shape [S].
        is_target: bool, shape [S]; True where the model is trained to predict this token from those
            before it. Never True at position 0, which nothing comes before.
        line_number: the row's line in its file, from 1.
    """

    input_ids: Tensor
    is_target: Tensor
    line_number: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_targets(self) -> int:
        return int(self.is_target.sum())


@dataclass(frozen=True)
class ExampleSet:
    """The examples of one file and what became of its rows.

    Attributes:
        examples: those with at least one target token, in the file's order.
        num_truncated: rows cut to the longest length, skipped ones included.
        num_split: rows split into several of at most the longest length.
        num_skipped: rows left out since no target token was in them.
    """

    examples: tuple[Example, ...]
    num_truncated: int
    num_split: int
    num_skipped: int

    @property
    def num_tokens(self) -> int:
        return sum(example.num_tokens for example in self.examples)

    @property
    def num_targets(self) -> int:
        return sum(example.num_targets for example in self.examples)


def load_examples(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    max_sequence_length: int,
    long_rows: Literal["truncate", "refuse", "split"],
) -> ExampleSet:
    """Reads and tokenises a file of rows.

    Args:
        path: JSONL, see `rows.py`.
        tokenizer: the base model's.
        max_sequence_length: longest row in tokens.
        long_rows: what happens to a longer row: cut at the end, an error, or split into several.

    Raises:
        JobFault: a row is malformed, too long while those are refused, or beyond the chat template; or no
            row has a target token.
    """
    examples: list[Example] = []
    num_truncated = num_split = num_skipped = 0
    for line_number, row in read_rows(path):
        try:
            example = tokenize_row(row, tokenizer, line_number)
        except JobFault as error:
            raise JobFault(f"{path.name}, line {line_number}: {error}") from error
        parts = [example]
        if example.num_tokens > max_sequence_length:
            match long_rows:
                case "refuse":
                    raise JobFault(
                        f"{path.name}, line {line_number}: {example.num_tokens} tokens, but at most "
                        f"{max_sequence_length} are allowed; shorten it or set long_rows to truncate or split"
                    )
                case "truncate":
                    num_truncated += 1
                    parts = [part_of(example, 0, max_sequence_length)]
                case "split":
                    num_split += 1
                    starts = range(0, example.num_tokens, max_sequence_length)
                    parts = [part_of(example, start, start + max_sequence_length) for start in starts]
        learnt = [part for part in parts if part.num_targets]
        num_skipped += not learnt
        examples += learnt
    if not examples:
        raise JobFault(
            f"{path.name}: no row has anything to learn: {num_skipped} rows, {num_truncated} of them cut to "
            f"{max_sequence_length} tokens; check keep_loss and max_sequence_length"
        )
    return ExampleSet(tuple(examples), num_truncated, num_split, num_skipped)


def part_of(example: Example, start: int, end: int) -> Example:
    """The tokens of an example from `start` to before `end`. Nothing predicts the first of them."""
    return _example(
        example.input_ids[start:end].clone(), example.is_target[start:end].clone(), example.line_number
    )


def tokenize_row(row: Row, tokenizer: PreTrainedTokenizerBase, line_number: int = 0) -> Example:
    """One row as tokens and targets.

    A dialog is written with the model's chat template. Its targets are the content of each kept message
    and the token that ends its turn, and nothing else: no role header, no system message that the template
    adds by itself, no newline after the end of a turn. A text's targets are all its tokens and the end mark.

    Raises:
        JobFault: the model has no chat template, or its template doesn't fit the row.
    """
    match row:
        case TextRow():
            ids = [*tokenizer(row.text).input_ids, tokenizer.eos_token_id]
            return _example(torch.tensor(ids), torch.ones(len(ids), dtype=torch.bool), line_number)
        case DialogRow():
            return _tokenize_dialog(row, tokenizer, line_number)


def _tokenize_dialog(row: DialogRow, tokenizer: PreTrainedTokenizerBase, line_number: int) -> Example:
    if tokenizer.chat_template is None:
        raise JobFault(
            "the base model has no chat template, so it can't read dialogs; "
            'take an instruct model, or rows of the form {"text": ...}'
        )
    full_text = _render(tokenizer, row.dialog)
    spans = [
        _target_span(tokenizer, row.dialog, index, full_text) for index, kept in enumerate(row.kept) if kept
    ]
    ids: list[int] = []
    is_target: list[bool] = []
    cut_at = 0
    for piece_start, piece_end in _pieces(tokenizer, full_text, spans):
        assert piece_start == cut_at
        cut_at = piece_end
        encoded = _encode(tokenizer, full_text[piece_start:piece_end])
        ids += encoded.input_ids
        is_target += [
            any(start < span_end and end > span_start for span_start, span_end in spans)
            for start, end in _extents(encoded.offset_mapping, piece_start)
        ]
    return _example(torch.tensor(ids), torch.tensor(is_target, dtype=torch.bool), line_number)


def _pieces(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Where to cut the text before tokenising it: only where a token would straddle a content's start.

    When the model answers, the header is tokenised without the answer, so a token that is part of both (a
    newline of the header merged with one of the content) would never come up.
    """
    extents = _extents(_encode(tokenizer, text).offset_mapping, 0)
    cuts = sorted(
        {span_start for span_start, _ in spans for start, end in extents if start < span_start < end}
    )
    edges = [0, *cuts, len(text)]
    return list(pairwise(edges))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Any:
    # verbose=False: rows longer than the model's context are this module's business, not a warning's.
    return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)


def _extents(offsets: list[tuple[int, int]], base: int) -> list[tuple[int, int]]:
    """The characters that each token covers.

    Some tokenizers leave a token's leading spaces out of its offsets; they belong to it all the same.
    """
    extents = []
    previous_end = 0
    for start, end in offsets:
        extents.append((base + min(start, previous_end), base + end))
        previous_end = end
    return extents


def _target_span(
    tokenizer: PreTrainedTokenizerBase, dialog: tuple[Message, ...], index: int, full_text: str
) -> tuple[int, int]:
    """The characters of a message's content and of the token that ends its turn, in the full text."""
    message = dialog[index]
    probe = _render(tokenizer, (*dialog[:index], Message(role=message.role, content=_SENTINEL)))
    header, found, tail = probe.partition(_SENTINEL)
    end_of_turn = _end_of_turn(tokenizer, tail)
    if not found or end_of_turn is None:
        raise JobFault(
            f"the base model's chat template doesn't write the content of a message of role {message.role!r} "
            "followed by a special token, so the answer's end can't be trained; take another base model"
        )
    # Some templates strip a message's content.
    for content in (message.content, message.content.strip()):
        if full_text.startswith(header + content + end_of_turn):
            return len(header), len(header) + len(content) + len(end_of_turn)
    raise JobFault(
        f"message {index + 1}: the base model's chat template writes it differently inside the dialog than "
        "at its end, so its tokens can't be told apart; split the dialog, or set keep_loss on the last "
        "message only"
    )


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, tail: str) -> str | None:
    """The shortest start of `tail` that ends in a special token; None if there is none."""
    special = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    ends = [tail.index(token) + len(token) for token in special if token in tail]
    return tail[: min(ends)] if ends else None


def _render(tokenizer: PreTrainedTokenizerBase, dialog: tuple[Message, ...]) -> str:
    messages = [{"role": message.role, "content": message.content} for message in dialog]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except (jinja2.TemplateError, TypeError, IndexError, KeyError) as error:
        raise JobFault(f"the base model's chat template refuses the dialog: {error}") from error
    assert isinstance(text, str)
    return text


def _example(input_ids: Tensor, is_target: Tensor, line_number: int) -> Example:
    is_target[:1] = False
    return Example(input_ids, is_target, line_number)
