"""What a base model makes of a dataset's rows: how long they are in tokens, and what is trained on.

`python -m trainer_svc.engine.dataset_report SPEC.json` measures the rows that a `ReportSpec` names, in a
process of its own: torch and transformers take memory that whoever asks shouldn't have to keep.

Exit codes: 0 done; 3 the base model can't be used, the reason on stderr; 1 anything else.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trainer_svc.engine.errors import JOB_FAULT_EXIT_CODE, JobFault
from trainer_svc.engine.examples import Example, part_of, tokenize_row
from trainer_svc.engine.rows import DialogRow, Row, TextRow

MAX_LISTED = 100
MAX_EXAMPLE_TOKENS = 1000
MAX_HISTOGRAM_BINS = 12

# What a tokenizer's decoder writes for bytes that are no whole character.
_REPLACEMENT = "\ufffd"
_GENERAL_CURE = "change the row so that the base model's chat template takes it, or take another base model"


class ReportSpec(BaseModel):
    """What to measure.

    Attributes:
        base_model_dir: a transformers folder; only its tokenizer is read.
        rows_file: JSONL of `NumberedRow`.
        report_file: gets the `TokenReport` as JSON.
        max_sequence_length: the longest row, in tokens.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_model_dir: Path
    rows_file: Path
    report_file: Path
    max_sequence_length: int = Field(ge=1)


class NumberedRow(BaseModel):
    """A row, and its line in the file that it came from, from 1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    line: int
    row: DialogRow | TextRow


@dataclass(frozen=True)
class RefusedRow:
    """A row that the base model's chat template can't write."""

    line: int
    problem: str
    cure: str


@dataclass(frozen=True)
class Bin:
    """How many rows have from `from_tokens` to `to_tokens` tokens, both included."""

    from_tokens: int
    to_tokens: int
    num_rows: int


@dataclass(frozen=True)
class TokenLengths:
    """Lengths of rows in tokens; percentiles by nearest rank."""

    min: int
    max: int
    mean: float
    p50: int
    p95: int
    p99: int
    histogram: list[Bin]


@dataclass(frozen=True)
class ExampleToken:
    """A token's text, and whether it is trained on."""

    text: str
    is_target: bool


@dataclass(frozen=True)
class ExampleRow:
    """A row as the model sees it.

    Attributes:
        line: its line.
        num_tokens: of the whole row.
        text: the texts of `tokens`, joined.
        tokens: the row's first, up to the longest length and `MAX_EXAMPLE_TOKENS`.
    """

    line: int
    num_tokens: int
    text: str
    tokens: list[ExampleToken]


@dataclass
class TokenReport:
    """What was found; lists have the first `MAX_LISTED` entries, counts have all.

    Attributes:
        num_rows_measured: rows that were tokenised.
        num_refused_rows: rows that couldn't be.
        num_long_rows: measured rows over the longest length.
        num_rows_without_target: measured rows with nothing to train on, once cut to the longest length.
        token_lengths: of the measured rows before any is cut; None where there is none.
        example: the first measured row; None where there is none.
    """

    num_rows_measured: int = 0
    num_refused_rows: int = 0
    refused_rows: list[RefusedRow] = field(default_factory=list)
    num_long_rows: int = 0
    long_row_lines: list[int] = field(default_factory=list)
    num_rows_without_target: int = 0
    without_target_lines: list[int] = field(default_factory=list)
    token_lengths: TokenLengths | None = None
    example: ExampleRow | None = None


def measure_rows(
    rows: Iterable[tuple[int, Row]], tokenizer: PreTrainedTokenizerBase, max_sequence_length: int
) -> TokenReport:
    """Tokenises rows as training does, one after the other.

    Args:
        rows: line numbers and rows.
        tokenizer: the base model's.
        max_sequence_length: the longest row, in tokens.
    """
    report = TokenReport()
    lengths = []
    for line, row in rows:
        try:
            example = tokenize_row(row, tokenizer, line)
        except JobFault as fault:
            report.num_refused_rows += 1
            if len(report.refused_rows) < MAX_LISTED:
                report.refused_rows.append(_refused(line, fault))
            continue
        lengths.append(example.num_tokens)
        if report.example is None:
            report.example = _shown(example, tokenizer, max_sequence_length)
        if example.num_tokens > max_sequence_length:
            report.num_long_rows += 1
            report.long_row_lines.append(line)
            example = part_of(example, 0, max_sequence_length)
        if not example.num_targets:
            report.num_rows_without_target += 1
            report.without_target_lines.append(line)
    report.num_rows_measured = len(lengths)
    report.token_lengths = token_lengths(lengths)
    del report.long_row_lines[MAX_LISTED:]
    del report.without_target_lines[MAX_LISTED:]
    return report


def _refused(line: int, fault: JobFault) -> RefusedRow:
    problem, _, cure = str(fault).rpartition("; ")
    if fault.__cause__ is not None or not problem:  # the template's own words, which name no cure
        return RefusedRow(line, str(fault), _GENERAL_CURE)
    return RefusedRow(line, problem, cure)


def token_lengths(lengths: Sequence[int]) -> TokenLengths | None:
    """The distribution of lengths; None if there are none."""
    if not lengths:
        return None
    ordered = sorted(lengths)

    def percentile(percent: int) -> int:
        return ordered[math.ceil(len(ordered) * percent / 100) - 1]

    return TokenLengths(
        min=ordered[0],
        max=ordered[-1],
        mean=sum(ordered) / len(ordered),
        p50=percentile(50),
        p95=percentile(95),
        p99=percentile(99),
        histogram=histogram(ordered),
    )


def histogram(lengths: Sequence[int]) -> list[Bin]:
    """At most `MAX_HISTOGRAM_BINS` bins of one round width (1, 2 or 5 times a power of ten), without gaps."""
    shortest, longest = min(lengths), max(lengths)
    width = next(
        width
        for width in _round_widths()
        if longest // width - shortest // width < MAX_HISTOGRAM_BINS  # bins start at multiples of the width
    )
    first = shortest // width
    counts = [0] * (longest // width - first + 1)
    for length in lengths:
        counts[length // width - first] += 1
    return [
        Bin((first + index) * width, (first + index + 1) * width - 1, count)
        for index, count in enumerate(counts)
    ]


def _round_widths() -> Iterator[int]:
    power = 1
    while True:
        yield from (power, 2 * power, 5 * power)
        power *= 10


def _shown(example: Example, tokenizer: PreTrainedTokenizerBase, max_sequence_length: int) -> ExampleRow:
    part = part_of(example, 0, min(max_sequence_length, MAX_EXAMPLE_TOKENS))
    texts = list(_token_texts(part.input_ids.tolist(), tokenizer))
    tokens = [
        ExampleToken(text, is_target) for text, is_target in zip(texts, part.is_target.tolist(), strict=True)
    ]
    return ExampleRow(example.line_number, example.num_tokens, "".join(texts), tokens)


def _token_texts(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Each token's text: what it adds to the decoded text of those before it.

    Not each by itself: a token may be a part of a character, or have a space only after another token. The
    token that completes a character has it, those before it are empty.
    """

    def decoded(start: int, end: int) -> str:
        text = tokenizer.decode(ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    # Only from the last whole token on, so that the work doesn't grow with the square of the length.
    start = told = 0
    for end in range(1, len(ids) + 1):
        known, text = decoded(start, told), decoded(start, end)
        if text.endswith(_REPLACEMENT) and end < len(ids):
            yield ""
            continue
        yield text[len(known) :]
        start, told = told, end


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Loads a base model's tokenizer. Never runs code from the folder.

    Raises:
        JobFault: the folder has none, or one without an end-of-text token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise JobFault(f"the tokenizer in {folder} can't be loaded: {error}") from error
    if tokenizer.eos_token_id is None:
        raise JobFault(
            f"the tokenizer in {folder} has no end-of-text token, so no answer's end can be trained"
        )
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def _read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    with path.open(encoding="utf-8") as file:
        for text in file:
            numbered = NumberedRow.model_validate_json(text)
            yield numbered.line, numbered.row


def main(arguments: list[str]) -> int:
    """Measures what the one argument's specification names. Returns the exit code."""
    if len(arguments) != 1:
        print("usage: python -m trainer_svc.engine.dataset_report SPEC.json", file=sys.stderr)
        return 2
    spec = ReportSpec.model_validate_json(Path(arguments[0]).read_bytes())
    try:
        tokenizer = load_tokenizer(spec.base_model_dir)
    except JobFault as error:
        print(error, file=sys.stderr)
        return JOB_FAULT_EXIT_CODE
    report = measure_rows(_read_rows(spec.rows_file), tokenizer, spec.max_sequence_length)
    spec.report_file.write_text(json.dumps(asdict(report)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
