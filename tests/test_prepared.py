"""Prepared data: reading, damage, mixtures, and lanes over all of it in any number of processes."""

import itertools
import json
import pickle
import re
import zlib

import numpy as np
import pytest
from helpers import tiny_config

from lm2_jax.common.errors import UserError
from lm2_jax.config import TokenizerConfig, load_config, save_config
from lm2_jax.data.documents import DocumentSource, Mixture
from lm2_jax.data.lanes import make_iterator
from lm2_jax.data.pipeline import Pipeline
from lm2_jax.data.prepare.inputs import JsonLinesInput
from lm2_jax.data.prepare.plan import prepare
from lm2_jax.data.prepare.shards import Settings, run_locally
from lm2_jax.data.prepared import PreparedSource, read_manifest, tokenizer_of, verify
from lm2_jax.tokenizer import BytesTokenizer

BYTES = BytesTokenizer()
BOUNDARIES = ("segment", "packed", "stream")
KEYS = ("tokens_BST", "targets_BST", "document_BST", "reset_BS", "answers_BST")


def make_texts(count, seed=0, longest=60):
    rng = np.random.default_rng(seed)
    return [f"{seed}.{number} " + "x" * int(rng.integers(0, longest)) for number in range(count)]


def prepare_texts(directory, texts, **changes):
    lines = directory.with_suffix(".jsonl")
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = Settings(**{"tokenizer": TokenizerConfig(kind="bytes"), "output": directory, "shard_bytes": 1} | changes)
    prepare([JsonLinesInput(lines, "text")], settings, run_locally(1))
    return directory


@pytest.fixture(autouse=True, scope="module")
def small_chunks():
    with pytest.MonkeyPatch.context() as monkeypatch:  # several shards
        monkeypatch.setattr("lm2_jax.data.prepare.chunks.CHUNK_BYTES", 1500)
        yield


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return prepare_texts(tmp_path_factory.mktemp("prepared") / "corpus", make_texts(150))


# --- Reading -------------------------------------------------------------------------------------------------------


def test_documents_by_number(directory):
    source = PreparedSource([directory], BYTES.fingerprint())
    assert [BYTES.decode(source[index].tokens) for index in range(len(source))] == make_texts(150)
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again[77].tokens, source[77].tokens)
    assert len(list(directory.glob("*.arrayrecord"))) > 3


def test_more_shards_than_may_be_open(directory, monkeypatch):
    monkeypatch.setattr("lm2_jax.data.prepared._OPEN_SHARDS", 2)
    source, texts = PreparedSource([directory]), make_texts(150)
    for index in np.random.default_rng(0).permutation(150).tolist():
        assert BYTES.decode(source[index].tokens) == texts[index]


def test_several_directories_follow_each_other(directory, tmp_path):
    other = prepare_texts(tmp_path / "other", ["a", "b"])
    source = PreparedSource([directory, other])
    assert len(source) == 152
    assert BYTES.decode(source[151].tokens) == "b" and source.lengths[151] == 3


def copy(directory, tmp_path):
    target = tmp_path / "copy"
    target.mkdir(parents=True)
    for path in directory.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def test_a_flipped_byte_is_found(directory, tmp_path):
    """Wherever it is: every document is either what it was, or refused with its file and number."""
    shard = min(directory.glob("*.arrayrecord"))
    whole = PreparedSource([directory])
    expected = [document.tokens.tolist() for document in whole]
    size, first = shard.stat().st_size, shard.read_bytes().index("0.0 ".encode("utf-16-le"))
    damaged = copy(directory, tmp_path)
    refused = 0
    for place in [*range(first, first + 400, 20), *range(0, size, size // 40)]:
        (damaged / shard.name).write_bytes(shard.read_bytes())
        flip(damaged / shard.name, place)
        source = PreparedSource([damaged])
        for index, tokens in enumerate(expected):
            try:
                assert source[index].tokens.tolist() == tokens
            except UserError as error:
                assert f"{damaged / shard.name}: record {index} is damaged" in str(error)
                refused += 1
        with pytest.raises(UserError, match="SHA-256 is not the manifest's"):
            verify(damaged, read_manifest(damaged))
    assert refused >= 20


def test_a_record_with_a_wrong_checksum_is_refused(directory, monkeypatch):
    source = PreparedSource([directory])
    source[3]
    monkeypatch.setattr("lm2_jax.data.prepared.zlib.crc32", lambda data: 1)
    with pytest.raises(UserError, match=r"record 3 is damaged \(its CRC-32 does not match\)"):
        source[3]


def test_damaged_directories_are_refused_at_the_start(directory, tmp_path):
    def refused(damage, message, fingerprint=None):
        target = copy(directory, tmp_path)
        damage(target)
        with pytest.raises(UserError, match=message):
            PreparedSource([target], fingerprint)
        for path in target.iterdir():
            path.unlink()
        target.rmdir()

    shard, index = min(path.name for path in directory.glob("*.arrayrecord")), "00000-00001.index.npy"
    refused(lambda d: (d / "manifest.json").unlink(), r"data\.path: .* has no manifest\.json; name a directory that")
    refused(lambda d: (d / "manifest.json").write_text("{"), r"manifest\.json: is damaged \(Invalid JSON")
    refused(lambda d: (d / "manifest.json").write_text("{}"), r"manifest\.json: is damaged \(version: Field required")
    text = (directory / "manifest.json").read_text()
    later = text.replace('"version": 1', '"version": 2')
    refused(lambda d: (d / "manifest.json").write_text(later), r"version 2; this code reads version 1")
    refused(lambda d: (d / shard).unlink(), rf"{shard}: missing, though the manifest names it")
    refused(lambda d: (d / shard).write_bytes(b"x"), rf"{shard}: 1 bytes, the manifest says \d+")
    refused(lambda d: flip(d / index, -1), rf"{index}: is damaged")
    negative = text.replace('"documents": 150', '"documents": -150')
    refused(lambda d: (d / "manifest.json").write_text(negative), r"documents: Input should be greater")
    strange = text.replace('"kind": "bytes"', '"kind": "nonsense"')
    (copied := copy(directory, tmp_path / "strange")) and (copied / "manifest.json").write_text(strange)
    with pytest.raises(UserError, match=r"manifest\.json: 'nonsense' of no file is no tokenizer"):
        tokenizer_of(copied, read_manifest(copied))
    empty = re.sub(r'"documents": (\d\d),', r'"documents": 0,', text, count=1)
    refused(lambda d: (d / "manifest.json").write_text(empty), r"is damaged \(shard 00000-00000 has no document\)")
    more = re.sub(r'"documents": (\d\d),', r'"documents": 1\1,', text)
    refused(lambda d: (d / "manifest.json").write_text(more), r"index\.npy: is damaged")
    fewer = re.sub(r'"tokens": (\d\d\d),', r'"tokens": 1\1,', text)
    refused(lambda d: (d / "manifest.json").write_text(fewer), r"index\.npy: is no index of \d+ documents and 1\d+ tok")
    refused(lambda d: None, r"manifest\.json: made with another tokenizer \(bytes, 258 ids[^$]*\{kind: bytes\}", "no")


def test_files_that_the_manifest_does_not_name_are_not_read(directory, tmp_path):
    target = copy(directory, tmp_path)
    (target / "00000-00009.arrayrecord").write_bytes(b"half")
    (target / "00000-00009.index.npy").write_bytes(b"half")
    assert len(PreparedSource([target])) == 150


# --- Mixtures ------------------------------------------------------------------------------------------------------


class Numbers(DocumentSource):
    """Documents of one token, from `start` on."""

    def __init__(self, start, count):
        self.start, self.lengths = start, np.ones(count, np.int32)

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        assert 0 <= index < len(self)
        return self.start + index


def test_a_mixture_is_its_parts_one_after_the_other():
    mixture = Mixture([Numbers(100, 3), Numbers(200, 2)], [1, 1])
    assert [mixture[index] for index in range(len(mixture))] == [100, 101, 102, 200, 201]
    assert len(mixture.lengths) == 5


@pytest.mark.parametrize("weights", [(0.7, 0.2, 0.1), (1, 1, 1), (5, 3, 0.3), (0.3, 0.7, 0.19)])
def test_shares_are_those_of_the_weights(weights):
    sizes = (5000, 900, 1500)
    mixture = Mixture([Numbers(0, n) for n in sizes], weights)
    order = mixture.ordinals(3)
    numbers = np.array([order[ordinal] for ordinal in range(10_000)])
    ends = np.cumsum(sizes)
    for part, (end, size, weight) in enumerate(zip(ends, sizes, weights, strict=True)):
        own = numbers[(numbers >= end - size) & (numbers < end)]
        share = weight / sum(weights)
        assert abs(len(own) / 10_000 - share) <= 0.01 * share + 1e-4, part
        epochs = [own[start : start + size] for start in range(0, len(own) - size + 1, size)]
        assert all(len(set(epoch)) == size for epoch in epochs), "each of its epochs has every document once"
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs), "each epoch has its own order"
    again, other = Mixture([Numbers(0, n) for n in sizes], weights).ordinals(3), mixture.ordinals(4)
    assert [again[9000 + k] for k in range(50)] == numbers[9000:9050].tolist()
    assert [other[k] for k in range(50)] != numbers[:50].tolist()


# --- From a config -------------------------------------------------------------------------------------------------


def config_of(tmp_path, *overrides):
    settings = ("tokenizer.kind=bytes", "train.curriculum=[]", "data.source=prepared", *overrides)
    return tiny_config(tmp_path / "run", *settings)


def test_a_mixture_from_a_config(directory, tmp_path):
    other = prepare_texts(tmp_path / "other", make_texts(40, seed=1))
    parts = f"data.mixture=[{{path: {directory}, weight: 0.75}}, {{path: {other}, weight: 0.25}}]"
    config = config_of(tmp_path, parts, "data.validation_fraction=0.1")
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    pipeline = Pipeline(config, BYTES)
    training, held_out = pipeline.sources(config.stages[0])
    texts = [{BYTES.decode(source[index].tokens) for index in range(len(source))} for source in (training, held_out)]
    assert not texts[0] & texts[1] and texts[0] | texts[1] == {*make_texts(150), *make_texts(40, seed=1)}
    assert sum(text.startswith("1.") for text in texts[1]) == 4
    order = training.ordinals(config.train.seed)
    second = sum(BYTES.decode(training[order[ordinal]].tokens).startswith("1.") for ordinal in range(400))
    assert second == 100
    assert next(iter(pipeline.validation(config.stages[0]))).reset_BS.any()
    changed = config_of(tmp_path, parts.replace("0.25", "0.26"), "data.validation_fraction=0.1")
    assert Pipeline(changed, BYTES).fingerprint() != pipeline.fingerprint() == Pipeline(config, BYTES).fingerprint()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), r"data\.path is missing; source prepared reads the directories"),
        (("data.path=x", "data.mixture=[{path: y}]"), r"data\.mixture replaces path.* and path x"),
        (("data.source=bin", "data.mixture=[{path: y}]"), r"data\.mixture .*; found source bin"),
        (("data.mixture=[{path: y, weight: 0}]",), r"data\.mixture\.0\.weight: found 0; should be greater than 0"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        config_of(tmp_path, *overrides)


def test_all_parts_that_are_wrong_are_named(tmp_path):
    config = config_of(tmp_path, "data.mixture=[{path: x}, {path: y}]")
    with pytest.raises(UserError, match=r"data\.mixture\.0\.path: x has no man[^$]*\ndata\.mixture\.1\.path: y has no"):
        Pipeline(config, BYTES)


# --- One epoch, any number of processes ----------------------------------------------------------------------------


def pipelines(config, processes):
    lanes = np.array_split(np.arange(config.data.batch_size), processes)
    return [Pipeline(config, BYTES, own.tolist() if processes > 1 else None) for own in lanes]


def windows_of(iterators):
    """Rows of all processes together; their places are the same."""
    rows = [next(iterator) for iterator in iterators]
    assert all(iterator.get_state() == iterators[0].get_state() for iterator in iterators)
    return {key: np.concatenate([getattr(own, key) for own in rows]) for key in KEYS}


@pytest.mark.parametrize(("boundaries", "processes"), [*itertools.product(BOUNDARIES, (1, 2, 4))])
def test_an_epoch_has_every_document_once(directory, tmp_path, boundaries, processes):
    sizes = ("data.batch_size=4", "data.segment_length=16", "data.segments_per_window=2", "data.validation_fraction=0")
    config = config_of(tmp_path, f"data.path={directory}", f"data.boundaries={boundaries}", *sizes)
    iterators = [iter(pipeline.training(config.stages[0])) for pipeline in pipelines(config, processes)]
    windows = [windows_of(iterators)]
    while iterators[0].get_state()["epoch"] < 2:
        windows.append(windows_of(iterators))
    windows += [windows_of(iterators) for _ in range(4)]  # which end the documents under way
    handed_out = []  # (position of its start, lane, checksum)
    for lane in range(4):
        tokens, targets, document = (
            np.concatenate([window[key][lane].ravel() for window in windows])
            for key in ("tokens_BST", "targets_BST", "document_BST")
        )
        places = np.flatnonzero(document)
        starts = np.flatnonzero(tokens[places] == BYTES.special.bos_id)
        for start, whole in zip(places[starts], np.split(targets[places], starts[1:]), strict=True):
            handed_out.append((start, lane, zlib.crc32(whole.tobytes())))
    order = [checksum for _, _, checksum in sorted(handed_out)]
    expected = sorted(zlib.crc32(np.array([*text.encode(), 257], np.int32).tobytes()) for text in make_texts(150))
    assert sorted(order[:150]) == sorted(order[150:300]) == expected
    assert order[:150] != order[150:300]


@pytest.mark.parametrize("boundaries", BOUNDARIES)
def test_a_place_saved_under_one_process_is_gone_on_with_under_two(directory, tmp_path, boundaries):
    other = prepare_texts(tmp_path / "other", make_texts(40, seed=1))
    parts = f"data.mixture=[{{path: {directory}, weight: 0.75}}, {{path: {other}, weight: 0.25}}]"
    config = config_of(tmp_path, parts, f"data.boundaries={boundaries}", "data.batch_size=4")
    (alone,) = pipelines(config, 1)
    (iterator,) = iterators = [make_iterator(alone.training(config.stages[0]), 2)]
    for _ in range(9):
        windows_of(iterators)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = [windows_of(iterators) for _ in range(8)]
    iterator.close()
    for processes in (1, 2, 4):
        resumed = [iter(pipeline.training(config.stages[0])) for pipeline in pipelines(config, processes)]
        for one in resumed:
            one.set_state(state)
        for window in expected:
            found = windows_of(resumed)
            assert found.keys() == window.keys()
            for key, array in found.items():
                np.testing.assert_array_equal(array, window[key])
