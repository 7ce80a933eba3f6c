"""A sentencepiece model as a `tokenizers` object, which needs neither sentencepiece nor protobuf to be loaded.

Format: protobuf, sentencepiece_model.proto of github.com/google/sentencepiece. A model's algorithm, its scores and its
normalisation become the same algorithm in `tokenizers`; whether they give the same ids is tried on texts of the model.
One difference stays: over tens of thousands of characters, sentencepiece's Unigram adds scores in float32 and may cut a
word otherwise than it cuts it alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

_UNIGRAM, _BPE = 1, 2  # TrainerSpec.model_type
_TRAINER, _NORMALIZER = 2, 3  # fields of ModelProto
_MODEL_TYPE = 3  # of TrainerSpec
_CHARSMAP, _DUMMY_PREFIX, _REMOVE_SPACES, _ESCAPE = 2, 3, 4, 5  # of NormalizerSpec
_STRESS = "  caf\u00e9 \u65e5\u672c \u0420\u0443\u0441 \ufb01 \u2460  it's 12345 times!\n\n\tend \U0001f469 "
_TRIED = 2000  # tokens


def convert_sentencepiece(model: bytes) -> Tokenizer | None:
    """The model as a `tokenizers` object that adds no tokens around a text; None if it would give other ids."""
    processor = SentencePieceProcessor(model_proto=model)
    fields = dict(_fields(model))
    trainer, normalizer = (dict(_fields(fields.get(field, b""))) for field in (_TRAINER, _NORMALIZER))
    kind = trainer.get(_MODEL_TYPE, _UNIGRAM)
    if kind not in (_UNIGRAM, _BPE) or not normalizer.get(_ESCAPE, 1):
        return None
    tokenizer = Tokenizer(_unigram(processor) if kind == _UNIGRAM else _bpe(processor))
    tokenizer.normalizer = _normalizer(normalizer)
    strip = [decoders.Strip(" ", 1, 0)] if normalizer.get(_DUMMY_PREFIX, 1) else []
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(steps)
    control = [processor.id_to_piece(id) for id in range(len(processor)) if _is_control(processor, id)]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in control])
    return tokenizer if _agree(tokenizer, processor) else None


def merges_of(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, those of the highest score first, as Hugging Face orders them."""
    pairs = [
        (score, cut, token)
        for token, score in scores.items()
        for cut in range(1, len(token))
        if token[:cut] in scores and token[cut:] in scores
    ]
    return [(token[:cut], token[cut:]) for _, cut, token in sorted(pairs, reverse=True)]


def _bpe(processor: SentencePieceProcessor) -> models.BPE:
    ids = {processor.id_to_piece(id): id for id in range(len(processor))}
    scores = {name: processor.get_score(id) for name, id in ids.items() if _is_normal(processor, id)}
    unknown = processor.id_to_piece(processor.unk_id())
    bytes_too = any(processor.is_byte(id) for id in ids.values())
    return models.BPE(ids, merges_of(scores), unk_token=unknown, fuse_unk=True, byte_fallback=bytes_too)


def _unigram(processor: SentencePieceProcessor) -> models.Unigram:
    pieces = [(processor.id_to_piece(id), processor.get_score(id)) for id in range(len(processor))]
    bytes_too = any(processor.is_byte(id) for id in range(len(processor)))
    return models.Unigram(pieces, processor.unk_id(), bytes_too)


def _is_control(processor: SentencePieceProcessor, id: int) -> bool:
    return processor.is_control(id) or processor.is_unknown(id)


def _is_normal(processor: SentencePieceProcessor, id: int) -> bool:
    return not (_is_control(processor, id) or processor.is_unused(id) or processor.is_byte(id))


def _normalizer(spec: Mapping[int, Any]) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if charsmap := spec.get(_CHARSMAP):
        steps.append(normalizers.Precompiled(charsmap))
    if spec.get(_REMOVE_SPACES, 1):
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.get(_DUMMY_PREFIX, 1):
        steps.append(normalizers.Prepend("\u2581"))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])


def _agree(tokenizer: Tokenizer, processor: SentencePieceProcessor) -> bool:
    """True if both give the same ids for texts made of the model's own tokens, and for one of all sorts."""
    ids = [id for id in range(len(processor)) if _is_normal(processor, id)]
    drawn = np.random.RandomState(0).choice(ids, _TRIED).tolist()  # RandomState: its streams never change
    texts: Sequence[str] = [_STRESS, *(processor.decode(drawn[i : i + 100]) for i in range(0, _TRIED, 100))]
    return all(tokenizer.encode(text, add_special_tokens=False).ids == processor.encode(text) for text in texts)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yields numbers and values of a protobuf message's fields: integers, or the bytes of anything else."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                return value

    while at < len(message):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(wire) or varint()
        yield number, message[at : at + size]
        at += size
