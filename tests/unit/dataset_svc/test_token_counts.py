"""Counting tokens from a sample, without torch, comes near to what the engine counts exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
from tokenizers import Tokenizer

from dataset_svc import token_counts
from dataset_svc.token_counts import RowSample, TokenCounts, count_tokens
from svc_kit.catalog import load_catalog
from trainer_svc.base_models import pull

ROWS = Path(__file__).parents[2] / "e2e" / "gsm8k" / "rows.jsonl"


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pull(load_catalog().get("tunery-tiny"), tmp_path_factory.mktemp("models"))


def sample_of(lines: list[str]) -> RowSample:
    sample = RowSample()
    for line in lines:
        sample.note(line)
    return sample


def test_counts_are_near_the_engines(tiny_dir: Path, tmp_path: Path) -> None:
    import torch

    from trainer_svc.engine.base_model import load_base_model
    from trainer_svc.engine.examples import load_examples

    lines = ROWS.read_text(encoding="utf-8").splitlines(keepends=True)
    counts = count_tokens(sample_of(lines), tiny_dir)
    tokenizer = load_base_model(tiny_dir, torch.float32, torch.device("cpu")).tokenizer
    exact = load_examples(ROWS, tokenizer, 10**6, "truncate")
    assert counts.num_tokens == pytest.approx(exact.num_tokens, rel=0.02)
    assert counts.num_targets == pytest.approx(exact.num_targets, rel=0.05)
    longest = max(example.num_tokens for example in exact.examples)
    assert counts.longest_row_tokens == pytest.approx(longest, rel=0.1)


def test_a_sample_stands_for_many_rows(tiny_dir: Path) -> None:
    lines = [json.dumps({"text": "word " * (1 + n % 50)}) + "\n" for n in range(5000)]
    sample = sample_of(lines)
    assert sample.num_rows == 5000
    assert len(sample.rows) == 256
    few, every = count_tokens(sample, tiny_dir), count_tokens(sample_of(lines[:250]), tiny_dir)
    assert few.num_tokens == pytest.approx(20 * every.num_tokens, rel=0.05)
    assert few.longest_row_tokens == every.longest_row_tokens


def test_a_row_that_is_too_long_to_keep_is_told_by_its_size(tiny_dir: Path) -> None:
    short = json.dumps({"text": "word " * 100}) + "\n"
    long = json.dumps({"text": "word " * 100_000}) + "\n"
    counts = count_tokens(sample_of([short, long]), tiny_dir)
    assert counts.longest_row_tokens > 90_000
    assert counts.num_tokens > 90_000


def test_kept_messages_are_the_targets(tiny_dir: Path) -> None:
    dialog = [{"role": "user", "content": "A b c d e."}, {"role": "assistant", "content": "F g."}]
    both = json.dumps({"dialog": dialog, "keep_loss": [True, True]})
    answer = json.dumps({"dialog": dialog})
    none = json.dumps({"dialog": dialog, "keep_loss": [False, False]})
    targets = [count_tokens(sample_of([row]), tiny_dir).num_targets for row in (both, answer, none)]
    assert targets[0] > targets[1] > targets[2] == 0


def test_a_models_tokenizer_is_made_once(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that has encoded leaves some 35 kB of memory behind for good."""
    folder = shutil.copytree(tiny_dir, tmp_path / "model")
    made: list[str] = []

    def from_file(path: str) -> Tokenizer:
        made.append(path)
        return Tokenizer.from_file(path)

    monkeypatch.setattr(token_counts, "Tokenizer", Mock(from_file=from_file))
    for _ in range(3):
        assert count_tokens(sample_of([json.dumps({"text": "x y z"})]), folder).num_tokens
    assert len(made) == 1


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_folder_without_a_tokenizer_counts_nothing(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    assert count_tokens(sample_of([json.dumps({"text": "x"})]), tmp_path) == TokenCounts()
