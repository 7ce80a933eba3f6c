"""Text to token ids and back.

kinds.py           one class for each `tokenizer.kind`; what a prompt is
llama3.py          Llama 3's own file
origin.py          the small files of a pretrained model
special_tokens.py  the control tokens around a text, and who says so
chat.py            chat templates
loading.py         tokenizers by their settings and by their names
"""

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
