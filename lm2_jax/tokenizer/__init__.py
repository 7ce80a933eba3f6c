"""Text to token ids and back: one class or function for each `tokenizer.kind`."""

from __future__ import annotations

from lm2_jax.tokenizer.base import Tokenizer, encode_long
from lm2_jax.tokenizer.files import BytesTokenizer
from lm2_jax.tokenizer.llama3 import byte_letters, convert_llama3
from lm2_jax.tokenizer.loading import (
    check_vocabulary,
    find_tokenizer,
    load_text_tokenizer,
    load_tokenizer,
    with_vocabulary,
)
from lm2_jax.tokenizer.stories import StoriesTokenizer

__all__ = [
    "BytesTokenizer",
    "StoriesTokenizer",
    "Tokenizer",
    "byte_letters",
    "check_vocabulary",
    "convert_llama3",
    "encode_long",
    "find_tokenizer",
    "load_text_tokenizer",
    "load_tokenizer",
    "with_vocabulary",
]
