"""Every parser of lm2_jax that reads what others may have written, with the inputs to fuzz it by.

A Parser's `prepare` runs in the process that fuzzes it, and only there jax begins to work.
"""

import base64
import dataclasses
import functools
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece
import yaml
from hostile import altered, json_text, mutated

from lm2_jax import decoding
from lm2_jax.config import TokenizerConfig, load_config, parse_config
from lm2_jax.convert import directory as converted
from lm2_jax.convert import engine, huggingface, official
from lm2_jax.convert.tensors import open_tensors, write_tensors
from lm2_jax.data.babi import question_samples, read_babi
from lm2_jax.data.babilong import read_samples
from lm2_jax.data.documents import BinSource, JsonLinesSource, TextSource
from lm2_jax.evals.finished import Finished
from lm2_jax.evals.mmlu import read_questions
from lm2_jax.memory_file import load_state, save_state
from lm2_jax.model import build_model
from lm2_jax.tokenizer import BytesTokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class Parser:
    """Something that reads what a stranger wrote.

    Attributes:
      make: an input.
      read: reads one, with a directory for its files.
      prepare: makes what all inputs share in that directory.
    """

    make: Callable[[Random], Any]
    read: Callable[[Path, Any], None]
    prepare: Callable[[Path], None] = lambda directory: None


def bytes_like(*seeds, words=()):
    return lambda random: mutated(random, random.choice(seeds), words)


def in_file(name, read):
    """A parser's `read` for inputs that are the bytes of one file."""

    def write_and_read(directory, data):
        path = directory / name
        path.write_bytes(data)
        read(path)

    return write_and_read


# --- Configs --------------------------------------------------------------------------------------------------------

_CONFIGS = (
    b"model: {d_model: 64, num_layers: 2, rope_scaling: {factor: 8.0}}\nmemory: {kind: lm2, num_slots: 4}\n",
    b"data:\n  source: text\n  path: ['a/*.txt', b.txt]\n  document_separator: '^#'\ntokenizer: {kind: bytes}\n",
    b"train:\n  steps: 7\n  curriculum:\n  - {segments: 1, segment_length: 16, steps: 3}\n"
    b"  - {segments: 2, segment_length: 16}\noptim: {warmup_steps: 2}\n",
    b"eval: &e {lengths: [1, 2]}\ncheckpoint: {<<: {keep: 2}}\nmesh: {data: 1, fsdp: -1}\n",
    b"eval: {babilong: {tasks: [qa1], lengths: [0k, 1k]}, mmlu: {subjects: astronomy}}\n",
    b"a: &a [x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a]\n"
    b"c: &c [*b, *b, *b, *b, *b, *b, *b, *b]\nd: &d [*c, *c, *c, *c, *c, *c, *c, *c]\n"
    b"e: &e [*d, *d, *d, *d, *d, *d, *d, *d]\nf: &f [*e, *e, *e, *e, *e, *e, *e, *e]\n"
    b"g: &g [*f, *f, *f, *f, *f, *f, *f, *f]\nmodel: [*g, *g, *g, *g, *g, *g, *g, *g]\n",
    b"a: &a {x: 1, y: 2}\nb: &b {<<: [*a, *a, *a, *a, *a, *a, *a, *a]}\nc: &c {<<: [*b, *b, *b, *b, *b, *b, *b, *b]}\n"
    b"d: &d {<<: [*c, *c, *c, *c, *c, *c, *c, *c]}\ne: &e {<<: [*d, *d, *d, *d, *d, *d, *d, *d]}\n"
    b"f: &f {<<: [*e, *e, *e, *e, *e, *e, *e, *e]}\nmodel: {<<: [*f, *f, *f, *f, *f, *f, *f, *f]}\n",
)
_YAML = (
    *(b"&a ", b"*a", b"<<: ", b"!!int ", b"!!float ", b"!!bool ", b"!!binary ", b"!!timestamp ", b"!!set ", b"!!omap "),
    *(b"!!pairs ", b"!!str ", b"!!null ", b"!!map ", b"!!seq ", b"!!merge ", b"!!python/object/apply:os.system "),
    *(
        b"? ",
        b"- ",
        b": ",
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b"\n",
        b"  ",
        b"'",
        b'"',
        b"#",
        b"|\n",
        b">\n",
        b"---\n",
        b"%YAML ",
    ),
    *(
        b"1:1:1",
        b".inf",
        b".nan",
        b"1e999",
        b"0x" + b"f" * 5000,
        b"9" * 5000,
        b"0o7",
        b"0b1",
        b"1_0",
        b"_",
        b"\x00",
        b"\xc3",
    ),
    *(
        b"yes",
        b"2025-01-01",
        b"=",
        b"~",
        b"null",
        b"[" * 300,
        b"{a: " * 100,
        b"- " * 300,
        b"(a{9999}){9999}",
        b"(?P<",
        b"\\",
    ),
)
_VALUES = (b"1", b"[1, 2]", b"{steps: 2}", b"text", b"null", b"{data: {path: x}}")
_KEYS = (
    "model.d_model",
    "model",
    "data.path",
    "train.curriculum",
    "train.curriculum.0.steps",
    "eval",
    "x",
    "data.x.y",
    "",
)


def make_config(random):
    if random.randrange(3):
        data = mutated(random, random.choice(_CONFIGS), _YAML)
    else:
        data = json_text(random, random.choice(_SECTIONS))
    overrides = []
    if random.randrange(3) == 0:
        value = mutated(random, random.choice(_VALUES), _YAML).decode(errors="surrogateescape")
        overrides.append(random.choice(_KEYS) + random.choice(("=", "=", "=", "==", "")) + value)
    return data, overrides


def read_config(directory, value):
    data, overrides = value
    (directory / "config.yaml").write_bytes(data)
    load_config(directory / "config.yaml", overrides)


_SECTIONS = (
    {"model": {"d_model": 64, "rope_scaling": {"factor": 2.0}}, "memory": {"kind": "rmt"}, "mesh": {"data": 1}},
    {
        "data": {"source": "jsonl", "path": ["a"], "stories": {"facts": [1, 2]}},
        "tokenizer": {"kind": "llama3", "path": "t"},
    },
    {"train": {"curriculum": [{"segments": 1, "segment_length": 16, "steps": 3}], "seed": 3}, "eval": {"lengths": [1]}},
)

# --- Data -----------------------------------------------------------------------------------------------------------


def shard(tokens, count=None, magic=20240801, version=7):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    return header.tobytes() + np.array(tokens, "<u4").tobytes()


def make_shard(random):
    ids = (*range(9), 4, 4, 2**31, 2**32 - 1)
    tokens = [random.choice(ids) for _ in range(random.randrange(12))]
    counts = (None, None, None, 0, 3, -1, len(tokens) + 1, 2**31 - 1, -(2**31))
    return mutated(random, shard(tokens, random.choice(counts)))


def read_all(source):
    len(source), source.lengths
    for index in range(min(len(source), 8)):
        source[index]


_LINES = ({"text": "A text.", "id": 3}, {"text": "S\u00fc\u00df\u2028 \U0001f600\n"})
_RECORDS = ({"task": "qa1", "index": 0, "correct": True}, {"evaluation": "x"})


def lines_of(seeds, before=b""):
    def make(random):
        lines = [json_text(random, random.choice(seeds)) for _ in range(random.randrange(4))]
        return before + random.choice((b"\n", b"\n", b"\r\n", b"")).join([*lines, b""])

    return make


_BABI = (
    b"1 Mary moved to the bathroom.\n2 John went to the hallway.\n3 Where is Mary?\tbathroom\t1\n1 A b.\n2 Who?|b|1\n",
    b"1 Mary got the milk there.\n\n2 Is Mary here?\tno\t1\n3 What is Mary carrying?\tmilk,football\t1 2\n",
)
_BABI_WORDS = (b"1 ", b"2 ", b"01 ", "\u0661 ".encode(), b"9" * 5000 + b" ", b"\t", b"|", b"?", b"\n", b"\r", b"\x85")
_MMLU = (
    b'question,choice0,choice1,choice2,choice3,answer\nWhat?,a,b,c,d,2\n"A, ""b""\nc",1,2,3,4,0\n',
    b"answer,question,choice0,choice1,choice2,choice3,more\r\n3,What?,a,b,c,d,x\r\n",
)
_SAMPLE = {"input": "Mary went.", "question": "Where?", "target": "here"}

# --- Tokenizers -----------------------------------------------------------------------------------------------------

_TOKENS = [bytes([byte]) for byte in range(256)] + [b"ab", b"abc", b" t", b"he"]
_RANKS = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(_TOKENS))


def use_tokenizer(path, kind):
    tokenizer = load_tokenizer(TokenizerConfig(kind=kind, path=str(path)))
    tokenizer.fingerprint()
    ids = tokenizer.encode("The abc, 12 <s> s\u00fc\u00df\U0001f600\n") + tokenizer.encode("")
    assert all(0 <= id < tokenizer.vocab_size for id in (*ids, tokenizer.bos_id or 0, tokenizer.eos_id or 0))
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


# --- Models ---------------------------------------------------------------------------------------------------------


def safetensors_bytes(header, data):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


_HEADER = {
    "__metadata__": {"format": "pt"},
    "x": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "y": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}
_HEADERS = (
    "F64",
    "I64",
    "BOOL",
    "F8_E4M3",
    "F8_E8M0",
    "F4",
    "C64",
    [2**40, 2**40],
    [0, 2**62],
    [0, 24],
    [24, 32],
    [2**63, 0],
)


def make_safetensors(random):
    data = safetensors_bytes(altered(random, _HEADER, _HEADERS), bytes(range(32)))
    return data if random.randrange(2) else mutated(random, data, (b'"x"', b"[", b"}", b"[" * 2000))


def read_tensors(path):
    for tensor in open_tensors(path, "model").values():
        tensor.size, tensor.is_float, tensor.read()


class Directory:
    """Inputs that are one changed file of a sound directory.

    write: makes the directory. read: reads it. changes: file name -> makes its bytes of random choices and sound ones.
    """

    def __init__(self, write, read, changes):
        self._write, self._read, self._changes = write, read, changes

    def prepare(self, directory):
        self._write(directory)
        self._sound = {name: (directory / name).read_bytes() for name in self._changes}
        self._read(directory)

    def make(self, random):
        name = random.choice(list(self._sound))
        return name, self._changes[name](random, self._sound[name])

    def read(self, directory, value):
        name, data = value
        (directory / name).write_bytes(data)
        try:
            self._read(directory)
        finally:
            (directory / name).write_bytes(self._sound[name])

    def parser(self):
        return Parser(self.make, self.read, self.prepare)


def json_of(*others):
    return lambda random, sound: json_text(random, json.loads(sound), others)


_sections = functools.cache(yaml.safe_load)


def yaml_of(random, sound):
    values = _sections(sound)
    short = {key: values[key] for key in ("model", "memory", "tokenizer")}  # PyYAML is slow
    text = json_text(
        random, short, ("lm2", "none", "official", "tokenizer.json", "../tokenizer.json", "memory.safetensors")
    )
    return text if random.randrange(4) else mutated(random, text, _YAML)


def tensors_of(random, sound):
    size = int.from_bytes(sound[:8], "little") + 8
    header, data = json.loads(sound[8:size]), sound[size:]
    changed = safetensors_bytes(altered(random, header, _HEADERS), data)
    return changed if random.randrange(2) else mutated(random, changed)


def write_shards(directory):
    arrays = {name: np.arange(6, dtype=np.float32) for name in ("x", "y", "z")}
    write_tensors(directory, "model", arrays.items(), shard_bytes=30)


_NAMES = ("../x", "/etc/passwd", "..", "", "x/", "model-00001-of-00003.safetensors", "model.safetensors.index.json")


def tiny(kind):
    sizes = {"vocab_size": 258, "d_model": 8, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "d_ff": 8}
    values = {
        "model": sizes,
        "memory": {"kind": kind, "num_slots": 8, "num_heads": 2},
        "data": {"segment_length": 8, "source": "text", "path": "x"},
        "tokenizer": {"kind": "bytes"},
    }
    config = parse_config(json.dumps(values))
    model = build_model(config)

    def init(key):
        return model.init(key, jnp.zeros((1, 8), jnp.int32), model.init_memory(1))["params"]

    return config, model, jax.jit(init)(jax.random.key(0))


def in_order(items, title):
    return items


def write_directory(kind, write):
    def make(directory):
        known = {}

        def remembered(config):  # tracing would take all the time
            key = config.model, config.memory, config.data.segment_length
            if key not in known:
                known[key] = engine.abstract_params(config)
            return known[key]

        for module in (converted, huggingface, official):
            module.abstract_params = remembered
        config, _, params = tiny(kind)
        write(engine.Checkpoint(config, engine.from_arrays(params, directory)), directory)

    return make


class Memory(Directory):
    """A memory file and the model that it is of."""

    def __init__(self):
        super().__init__(self._save, self._load, {"memory": self._change})

    def _save(self, directory):
        _, self._model, self._params = tiny("lm2")
        state = decoding.start(self._model, self._params, 2)
        _, state = decoding.read(self._model, self._params, [[1, 2, 3], [4]], state)
        save_state(directory / "memory", self._model, self._params, state)

    def _load(self, directory):
        load_state(directory / "memory", self._model, self._params)

    def _change(self, random, sound):
        if random.randrange(2):
            return tensors_of(random, sound)
        size = int.from_bytes(sound[:8], "little") + 8
        header = json.loads(sound[8:size])
        owner = json_text(random, json.loads(header["__metadata__"]["lm2_jax.memory"]))
        header["__metadata__"]["lm2_jax.memory"] = owner.decode(errors="replace")
        return safetensors_bytes(header, sound[size:])


class Torch:
    """PyTorch files."""

    def prepare(self, directory):
        import torch

        made = io.BytesIO()
        torch.save({"model_state_dict": {"x": torch.ones(2, 3), "y": torch.ones(1, dtype=torch.bfloat16)}}, made)
        self._sound = made.getvalue()
        (directory / "x.pth").write_bytes(self._sound)
        read_tensors(directory / "x.pth")

    def make(self, random):
        with zipfile.ZipFile(io.BytesIO(self._sound)) as parts:
            files = {name: parts.read(name) for name in parts.namelist()}
        if random.randrange(4) == 0:
            return mutated(random, self._sound)
        name = random.choice(list(files))
        files[name] = mutated(
            random, files[name], (b"cos\nsystem\n", b"R", b".", b"\x8a\x05\xff\xff\xff\xff\x7f", b"K\xff", b"t")
        )
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w") as parts:
            for name, data in files.items():
                parts.writestr(name, data)
        return made.getvalue()


_TORCH = Torch()
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
    "config": Parser(make_config, read_config),
    "bin": Parser(make_shard, in_file("x.bin", lambda path: read_all(BinSource([path], 8, bos_id=4)))),
    "jsonl": Parser(
        lines_of(_LINES), in_file("x.jsonl", lambda path: read_all(JsonLinesSource([path], BytesTokenizer())))
    ),
    "text": Parser(
        bytes_like(b"One text.\n\nAnother.\n# A third\n", "\ufeffS\u00fc\u00df.\n\n\u2028x".encode()),
        in_file("x.txt", lambda path: read_all(TextSource([path], BytesTokenizer(), r"\n\n|^#"))),
    ),
    "babi": Parser(
        bytes_like(*_BABI, words=_BABI_WORDS),
        in_file("qa1_test.txt", lambda path: [list(question_samples(story)) for story in read_babi(path)]),
    ),
    "mmlu": Parser(
        bytes_like(*_MMLU, words=(b",", b'"', b"\n", b"\r", b"\0", b"answer", b"choice0", b"x" * 140_000)),
        in_file("x_test.csv", read_questions),
    ),
    "babilong": Parser(
        lambda random: json_text(random, random.choice(([_SAMPLE, _SAMPLE], _SAMPLE))),
        in_file("qa1.json", lambda path: read_samples([path])),
    ),
    "finished": Parser(
        lines_of(_RECORDS, b'{"evaluation": "x"}\n'),
        in_file("x.finished.jsonl", lambda path: Finished(path, {"evaluation": "x"}, ("task", "index"))),
    ),
    "llama3": Parser(
        bytes_like(_RANKS, words=(b" ", b"\n", b"=", b"YWI= 260\n", b"9" * 5000, b"-1")),
        in_file("tokenizer", lambda path: use_tokenizer(path, "llama3")),
    ),
    "sentencepiece": _SENTENCEPIECE.parser(),
    "tokenizers": Parser(make_tokenizers, in_file("tokenizer", lambda path: use_tokenizer(path, "tokenizers"))),
    "safetensors": Parser(make_safetensors, in_file("x.safetensors", read_tensors)),
    "shards": Directory(write_shards, read_tensors, {"model.safetensors.index.json": json_of(*_NAMES)}).parser(),
    "torch": Parser(_TORCH.make, in_file("x.pth", read_tensors), _TORCH.prepare),
    "llama": Directory(
        write_directory("none", lambda checkpoint, path: huggingface.write(checkpoint, path, "float32", in_order)),
        lambda path: huggingface.read(path, (), in_order),
        {"config.json": json_of("llama", "llama3"), "model.safetensors": tensors_of},
    ).parser(),
    "lm2": Directory(
        write_directory("lm2", lambda checkpoint, path: huggingface.write(checkpoint, path, "float32", in_order)),
        lambda path: huggingface.read(path, (), in_order),
        {"config.json": json_of("lm2", "rmt", "none", 8, 2**31 - 1), "model.safetensors": tensors_of},
    ).parser(),
    "official": Directory(
        write_directory("official", lambda checkpoint, path: official.write(checkpoint, path, "float32", in_order)),
        lambda path: official.read(path, (), in_order),
        {"config.json": json_of(8, 2**31 - 1), "state_dict.safetensors": tensors_of},
    ).parser(),
    "converted": Directory(
        write_directory("lm2", lambda checkpoint, path: converted.write(checkpoint, path, in_order)),
        lambda path: converted.read(path, in_order),
        {"config.yaml": yaml_of, "params.safetensors": tensors_of},
    ).parser(),
    "memory": Memory().parser(),
}
