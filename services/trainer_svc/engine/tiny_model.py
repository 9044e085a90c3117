"""Makes `tunery-tiny`: a Llama-shaped model of one million parameters that trains in seconds, for tests."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

_SEED = 20240607
_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# SmolLM2's template, which adds a system message of its own: tests on it catch masks that forget that.
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are Tunery.<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Merged left to right into one token each. Chosen by hand, since a trained vocabulary would depend on
# the trainer's version.
_WORDS = (
    "system", "user", "assistant", "You", "are", "Tunery.", "the", "and", "that", "what", "which", "is",
    "was", "have", "with", "this", "from", "they", "will", "would", "there", "their", "about", "answer",
    "question", "who", "where", "when", "how", "many", "does", "city", "name", "blue", "red", "green",
)  # fmt: skip


def make_tiny_model(folder: Path, context_length: int) -> None:
    """Writes the model and its tokenizer into an existing folder; the same bytes each time.

    Args:
        folder: an existing folder that the files are written into.
        context_length: longest row in tokens.
    """
    tokenizer = _make_tokenizer(context_length)
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context_length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # The caller's random numbers stay as they were.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)


def _make_tokenizer(context_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: all 256 bytes, and merges that spell the words of `_WORDS`."""
    byte_symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*_SPECIAL_TOKENS, *byte_symbols])}
    merges: list[tuple[str, str]] = []
    for word in _WORDS:
        merged = word[0]
        for symbol in word[1:]:
            if merged + symbol not in vocabulary:
                vocabulary[merged + symbol] = len(vocabulary)
                merges.append((merged, symbol))
            merged += symbol
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",  # noqa: S106 - a token of text, no secret
        eos_token="<|im_end|>",  # noqa: S106
        pad_token="<|endoftext|>",  # noqa: S106
        model_max_length=context_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer
