"""About how many tokens a base model reads a file's rows as, told from some of them.

With the model's own tokenizer and chat template, but without torch, which this service has no use for. The
trainer counts exactly; this is for an estimate before there is one.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import structlog
from tokenizers import Tokenizer

log = structlog.get_logger(__name__)

_SAMPLED_ROWS = 256
_LONGEST_SAMPLED_BYTES = 2**16


@dataclass(frozen=True)
class TokenCounts:
    """What rows are as tokens.

    Attributes:
        num_tokens: of all rows.
        num_targets: of these, trained on.
        longest_row_tokens: of the longest row.
    """

    num_tokens: float = 0.0
    num_targets: float = 0.0
    longest_row_tokens: int = 0


@dataclass
class RowSample:
    """Some rows of a file, each as likely as another (Vitter's algorithm R), and its longest."""

    num_rows: int = 0
    num_bytes: int = 0
    longest: str = ""
    longest_bytes: int = 0
    rows: list[str] = field(default_factory=list)
    _generator: random.Random = field(default_factory=lambda: random.Random(0))  # noqa: S311  # no secret

    def note(self, line: str) -> None:
        """Takes a row into account."""
        num_bytes = len(line.encode())
        self.num_rows += 1
        self.num_bytes += num_bytes
        if num_bytes > self.longest_bytes:
            self.longest_bytes = num_bytes
            self.longest = line[:_LONGEST_SAMPLED_BYTES]
        if num_bytes > _LONGEST_SAMPLED_BYTES:
            return
        if len(self.rows) < _SAMPLED_ROWS:
            self.rows.append(line)
        elif (place := self._generator.randrange(self.num_rows)) < _SAMPLED_ROWS:
            self.rows[place] = line


def count_tokens(sample: RowSample, base_model_dir: Path) -> TokenCounts:
    """Tells a file's tokens from a sample of its rows.

    Args:
        sample: of rows `{"dialog", "keep_loss"}` or `{"text"}`.
        base_model_dir: transformers folder of the base model.

    Returns:
        Zeros when the folder's tokenizer can't be used here; the trainer will say what is wrong with it.
    """
    if not sample.rows:
        return TokenCounts()
    try:
        counter = _counter(base_model_dir)
        counted = [counter.count(json.loads(row)) for row in sample.rows]
    except Exception as error:  # tokenizers raises no class of its own, and a template may raise any
        log.warning("tokens can't be counted", folder=str(base_model_dir), cause=str(error))
        return TokenCounts()
    tokens, targets = sum(each[0] for each in counted), sum(each[1] for each in counted)
    sampled_bytes = sum(len(row.encode()) for row in sample.rows)
    # By bytes rather than by rows: rows differ in length far more than in tokens a byte.
    scale = sample.num_bytes / sampled_bytes
    longest = max(*(each[0] for each in counted), round(sample.longest_bytes * tokens / sampled_bytes))
    if sample.longest_bytes <= _LONGEST_SAMPLED_BYTES:
        longest = max(*(each[0] for each in counted), counter.count(json.loads(sample.longest))[0])
    return TokenCounts(tokens * scale, targets * scale, longest)


# Not made anew for each file: a tokenizer that has encoded keeps some memory for good.
@lru_cache(maxsize=16)
def _counter(base_model_dir: Path) -> _Counter:
    return _Counter(base_model_dir)


class _Counter:
    """A base model's tokenizer and chat template."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        template_file = folder / "chat_template.jinja"
        self._template: str | None = (
            template_file.read_text(encoding="utf-8")
            if template_file.exists()
            else config.get("chat_template")
        )
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        self._special: dict[str, Any] = {
            name: _token_text(config[name]) for name in names if config.get(name)
        }

    def count(self, row: dict[str, Any]) -> tuple[int, int]:
        """Returns a row's tokens and those that are trained on."""
        if "text" in row:
            num_tokens = self._length(row["text"]) + 1
            return num_tokens, num_tokens - 1
        # Imported here: it takes most of a second, and few jobs after a start need it at once.
        from transformers.utils.chat_template_utils import render_jinja_template

        if self._template is None:
            raise jinja2.TemplateError("the base model has no chat template")
        dialog = row["dialog"]
        rendered: Any = render_jinja_template([dialog], chat_template=self._template, **self._special)
        kept = row.get("keep_loss") or [message["role"] == "assistant" for message in dialog]
        # Each answer's end is trained on too.
        targets = sum(
            self._length(message["content"]) + 1
            for message, is_kept in zip(dialog, kept, strict=True)
            if is_kept
        )
        return self._length(rendered[0][0]), targets

    def _length(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)


def _token_text(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])
