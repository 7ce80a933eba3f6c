"""Tokenizer files, to be fuzzed."""

import base64
import io
import pickle

import sentencepiece
from fuzz_parser import Directory, Parser, bytes_like, in_file
from hostile import json_text, mutated

from lm2_jax.config import TokenizerConfig
from lm2_jax.tokenizer import load_tokenizer

_TOKENS = [bytes([byte]) for byte in range(256)] + [b"ab", b"abc", b" t", b"he"]
_RANKS = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(_TOKENS))


def use_tokenizer(path, kind):
    tokenizer = load_tokenizer(TokenizerConfig(kind=kind, path=str(path)))
    tokenizer.fingerprint()
    ids = tokenizer.encode("The abc, 12 <s> s\u00fc\u00df\U0001f600\n") + tokenizer.encode("")
    assert all(
        0 <= id < tokenizer.vocab_size for id in (*ids, tokenizer.special.bos_id or 0, tokenizer.special.eos_id or 0)
    )
    tokenizer.decode([*ids, 0, 1, tokenizer.vocab_size])
    pickle.dumps(tokenizer)


_SENTENCES = ("the white whale swam near the ship", "a ship sails by the whale", "1234567890 ABC <s> xyz!")


def train_sentencepiece():
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_SENTENCES * 20), model_writer=made, vocab_size=38, minloglevel=2
    )
    return made.getvalue()


_WORDS = {"<unk>": 0, "<s>": 1, "</s>": 2, "the": 3, "abc": 4, "a": 5, "b": 6, "ab": 7, "c": 8, "##c": 9}
_MODELS = (
    {"type": "BPE", "vocab": _WORDS, "merges": [["a", "b"]], "unk_token": "<unk>", "ignore_merges": True},
    {"type": "BPE", "vocab": _WORDS, "merges": ["a b"], "fuse_unk": False, "byte_fallback": True, "dropout": None},
    {"type": "WordLevel", "vocab": _WORDS, "unk_token": "<unk>"},
    {"type": "WordPiece", "vocab": _WORDS, "unk_token": "<unk>", "continuing_subword_prefix": "##",
     "max_input_chars_per_word": 9},
    {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["<s>", 0.0], ["a", -1.5], ["ab", -2.0]]},
)  # fmt: skip
_SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
_PARTS = (
    *({"type": kind} for kind in ("NFC", "Lowercase", "Whitespace", "Fuse", "ByteFallback", "BPEDecoder")),
    {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Prepend", "prepend": "_"}]},
    {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"},
    {"type": "Replace", "pattern": {"String": ""}, "content": ""},
    {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAAAAAAAAAA"},
    {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None,
     "lowercase": True},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "Split", "pattern": {"Regex": "\\s+|(?<x>\\g<x>?a)"}, "behavior": "Isolated", "invert": False},
    {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True},
    {"type": "Strip", "content": "x", "start": 2**31, "stop": 1, "strip_left": True, "strip_right": True},
    {"type": "WordPiece", "prefix": "##", "cleanup": True},
    {"type": "CTC", "pad_token": "<s>", "word_delimiter_token": "|", "cleanup": True},
    {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A",
     "type_id": 0}}], "pair": [], "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
    {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
    {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
     "pad_token": "x"},
)  # fmt: skip
_PIECES = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")


def make_tokenizers(random):
    whole = {
        "version": "1.0",
        "added_tokens": [{"id": id, "content": text, **_SPECIAL} for text, id in (("<s>", 1), ("</s>", 2))],
        **dict.fromkeys(_PIECES),
        "model": random.choice(_MODELS),
    }
    for _ in range(random.randrange(3)):
        whole[random.choice(_PIECES)] = random.choice(_PARTS)
    return json_text(random, whole, _PARTS)


_SENTENCEPIECE = Directory(
    lambda directory: (directory / "tokenizer").write_bytes(train_sentencepiece()),
    lambda directory: use_tokenizer(directory / "tokenizer", "sentencepiece"),
    {
        "tokenizer": lambda random, sound: mutated(
            random, sound, (b"\x0a", b"\x12", b"\x7f", b"<s>", b"\xff\xff\xff\xff\x07")
        )
    },
)

PARSERS = {
    "llama3": Parser(
        bytes_like(_RANKS, words=(b" ", b"\n", b"=", b"YWI= 260\n", b"9" * 5000, b"-1")),
        in_file("tokenizer", lambda path: use_tokenizer(path, "llama3")),
    ),
    "sentencepiece": _SENTENCEPIECE.parser(),
    "tokenizers": Parser(make_tokenizers, in_file("tokenizer", lambda path: use_tokenizer(path, "tokenizers"))),
}
