"""A token's bytes, in both kinds of vocabulary."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from inference_svc.token_bytes import token_bytes

TEXT = "What is blue? Ünï 🔵\n"


def test_byte_level_vocabulary(models_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models_dir / "tunery-tiny")
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    assert b"".join(token_bytes(tokenizer, token_id) for token_id in ids) == TEXT.encode()
    assert token_bytes(tokenizer, tokenizer.eos_token_id) == b"<|im_end|>"
    assert token_bytes(tokenizer, len(tokenizer)) == b""


def test_sentencepiece_vocabulary() -> None:
    vocabulary = {"\u2581hi": 0, "<0xF0>": 1, "<0x9F>": 2, "there": 3}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert [token_bytes(tokenizer, token_id) for token_id in range(4)] == [b" hi", b"\xf0", b"\x9f", b"there"]
