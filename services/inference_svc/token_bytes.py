"""A token's bytes. Decoding a single token loses them where it is a part of a character."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

# Byte-level vocabularies write each byte as a printable character (Radford et al. 2019, GPT-2).
_BYTE_OF_CHAR = {char: byte for byte, char in bytes_to_unicode().items()}
# SentencePiece's vocabularies have tokens for single bytes, and write a space as U+2581.
_SINGLE_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"


def token_bytes(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bytes:
    """Returns the bytes that a token stands for, in UTF-8; those of an answer's tokens make its text.

    Empty for an id past the vocabulary's end, which a model whose embedding is padded can come up with.
    """
    token = tokenizer.convert_ids_to_tokens(token_id)
    if token is None:
        return b""
    assert isinstance(token, str)
    if token_id in tokenizer.added_tokens_decoder:
        return token.encode()
    if b'"ByteLevel"' in tokenizer.backend_tokenizer.decoder.__getstate__():
        return bytes(_BYTE_OF_CHAR[char] for char in token)
    if match := _SINGLE_BYTE.fullmatch(token):
        return bytes.fromhex(match[1])
    return token.replace(_SPACE, " ").encode()
