"""Text to token ids and back: one class or function for each `tokenizer.kind`."""

# ruff: noqa: F401 (imported here for others)

from __future__ import annotations

from lm2_jax.tokenizer.kinds import BytesTokenizer, StoriesTokenizer, Tokenizer, encode_long, prompt_ids
from lm2_jax.tokenizer.llama3 import byte_letters, convert_llama3
from lm2_jax.tokenizer.loading import (
    check_vocabulary,
    find_tokenizer,
    load_text_tokenizer,
    load_tokenizer,
    with_vocabulary,
)
from lm2_jax.tokenizer.origin import CARD, Origin, origin_beside, origin_in, origin_of_model
from lm2_jax.tokenizer.special_tokens import SpecialTokens, surrounding_ids
