"""Trains tokenizers on texts: byte-level BPE, and sentencepiece."""

from __future__ import annotations

import io

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from lm2_jax.common.errors import UserError


def train_bpe(texts: list[str], vocab_size: int) -> bytes:
    """Byte-level BPE with <bos> and <eos>, as `tokenizers` JSON."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    control = ["<bos>", "<eos>"]
    smallest = len(alphabet) + len(control)
    if vocab_size < smallest:
        raise UserError(f"--vocab-size {vocab_size} is too small: 256 bytes, <bos> and <eos> make {smallest}")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=control, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str(pretty=True).encode()


def train_sentencepiece(texts: list[str], vocab_size: int) -> bytes:
    """Sentencepiece BPE that leaves the text as it is, as the bytes of a `.model` file."""
    lines = [line for text in texts for line in text.split("\n") if line]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=1 << 30,  # longer lines would be skipped
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).split("] ")[-1].strip() or error  # after the C++ file and condition
        raise UserError(f"--vocab-size {vocab_size}: sentencepiece refuses it: {reason}") from None
    return model.getvalue()
