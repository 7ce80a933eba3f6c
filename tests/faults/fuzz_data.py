"""Configs and data, to be fuzzed."""

import hashlib
import io
import json

import numpy as np
from fuzz_parser import Parser, bytes_like, in_file
from hostile import YAML_WORDS, altered, json_text, mutated

from lm2_jax.config import TokenizerConfig, load_config
from lm2_jax.data.babi.babilong import read_samples
from lm2_jax.data.babi.files import question_samples, read_babi
from lm2_jax.data.documents import BinSource, JsonLinesSource, TextSource
from lm2_jax.data.prepare.inputs import JsonLinesInput
from lm2_jax.data.prepare.plan import prepare
from lm2_jax.data.prepare.shards import Settings, run_locally
from lm2_jax.data.prepared import PreparedSource, read_manifest, tokenizer_of, verify
from lm2_jax.evals.mmlu import read_questions
from lm2_jax.evals.results import ResultLog
from lm2_jax.tokenizer import BytesTokenizer, load_tokenizer

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
        data = mutated(random, random.choice(_CONFIGS), YAML_WORDS)
    else:
        data = json_text(random, random.choice(_SECTIONS))
    overrides = []
    if random.randrange(3) == 0:
        value = mutated(random, random.choice(_VALUES), YAML_WORDS).decode(errors="surrogateescape")
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


class Prepared:
    """Prepared data whose checksums are right whatever was changed, as a stranger would see to."""

    def prepare(self, directory):
        (directory / "x.jsonl").write_text('{"text": "one"}\n{"text": ""}\n{"text": "two, longer"}\n')
        prepare(*self._work(directory), run_locally(1))
        self._sound = {path.name: path.read_bytes() for path in (directory / "out").iterdir()}
        (self._data,) = (name for name in self._sound if name.endswith(".arrayrecord"))
        (self._index,) = (name for name in self._sound if name.endswith(".index.npy"))
        self._manifest = json.loads(self._sound["manifest.json"])
        self.read(directory, {})

    def make(self, random):
        kind = random.randrange(4)
        if kind == 0:
            return {"manifest.json": json_text(random, self._manifest)}
        files = {}
        if kind == 1:
            files[self._data] = mutated(random, self._sound[self._data])
        elif kind == 2:
            files[self._index] = mutated(random, self._sound[self._index])
        else:
            array = io.BytesIO()
            np.save(array, np.array([[random.choice((0, 1, 4, -1, 2**31 - 1)) for _ in "ab"] for _ in range(2)], "i4"))
            files[self._index] = array.getvalue()
        (shard,) = self._manifest["shards"]
        shard = altered(random, shard) if random.randrange(4) == 0 else dict(shard)
        if isinstance(shard, dict):
            data, index = (files.get(name, self._sound[name]) for name in (self._data, self._index))
            shard |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            shard |= {"index_sha256": hashlib.sha256(index).hexdigest()}
        return files | {"manifest.json": json.dumps(self._manifest | {"shards": [shard]}).encode()}

    def read(self, directory, value):
        for name, data in (self._sound | value).items():
            (directory / "out" / name).write_bytes(data)
        read_all(PreparedSource([directory / "out"]))
        manifest = read_manifest(directory / "out")
        verify(directory / "out", manifest)
        load_tokenizer(tokenizer_of(directory / "out", manifest))
        prepare(*self._work(directory), run_locally(1))  # which is done, or refused

    @staticmethod
    def _work(directory):
        return [JsonLinesInput(directory / "x.jsonl", "text")], Settings(
            TokenizerConfig(kind="bytes"), directory / "out"
        )


_PREPARED = Prepared()

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
    "prepared": Parser(_PREPARED.make, _PREPARED.read, _PREPARED.prepare),
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
        in_file("x.finished.jsonl", lambda path: ResultLog(path, {"evaluation": "x"}, ("task", "index"))),
    ),
}
