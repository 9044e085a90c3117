"""What the model's thread is given and what it gives back. Imports no torch: the event loop's side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class ModelFiles:
    """A model as it lies on this machine.

    Attributes:
        base_key: names the weights in `base_dir`; equal keys, equal weights.
        base_dir: a transformers folder: a base model, or a whole fine-tuned one.
        context_length: the longest conversation with its answer, in tokens.
        adapter_key: names the adapter; None asks the model in `base_dir` as it is.
        adapter_dir: a peft folder; None where there is no adapter.
    """

    base_key: str
    base_dir: Path
    context_length: int
    adapter_key: str | None = None
    adapter_dir: Path | None = None


@dataclass(frozen=True)
class ScoredToken:
    """A token with the natural logarithm of its probability, before temperature and top_p."""

    utf8: bytes
    logprob: float

    @property
    def text(self) -> str:
        """The token as text; a token that is part of a character shows as U+FFFD."""
        return self.utf8.decode("utf-8", errors="replace")


@dataclass(frozen=True)
class AnswerToken(ScoredToken):
    """A token of an answer, with the likeliest ones at its place, likeliest first."""

    likeliest: tuple[ScoredToken, ...]


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        text: without the tokens that end a turn, and without the stop text and what came after it.
        finish_reason: `stop` when the model ended its turn or a stop text came, `length` otherwise.
        num_prompt_tokens: tokens of the conversation as the chat template writes it.
        num_answer_tokens: tokens that were generated, those left out of `text` included.
        tokens: the text's tokens; None where they weren't asked for.
    """

    text: str
    finish_reason: Literal["stop", "length"]
    num_prompt_tokens: int
    num_answer_tokens: int
    tokens: tuple[AnswerToken, ...] | None
