"""Data, tokenizers and the small files of models in a bucket give what they give on a disk."""

import json
import shutil

import numpy as np
import pytest
from helpers import assert_same_run, quick_training, short_config
from prepare_helpers import BYTES, TEXTS, bin_shard, files_in, inputs_of, json_lines, parquet, settings_of, table, zstd

from lm2_jax.common.errors import UserError
from lm2_jax.common.files import lock_directory
from lm2_jax.config import TokenizerConfig
from lm2_jax.data.babi.babilong import babi_questions, find_samples, read_samples
from lm2_jax.data.documents import BinSource, JsonLinesSource, TextSource
from lm2_jax.data.prepare import shards
from lm2_jax.data.prepare.plan import prepare
from lm2_jax.data.prepare.shards import run_locally
from lm2_jax.data.prepared import verify
from lm2_jax.tokenizer import load_tokenizer, origin_beside, origin_in
from lm2_jax.training.loop import train

FILES = {
    "a.txt": "\n\n".join(text for text in TEXTS if text.strip()).encode(),
    "b.jsonl": json_lines(TEXTS),
    "c.csv": table(TEXTS),
    "d.jsonl.zst": zstd(json_lines(TEXTS)),
    "e.parquet": parquet(TEXTS),
    "f.bin": bin_shard("one", "two"),
}


@pytest.fixture
def places(bucket, tmp_path):
    """The same files in a directory of each kind."""
    local = tmp_path / "files"
    local.mkdir()
    for name, data in FILES.items():
        (local / name).write_bytes(data)
        bucket.path(f"files/{name}").write_bytes(data)
    return str(local), f"{bucket.url}/files"


@pytest.mark.parametrize(
    "open_source",
    [
        lambda place: TextSource([f"{place}/*.txt"], BYTES, r"\n\n"),
        lambda place: JsonLinesSource([f"{place}/b.jsonl"], BYTES),
        lambda place: BinSource([f"{place}/f.bin"], 258, 256),
    ],
    ids=["text", "jsonl", "bin"],
)
def test_sources(open_source, places):
    local, stored = map(open_source, places)
    assert len(local) == len(stored) > 1
    for here, there in zip(local, stored, strict=True):
        assert np.array_equal(here.tokens, there.tokens)


def test_copies_that_are_removed_are_made_again(bucket, places, tmp_path):
    """Another process removes copies of a week ago, and a run may be longer."""
    source = TextSource([f"{places[1]}/a.txt"], BYTES)
    shutil.rmtree(tmp_path / "cache")
    assert np.array_equal(source[0].tokens, TextSource([f"{places[0]}/a.txt"], BYTES)[0].tokens)
    shutil.rmtree(tmp_path / "cache")
    bucket.path("files/a.txt").write_text("another text")
    with pytest.raises(UserError, match=r"gs://.*/a\.txt: has changed since it was opened \(it is another version\)"):
        source[0]


def test_problems_name_the_object(bucket, places):
    bucket.path("files/b.jsonl").write_bytes(b'{"text": "x"}\nnothing\n')
    with pytest.raises(UserError, match=rf"{bucket.url}/files/b\.jsonl: line 2: not JSON"):
        JsonLinesSource([f"{places[1]}/b.jsonl"], BYTES)


def made(place, output, names=tuple(FILES)):
    inputs = inputs_of([f"{place}/{name}" for name in names])
    return prepare(inputs, settings_of(output, shard_bytes=300), run_locally(1))


def without_places(manifest):
    """A manifest as a dictionary, without the directories of its inputs."""
    values = json.loads(manifest.model_dump_json())
    for source in values["sources"]:
        source["name"] = source["name"].rpartition("/")[2]
    return values


def test_preparing_from_and_into_a_bucket(bucket, places, tmp_path):
    there = made(places[1], bucket.path("prepared"))
    here = made(places[0], tmp_path / "prepared")
    assert without_places(there) == without_places(here)
    verify(bucket.path("prepared"), there)
    stored = files_in(bucket.export("prepared", tmp_path / "exported"))
    local = files_in(tmp_path / "prepared")
    assert stored.keys() == local.keys()
    assert all(data == local[name] for name, data in stored.items() if name != "manifest.json")
    assert made(places[1], bucket.path("prepared")) == there  # called again, it verifies


def test_an_interrupted_preparation_goes_on(bucket, places, monkeypatch):
    whole = made(places[1], bucket.path("whole"))
    write_shard, left = shards.write_shard, 2

    def interrupted(*arguments):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return write_shard(*arguments)

    monkeypatch.setattr(shards, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made(places[1], bucket.path("prepared"))
    monkeypatch.setattr(shards, "write_shard", write_shard)
    assert "prepared/manifest.json" not in bucket.names()
    with lock_directory(bucket.path("prepared/.progress"), "taken"), pytest.raises(UserError, match="another process"):
        made(places[1], bucket.path("prepared"))
    assert made(places[1], bucket.path("prepared")) == whole
    contents = [
        {n.partition("/")[2]: bucket.emulator.read(bucket.name, n) for n in bucket.names(d)} for d in ("w", "p")
    ]
    assert contents[0] == contents[1]


def test_a_tokenizer_and_the_files_beside_it(bucket, tmp_path):
    """Small files travel from a bucket into one, and are whole or not there."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "generation_config.json").write_text('{"eos_token_id": 7}')
    (model / "README.md").write_text("---\nlicense: mit\n---\n")
    (model / "weights").write_bytes(bytes(1000))
    for file in model.iterdir():
        if file.is_file():
            bucket.path(f"model/{file.name}").upload(file)
    origin = origin_beside(f"{bucket.url}/model/tokenizer.json")
    assert origin.generation == {"eos_token_id": 7} and not origin.has("weights")
    origin.copy_to(bucket.path("run"))
    assert origin_in(bucket.path("run")).generation == {"eos_token_id": 7}
    assert origin_beside(f"{bucket.url}/run/tokenizer.json").generation == {"eos_token_id": 7}
    bucket.path("run/origin/.complete").unlink()  # killed while they were copied
    assert origin_in(bucket.path("run")) is None
    with pytest.raises(UserError, match=rf"tokenizer\.path: {bucket.url}/none cannot be read \(no such object"):
        load_tokenizer(TokenizerConfig(kind="tokenizers", path=f"{bucket.url}/none"))


def test_babi_files_and_samples(bucket):
    story = "1 Mary went to the kitchen.\n2 Where is Mary?\tkitchen\t1\n"
    bucket.path("babi/qa1_one_test.txt").write_text(story)
    questions, files = babi_questions(f"{bucket.url}/babi", "qa1", 0)
    assert len(questions) == 1 and files == [bucket.path("babi/qa1_one_test.txt")]
    row = {"input": "Mary went to the kitchen.", "question": "Where is Mary?", "target": "kitchen"}
    bucket.path("samples/data/qa1/0k.json").write_text(json.dumps([row]))
    assert len(read_samples(find_samples(f"{bucket.url}/samples", "qa1", "0k"))) == 1
    with pytest.raises(UserError, match="is no directory"):
        find_samples(f"{bucket.url}/nothing", "qa1", "0k")


def test_a_damaged_checkpoint_is_moved_aside(bucket, tmp_path, whole):
    """The one before it is used, as on a disk."""
    config = short_config(f"{bucket.url}/run")
    with quick_training():
        train(config)
        name = next(name for name in bucket.names("run/checkpoints/12/params/") if "/d/" in name)
        data = bytearray(bucket.emulator.read(bucket.name, name))
        data[len(data) // 2] ^= 1
        bucket.emulator.write(bucket.name, name, bytes(data))
        train(config)
    assert bucket.steps() == [8, 12] and bucket.names("run/damaged_checkpoints/12/")
    assert_same_run(bucket.export("run", tmp_path / "exported"), whole)


def test_a_board_and_a_trace_in_a_bucket(bucket):
    """TensorBoard's file grows on this machine and is uploaded; the trace lies beside it."""
    changes = "train.steps=4", "train.profile={start: 3, steps: 2}", "eval.lengths=[1]", "eval.questions=1"
    with quick_training():
        train(short_config(f"{bucket.url}/run", *changes))
    names = bucket.names("run/tensorboard/")
    assert any(name.endswith("steps_3_to_4/" + name.split("/")[-1]) and "xplane" in name for name in names)
    (board,) = [name for name in names if "tfevents" in name]
    assert b"tokens_per_second" in bucket.emulator.read(bucket.name, board)
