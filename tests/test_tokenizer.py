"""Tokenizers: round trips, Llama-3's merging against a plain one, control tokens, messages, and the training tool."""

import base64
import itertools
import pickle
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from lm2_jax.common.errors import UserError
from lm2_jax.config import TokenizerConfig
from lm2_jax.data.babi.background import BACKGROUND_LEXICON
from lm2_jax.data.babi.world import LEXICON
from lm2_jax.tokenizer import convert_llama3, encode_long, load_tokenizer

ROOT = Path(__file__).parents[1]
KINDS = ("bytes", "sentencepiece", "tokenizers", "llama3")
PROSE = "The white whale swam; the ship's boats weren't near it, 12345 times!\r\n\n   'Twas DON'T day_one.\t\n" * 20
STRESS = (
    "caf\u00e9 cafe\u0301 \u65e5\u672c\u8a9e \u0420\u0443\u0441 \u05e9\u05dc\u05d5\u05dd \u0967\u0968 \u2460\ufb01 "
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \x00\x7f\ufeff \u00a0\u3000 \t\r\n\n  end  "
)
CONTROL_NAMES = "<s></s><unk><bos><eos> <|begin_of_text|><|end_of_text|><|eot_id|><|endoftext|>"


def rank_file(tokens):
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


def byte_tokens():
    return [bytes([byte]) for byte in range(256)]


def pieces_of(text, count, seed):
    """Random substrings of a text, in no sensible order: some of them no merging can reach."""
    rng, data = random.Random(seed), text.encode()
    pieces = set()
    while len(pieces) < count:
        start = rng.randrange(len(data))
        pieces.add(data[start : start + rng.randrange(2, 6)])
    pieces = sorted(piece for piece in pieces if len(piece) > 1)
    rng.shuffle(pieces)
    return pieces


def train_tool(*args):
    command = [sys.executable, "-m", "lm2_jax.train_tokenizer", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tokenizer file of each kind that has one."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "prose.txt").write_bytes(PROSE.encode())
    paths = {"llama3": folder / "ranks.model"}
    paths["llama3"].write_bytes(rank_file(byte_tokens() + pieces_of(PROSE, 300, seed=0)))
    for kind in ("tokenizers", "sentencepiece"):
        paths[kind] = folder / kind
        done = train_tool("--input", folder / "*.txt", "--output", paths[kind], "--vocab-size", 310, "--kind", kind)
        assert done.returncode == 0, done.stderr
        assert re.search(r": 310 tokens, \d\.\d\d bytes per token", done.stdout)
    return paths


@pytest.fixture
def load(files):
    return lambda kind: load_tokenizer(TokenizerConfig(kind=kind, path=str(files[kind]) if kind in files else None))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["", PROSE, STRESS, CONTROL_NAMES], ids=["empty", "prose", "stress", "control"])
def test_round_trip(load, kind, text):
    tokenizer = load(kind)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(type(id) is int and 0 <= id < tokenizer.vocab_size for id in ids)
    assert tokenizer.special.bos_id not in ids and tokenizer.special.eos_id not in ids


@pytest.mark.parametrize("kind", [*KINDS, "stories"])
@pytest.mark.parametrize(
    ("text", "limit"),
    [("", 0), (PROSE, 17_000), (PROSE * 25, 17_000), ((STRESS + PROSE) * 25, 17_000), ("x" * 40_000, 40_000)],
    ids=lambda value: len(value) if isinstance(value, str) else "limit",
)
def test_long_texts_are_encoded_in_pieces(load, kind, text, limit):
    tokenizer, longest = load(kind), 0
    expected = tokenizer.encode(text)

    class Watched:
        def encode(self, piece):
            nonlocal longest
            longest = max(longest, len(piece))
            return tokenizer.encode(piece)

    ids = encode_long(Watched(), text)
    assert ids.dtype == np.int32 and ids.tolist() == expected
    assert longest <= limit


def test_a_tokenizer_that_marks_every_text_gets_it_whole(tmp_path):
    """Llama 2's form: what begins a text is another token than the same word inside it."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE({"<unk>": 0, "▁": 1, "a": 2}, [], unk_token="<unk>"))
    made.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    made.save(str(tmp_path / "marks.json"))
    tokenizer = load_tokenizer(TokenizerConfig(kind="tokenizers", path=str(tmp_path / "marks.json")))
    text = "a " * 40_000
    assert tokenizer.encode("a a") != tokenizer.encode("a") + tokenizer.encode(" a")
    assert encode_long(tokenizer, text).tolist() == tokenizer.encode(text)


@pytest.mark.parametrize("kind", KINDS)
def test_control_tokens_and_unknown_ids_decode_to_nothing(load, kind):
    tokenizer = load(kind)
    ids = [tokenizer.special.bos_id, *tokenizer.encode("whale"), tokenizer.special.eos_id, tokenizer.vocab_size + 7]
    assert tokenizer.decode(ids) == "whale"


@pytest.mark.parametrize("kind", KINDS)
def test_pickle_keeps_everything(load, kind):
    tokenizer = load(kind)
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode(STRESS + CONTROL_NAMES) == tokenizer.encode(STRESS + CONTROL_NAMES)
    assert copy.fingerprint() == tokenizer.fingerprint()
    assert (copy.special.bos_id, copy.special.eos_id, copy.vocab_size) == (
        tokenizer.special.bos_id,
        tokenizer.special.eos_id,
        tokenizer.vocab_size,
    )


def test_fingerprints_differ(load):
    prints = {load(kind).fingerprint() for kind in KINDS}
    assert len(prints) == len(KINDS)
    assert all(re.fullmatch("[0-9a-f]{16}", print) for print in prints)


def test_bytes_that_are_not_utf8_become_replacement_characters(load):
    assert load("bytes").decode([0x61, 0xFF, 0x62]) == "a\ufffdb"
    assert (load("bytes").vocab_size, load("bytes").special.bos_id, load("bytes").special.eos_id) == (258, 256, 257)


def test_stories_need_no_file():
    tokenizer = load_tokenizer(TokenizerConfig(kind="stories"))
    assert tokenizer.decode(tokenizer.encode("Where is the football?")) == "where is the football?"


def test_stories_know_every_word_of_the_generator():
    tokenizer = load_tokenizer(TokenizerConfig(kind="stories"))
    said = {word.lower() for word in (*LEXICON, *BACKGROUND_LEXICON)}
    assert said <= set(tokenizer.words)
    assert tokenizer.vocab_size == 185  # ids that trained models rely on: a change here breaks their checkpoints


# --- Llama-3 -------------------------------------------------------------------------------------------------------

# The same rule as Llama-3's in the terms of `re`, for texts whose digits are all decimal.
WORDS = re.compile(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|(?:[^\r\n\w]|_)?[^\W\d_]+|\d{1,3}| ?(?:[^\s\w]|_)+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def merge_greedily(text, ranks):
    """Byte-pair encoding as tiktoken defines it: a known word is itself, else the lowest-ranked pair is joined."""
    ids = []
    for word in WORDS.findall(text):
        parts = [bytes([byte]) for byte in word.encode()]
        if word.encode() in ranks:
            parts = [word.encode()]
        while pairs := [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]:
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


@pytest.mark.parametrize("seed", range(5))
def test_llama3_merges_as_tiktoken_does(seed):
    tokens = byte_tokens() + pieces_of(PROSE + STRESS, 400, seed)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    tokenizer = convert_llama3(rank_file(tokens))
    text = PROSE + STRESS.replace("\u2460", "") + "whalewhale theswam 1234567  shipship's\n\n\n x"
    assert tokenizer.encode(text, add_special_tokens=False).ids == merge_greedily(text, ranks)


def test_llama3_special_tokens_follow_the_ranks(files, load):
    tokenizer = load("llama3")
    ranks = len(files["llama3"].read_bytes().splitlines())
    assert (tokenizer.special.bos_id, tokenizer.special.eos_id, tokenizer.vocab_size) == (ranks, ranks + 1, ranks + 256)
    converted = convert_llama3(files["llama3"].read_bytes())
    assert converted.token_to_id("<|finetune_right_pad_id|>") == ranks + 4
    assert converted.token_to_id("<|eot_id|>") == ranks + 9
    assert converted.encode("x").ids == [ranks, ord("x")]


# --- Hugging Face files --------------------------------------------------------------------------------------------


def save_and_load(tokenizer, path):
    tokenizer.save(str(path))
    return load_tokenizer(TokenizerConfig(kind="tokenizers", path=str(path)))


def test_unigram_models_do_not_read_control_tokens_in_text(tmp_path):
    words = ["<unk>", "<s>", "</s>", *"a</s>"]
    tokenizer = tokenizers.Tokenizer(models.Unigram([(word, -1.0) for word in dict.fromkeys(words)], unk_id=0))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    loaded = save_and_load(tokenizer, tmp_path / "unigram.json")
    ids = loaded.encode("a<s>a</s>")
    assert loaded.special.bos_id not in ids and loaded.special.eos_id not in ids
    assert loaded.decode(ids).replace(" ", "") == "a<s>a</s>"


def test_settings_of_other_models_and_missing_control_tokens(tmp_path):
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<s>": 9}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=4)
    loaded = save_and_load(tokenizer, tmp_path / "words.json")
    assert loaded.encode("a a a") == [0, 0, 0]
    assert (loaded.special.bos_id, loaded.special.eos_id) == (None, None)  # <s> is a word here, not a control token
    assert loaded.vocab_size == 10


def test_one_end_of_text_token_serves_both_ways(tmp_path):
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    loaded = save_and_load(tokenizer, tmp_path / "gpt2.json")
    assert loaded.special.bos_id == loaded.special.eos_id == 1


# --- Messages ------------------------------------------------------------------------------------------------------

GOOD = rank_file(byte_tokens())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (GOOD + b"version https://git-lfs\n", r"line 257, 'version https://git-lfs', is not 'base64 rank'"),
        (GOOD + b"a*Fh 256\n", r"line 257, 'a\*Fh 256', is not 'base64 rank'"),
        (GOOD + b"YWI= 2x6\n", r"line 257, .* is not 'base64 rank'"),
        (GOOD + b"YWI= 258\n", r"line 257, .* has rank 258; expected 256"),
        (GOOD + b"YQ== 256\n", r"line 257, .* repeats the token of rank 97"),
        (rank_file(byte_tokens()[:250]), "6 of the 256 single bytes have no rank, the first is 0xfa"),
        (b"", "256 of the 256 single bytes"),
    ],
)
def test_llama3_errors(tmp_path, data, message):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message):
        load_tokenizer(TokenizerConfig(kind="llama3", path=str(path)))


@pytest.mark.parametrize(("wrong", "right"), [*itertools.permutations(("sentencepiece", "tokenizers", "llama3"), 2)])
def test_file_of_another_kind(files, wrong, right):
    with pytest.raises(UserError, match=f"is not a {wrong} model: .*; it looks like tokenizer.kind {right}"):
        load_tokenizer(TokenizerConfig(kind=wrong, path=str(files[right])))


@pytest.mark.parametrize("kind", ["sentencepiece", "tokenizers", "llama3"])
def test_missing_and_empty_files(tmp_path, kind):
    path = tmp_path / "file"
    with pytest.raises(UserError, match=r"tokenizer.path: .*file cannot be read \(No such file"):
        load_tokenizer(TokenizerConfig(kind=kind, path=str(path)))
    path.touch()
    with pytest.raises(UserError, match=f"is not a {kind} model"):
        load_tokenizer(TokenizerConfig(kind=kind, path=str(path)))


# --- The tool ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tokenizers", "sentencepiece"])
def test_training_is_deterministic(files, tmp_path, kind):
    again = tmp_path / "new" / "again"
    source = files[kind].parent / "prose.txt"
    assert train_tool("--input", source, "--output", again, "--vocab-size", 310, "--kind", kind).returncode == 0
    assert again.read_bytes() == files[kind].read_bytes()


def test_tool_errors(tmp_path):
    text, latin = tmp_path / "tiny.txt", tmp_path / "latin.txt"
    text.write_text("tiny text\n")
    latin.write_bytes(b"caf\xe9")
    out = tmp_path / "out"
    for args, message in (
        (("--input", tmp_path / "none*", "--vocab-size", 300), "--input: .*none\\* matches no file"),
        (("--input", latin, "--vocab-size", 300), "latin.txt is not UTF-8 text, see byte 3"),
        (("--input", text, "--vocab-size", 100), "--vocab-size 100 is too small"),
        (("--input", text, "--vocab-size", 5000, "--kind", "sentencepiece"), "Vocabulary size too high"),
        (("--input", text), "required: --vocab-size"),
    ):
        done = train_tool(*args, "--output", out)
        assert done.returncode == 2 and re.search(message, done.stderr), done.stderr
        assert not out.exists()
    done = train_tool("--input", text, "--vocab-size", 5000, "--output", out)
    assert done.returncode == 0 and "no more to merge" in done.stdout
