"""Document sources: text, JSON lines, official shards; paths, splits, and every message."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from lm2_jax.common.errors import UserError
from lm2_jax.common.files import expand_paths
from lm2_jax.data.documents import BinSource, JsonLinesSource, TextSource, split_documents
from lm2_jax.tokenizer import BytesTokenizer, SpecialTokens

EXTRAS = Path(__file__).parent / "data" / "golden" / "extras"
BYTES = BytesTokenizer()


def texts(source):
    return [BYTES.decode(document.tokens) for document in source]


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_shard(path, tokens, magic=20240801, version=7, count=None, extra=b""):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    return write(path, header.tobytes() + np.array(tokens, "<u4").tobytes() + extra)


# --- Paths ---------------------------------------------------------------------------------------------------------


def test_paths_are_expanded_once_each_and_sorted(tmp_path):
    b, a, odd = (write(tmp_path / name, "x") for name in ("b.txt", "sub/a.txt", "odd[1].txt"))
    (tmp_path / "folder.txt").mkdir()
    assert expand_paths([tmp_path / "**" / "*.txt", b, str(odd)], "data.path") == sorted([a, b, odd])


def test_path_errors_come_together(tmp_path):
    with pytest.raises(UserError) as error:
        expand_paths([tmp_path / "none.txt", tmp_path / "*.md", tmp_path], "data.validation_path")
    missing, unmatched, directory = str(error.value).split("\n")
    assert missing == f"data.validation_path: {tmp_path}/none.txt does not exist"
    assert unmatched == f"data.validation_path: {tmp_path}/*.md matches no file"
    assert directory.endswith(f"{tmp_path} is a directory; name files in it, for example {tmp_path}/*.txt")
    with pytest.raises(UserError, match=r"data.path: no files given"):
        expand_paths([], "data.path")


# --- Text ----------------------------------------------------------------------------------------------------------


def test_each_file_is_a_document_as_it_stands(tmp_path):
    contents = ["one\r\ntwo \u00e9\n", "\u65e5\u672c"]
    paths = [write(tmp_path / f"{number}.txt", content) for number, content in enumerate(contents)]
    source = TextSource(paths, BYTES)
    assert texts(source) == contents
    tokens, answers = source[1].tokens, source[1].answers
    assert tokens.tolist() == [BYTES.special.bos_id, *contents[1].encode(), BYTES.special.eos_id]
    assert (tokens.dtype, answers.dtype, answers.shape, answers.any()) == (np.int32, bool, tokens.shape, False)
    assert repr(source) == "TextSource(files=2, documents=2)"
    assert texts(pickle.loads(pickle.dumps(source))) == contents


def test_separator_starts_documents(tmp_path):
    chapters = ["CHAPTER 1\n\u00e9t\u00e9 no CHAPTER here\n\n", "CHAPTER 2\n\u65e5\n"]
    path = write(tmp_path / "book.txt", "\ufeff \n" + "".join(chapters))
    assert texts(TextSource([path], BYTES, r"^CHAPTER \d+$")) == chapters
    assert texts(TextSource([path], BYTES, "(?=^CHAPTER)")) == chapters
    assert texts(TextSource([path], BYTES, "^BOOK")) == [" \n" + "".join(chapters)]


def test_tokenizers_without_control_tokens(tmp_path):
    plain = BytesTokenizer(lambda vocabulary: SpecialTokens())
    assert TextSource([write(tmp_path / "a.txt", "ab")], plain)[0].tokens.tolist() == [97, 98]


def test_text_errors(tmp_path):
    write(tmp_path / "bad.txt", b"\xef\xbb\xbfcaf\xe9 au lait")
    write(tmp_path / "book.txt.gz", b"\x1f\x8b")
    with pytest.raises(UserError) as error:
        TextSource([tmp_path / "*"], BYTES)
    assert str(error.value).split("\n") == [
        f"{tmp_path}/bad.txt: not UTF-8 text, byte 6 is 0xe9",
        f"{tmp_path}/book.txt.gz: is compressed; unpack it first, as only plain files are read",
    ]
    with pytest.raises(UserError, match=r"data.validation_path: no documents; all files are empty: .*blank.txt"):
        TextSource([write(tmp_path / "blank.txt", " \n")], BYTES, key="data.validation_path")


# --- JSON lines ----------------------------------------------------------------------------------------------------


def test_json_lines(tmp_path):
    lines = [{"text": "one\n\u00e9"}, {"id": 3, "text": "\U0001f433 whale"}, {"text": " "}, {"text": "last"}]
    body = "\n".join([json.dumps(lines[0]), "", *(json.dumps(line, ensure_ascii=False) for line in lines[1:])])
    source = JsonLinesSource([write(tmp_path / "a.jsonl", "\ufeff" + body)], BYTES)
    assert texts(source) == ["one\n\u00e9", "\U0001f433 whale", "last"]
    assert source[2].tokens[0] == BYTES.special.bos_id and not source[2].answers.any()
    assert repr(source) == "JsonLinesSource(files=1, documents=3)"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{'text': 1}", r"line 2: not JSON \(Expecting property name"),
        (b"[" * 100_000, r"line 2: not JSON \("),
        (b'["text"]', r"line 2: holds list; expected an object"),
        (b'{"body": "x", "id": 1}', r"line 2: has no 'text'; its keys are 'body', 'id'"),
        (b'{"text": null}', r"line 2: 'text' is NoneType; expected a string"),
        (rb'{"text": "\ud83d"}', r"line 2: 'text' holds half a surrogate pair"),
        (b'{"text": "\xff"}', r"a.jsonl: not UTF-8 text, byte 24 is 0xff"),
    ],
)
def test_json_line_errors(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", b'{"text": "x"}\n' + line + b"\n")
    with pytest.raises(UserError, match=message):
        JsonLinesSource([path], BYTES)


def test_json_lines_in_other_clothes(tmp_path):
    with pytest.raises(UserError, match=r"a.jsonl.zst: is compressed; unpack it first"):
        JsonLinesSource([write(tmp_path / "a.jsonl.zst", b"")], BYTES)
    with pytest.raises(UserError, match=r"data.path: no documents"):
        JsonLinesSource([write(tmp_path / "a.jsonl", '\n{"text": ""}\n')], BYTES)


# --- Official shards -----------------------------------------------------------------------------------------------


def test_bin_documents_start_at_begin_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(BinSource, "_CHUNK", 3)
    first = write_shard(tmp_path / "a_000000.bin", [5, 6, 9, 1, 2, 9, 9, 3])
    second = write_shard(tmp_path / "a_000001.bin", [9, 4])
    write_shard(tmp_path / "a_000002.bin", [])
    source = BinSource([tmp_path / "*.bin"], vocab_size=10, bos_id=9)
    assert [document.tokens.tolist() for document in source] == [[5, 6], [9, 1, 2], [9], [9, 3], [9, 4]]
    assert source[0].tokens.dtype == np.int32 and not source[0].answers.any()
    assert repr(source) == "BinSource(files=3, documents=5)"
    assert len(pickle.dumps(source)) < first.stat().st_size + second.stat().st_size


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ({"magic": 20240520, "version": 1}, "magic 20240520, version 1; expected 20240801, 7"),
        ({"version": 6}, "magic 20240801, version 6; expected 20240801, 7"),
        ({"count": 4}, "1036 bytes, but its header promises 4 tokens, that is 1040 bytes; the file is cut short"),
        ({"count": -4}, "promises -4 tokens"),
        ({"extra": b"\0"}, "1037 bytes, .* 3 tokens, that is 1036 bytes; the file is longer than that"),
        ({"tokens": [1, 10, 12]}, "token 2 is id 12, outside of a vocabulary of 10"),
        ({"tokens": [1, 2**32 - 1, 0]}, "token 1 is id 4294967295, outside of a vocabulary of 10"),
        ({"tokens": []}, "data.path: no documents"),
    ],
)
def test_bin_errors(tmp_path, shard, message):
    path = write_shard(tmp_path / "a.bin", **({"tokens": [1, 2, 3]} | shard))
    with pytest.raises(UserError, match=message):
        BinSource([path], vocab_size=10)


def test_bin_shorter_than_its_header(tmp_path):
    with pytest.raises(UserError, match=r"a.bin: ends inside its header"):
        BinSource([write(tmp_path / "a.bin", b"\0" * 1000)], vocab_size=10)


def test_official_sample():
    expected = json.loads((EXTRAS / "sample_llama3.json").read_text())
    documents = list(BinSource([EXTRAS / "sample_llama3.bin"], vocab_size=128_256))
    tokens = np.concatenate([document.tokens for document in documents])
    assert (len(tokens), tokens.sum()) == (expected["n_tokens"], expected["token_sum"])
    assert tokens[:8].tolist() == expected["first_tokens"]
    assert all(document.tokens[0] == 128_000 for document in documents)


# --- Held-out documents --------------------------------------------------------------------------------------------


@pytest.fixture
def numbered(tmp_path):
    """A source of twenty documents, "00" to "19"."""
    path = write(tmp_path / "numbers.txt", "".join(f"{number:02}" for number in range(20)))
    return TextSource([path], BYTES, r"\d\d")


@pytest.mark.parametrize(("fraction", "held_out"), [(0.25, 5), (0.001, 1), (0.95, 19)])
def test_split_is_disjoint_and_complete(numbered, fraction, held_out):
    train, validation = split_documents(numbered, fraction, seed=3)
    assert len(validation) == held_out
    assert sorted(texts(train) + texts(validation)) == texts(numbered)
    assert repr(validation) == f"Subset({held_out} of TextSource(files=1, documents=20))"


def test_split_depends_on_the_seed_alone(numbered):
    held_out = {seed: texts(split_documents(numbered, 0.25, seed)[1]) for seed in (0, 1, 2**40)}
    assert len({tuple(chosen) for chosen in held_out.values()}) == 3
    assert texts(split_documents(numbered, 0.25, 0)[1]) == held_out[0] == ["01", "04", "09", "10", "11"]


def test_nothing_held_out(numbered):
    train, validation = split_documents(numbered, 0, seed=0)
    assert validation is None and texts(train) == texts(numbered)


def test_split_that_leaves_nothing_to_train_on(numbered, tmp_path):
    single = TextSource([write(tmp_path / "one.txt", "x")], BYTES)
    with pytest.raises(UserError, match=r"holds out 1 of 1 documents .* data.document_separator, .*validation_path"):
        split_documents(single, 0.05, seed=0)
    with pytest.raises(UserError, match=r"validation_fraction 1 holds out 20 of 20"):
        split_documents(numbered, 1, seed=0)
