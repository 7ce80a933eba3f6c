"""Lanes: exact layouts, the scheduling rule, and places that can be saved, restored and carried to other windows."""

import json
import subprocess
import sys
import threading

import grain
import numpy as np
import pytest

from lm2_jax.common.errors import UserError
from lm2_jax.data.documents import Document, DocumentSource
from lm2_jax.data.lanes import LaneDataset, Lanes, make_iterator

BOUNDARIES = ("segment", "packed", "stream")
KEYS = {"tokens_BST", "targets_BST", "document_BST", "reset_BS", "answers_BST"}


def make_document(number, length, answers=()):
    """Token i of document n is 100 n + i, so every token says where it belongs."""
    mask = np.zeros(length, bool)
    mask[list(answers)] = True
    return Document(tokens=(100 * number + np.arange(length)).astype(np.int32), answers=mask)


class Documents(list, DocumentSource):
    """Documents in memory."""


def lanes_of(documents, boundaries, *, lanes, segments, length, shuffle_seed=None):
    source = Documents(documents) if isinstance(documents, list) else documents
    in_order = grain.MapDataset.range(len(source)).repeat(None)
    ordinals = in_order if shuffle_seed is None else source.ordinals(shuffle_seed)
    return LaneDataset(source, ordinals, Lanes(lanes, segments, length, boundaries))


def random_documents(seed, count=23, longest=40):
    rng = np.random.default_rng(seed)
    documents = []
    for number, length in enumerate(rng.integers(0, longest, count), start=1):
        documents.append(make_document(number, length, np.flatnonzero(rng.random(length) < 0.3)))
    return documents


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def concatenate(windows):
    """Windows joined along the segment axis."""
    return {key: np.concatenate([getattr(window, key) for window in windows], axis=1) for key in KEYS}


def arrays(window):
    return window if isinstance(window, dict) else {key: getattr(window, key) for key in KEYS}


def assert_same(actual, expected):
    actual, expected = arrays(actual), arrays(expected)
    assert actual.keys() == expected.keys() == KEYS
    for key in KEYS:
        assert actual[key].dtype == expected[key].dtype
        np.testing.assert_array_equal(actual[key], expected[key], err_msg=key)


def reference(lengths, boundaries, *, lanes, total, segment_length):
    """The rule, position by position: for every lane the (ordinal, token) of each input, or None for padding."""
    rows = [[] for _ in range(lanes)]
    reading = [None] * lanes
    ordinal = 0
    for position in range(total):
        for lane in range(lanes):
            if reading[lane] is None and (boundaries != "segment" or position % segment_length == 0):
                while lengths[ordinal % len(lengths)] < 2:
                    ordinal += 1
                reading[lane] = (ordinal, 0)
                ordinal += 1
            rows[lane].append(reading[lane])
            if reading[lane] is not None:
                document, token = reading[lane]
                last = token + 2 == lengths[document % len(lengths)]
                reading[lane] = None if last else (document, token + 1)
    return rows


def window_of(rows, documents, boundaries, segment_length):
    """What the reference's rows look like as one window."""
    shape = (len(rows), len(rows[0]) // segment_length, segment_length)
    window = {key: np.zeros(shape, bool if key == "answers_BST" else np.int32) for key in KEYS - {"reset_BS"}}
    window["reset_BS"] = np.zeros(shape[:2], bool)
    for lane, row in enumerate(rows):
        for position, place in enumerate(row):
            segment, t = divmod(position, segment_length)
            where = (lane, segment, t)
            if place is None:
                continue
            ordinal, token = place
            document = documents[ordinal % len(documents)]
            window["tokens_BST"][where] = document.tokens[token]
            window["targets_BST"][where] = document.tokens[token + 1]
            window["answers_BST"][where] = document.answers[token + 1]
            window["document_BST"][where] = 1
            if boundaries != "stream":
                if t > 0:
                    window["document_BST"][where] = window["document_BST"][lane, segment, t - 1] + (token == 0)
                else:
                    window["reset_BS"][lane, segment] = token == 0
    return window


# --- Layouts -------------------------------------------------------------------------------------------------------

# The documents of the module's docstring: 6, 3, 7, 2, 4, 5 positions; c answers with its tokens 1 and 7.
TINY = [make_document(n, length, a) for n, length, a in ((1, 7, ()), (2, 4, ()), (3, 8, (1, 7)), (4, 3, ()))]
TINY += [make_document(5, 5), make_document(6, 6)]


def test_segment_layout():
    window = next(make_iterator(lanes_of(TINY, "segment", lanes=2, segments=3, length=4), 0))
    tokens = [
        [[100, 101, 102, 103], [104, 105, 0, 0], [400, 401, 0, 0]],
        [[200, 201, 202, 0], [300, 301, 302, 303], [304, 305, 306, 0]],
    ]
    filled = np.array(tokens) > 0
    answers = np.zeros((2, 3, 4), bool)
    answers[1, 1, 0] = answers[1, 2, 2] = True  # at the inputs 300 and 306, whose targets are the answers
    assert_same(
        window,
        {
            "tokens_BST": np.array(tokens, np.int32),
            "targets_BST": np.where(filled, np.array(tokens) + 1, 0).astype(np.int32),
            "document_BST": filled.astype(np.int32),
            "reset_BS": np.array([[True, False, True], [True, True, False]]),
            "answers_BST": answers,
        },
    )


PACKED_TOKENS = np.array(
    [
        [[100, 101, 102, 103], [104, 105, 400, 401], [500, 501, 502, 503]],
        [[200, 201, 202, 300], [301, 302, 303, 304], [305, 306, 600, 601]],
    ],
    np.int32,
)
PACKED_ANSWERS = np.isin(PACKED_TOKENS, (300, 306))


def test_packed_layout():
    window = next(make_iterator(lanes_of(TINY, "packed", lanes=2, segments=3, length=4), 0))
    assert_same(
        window,
        {
            "tokens_BST": PACKED_TOKENS,
            "targets_BST": PACKED_TOKENS + 1,
            "document_BST": np.array(
                [[[1, 1, 1, 1], [1, 1, 2, 2], [1, 1, 1, 1]], [[1, 1, 1, 2], [1, 1, 1, 1], [1, 1, 2, 2]]], np.int32
            ),
            "reset_BS": np.array([[True, False, True], [True, False, False]]),
            "answers_BST": PACKED_ANSWERS,
        },
    )


def test_stream_layout():
    window = next(make_iterator(lanes_of(TINY, "stream", lanes=2, segments=3, length=4), 0))
    assert_same(
        window,
        {
            "tokens_BST": PACKED_TOKENS,
            "targets_BST": PACKED_TOKENS + 1,
            "document_BST": np.ones((2, 3, 4), np.int32),
            "reset_BS": np.zeros((2, 3), bool),
            "answers_BST": PACKED_ANSWERS,
        },
    )


def test_many_documents_in_a_packed_segment_after_a_continued_one():
    documents = [make_document(1, 7)] + [make_document(n, 2) for n in (2, 3, 4)]  # 6, 1, 1, 1 positions
    window = next(make_iterator(lanes_of(documents, "packed", lanes=1, segments=2, length=5), 0))
    np.testing.assert_array_equal(window.document_BST[0], [[1, 1, 1, 1, 1], [1, 2, 3, 4, 5]])
    np.testing.assert_array_equal(window.tokens_BST[0, 1], [105, 200, 300, 400, 100])
    np.testing.assert_array_equal(window.reset_BS, [[True, False]])


# --- The rule ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("boundaries", BOUNDARIES)
def test_ties_go_to_the_lowest_lane(boundaries):
    documents = [make_document(n, 5) for n in range(1, 7)]  # all equally long: all lanes always tie
    window = next(make_iterator(lanes_of(documents, boundaries, lanes=3, segments=2, length=4), 0))
    np.testing.assert_array_equal(window.tokens_BST[:, :, 0], [[100, 400], [200, 500], [300, 600]])


@pytest.mark.parametrize("boundaries", BOUNDARIES)
@pytest.mark.parametrize("seed", range(12))
def test_matches_a_reference_that_goes_position_by_position(boundaries, seed):
    rng = np.random.default_rng(seed)
    documents = random_documents(seed, count=int(rng.integers(1, 12)), longest=int(rng.integers(3, 30)))
    documents.append(make_document(99, 2))
    lanes, segments, length = (int(rng.integers(1, high)) for high in (7, 5, 9))
    count = 6
    rows = reference(
        [len(document.tokens) for document in documents],
        boundaries,
        lanes=lanes,
        total=count * segments * length,
        segment_length=length,
    )
    iterator = make_iterator(lanes_of(documents, boundaries, lanes=lanes, segments=segments, length=length), 0)
    assert_same(concatenate(take(iterator, count)), window_of(rows, documents, boundaries, length))


@pytest.mark.parametrize("boundaries", BOUNDARIES)
def test_the_number_of_segments_in_a_window_changes_nothing(boundaries):
    documents = random_documents(0)
    streams, states = [], []
    for segments in (1, 4, 7):
        dataset = lanes_of(documents, boundaries, lanes=5, segments=segments, length=8, shuffle_seed=3)
        iterator = make_iterator(dataset, 0)
        streams.append(concatenate(take(iterator, 56 // segments)))
        states.append(iterator.get_state())
    assert_same(streams[1], streams[0])
    assert_same(streams[2], streams[0])
    assert states[0] == states[1] == states[2]


class OnlyOwn(DocumentSource):
    """Documents that may be read, of a source whose other documents belong to other processes."""

    def __init__(self, documents, lengths):
        self.documents, self.lengths, self.read = documents, lengths, set()

    def __len__(self):
        return len(self.documents)

    def __getitem__(self, index):
        self.read.add(index)
        return self.documents[index]


@pytest.mark.parametrize("boundaries", BOUNDARIES)
@pytest.mark.parametrize("by_lengths", [True, False])
def test_processes_lay_out_their_own_lanes_of_one_schedule(boundaries, by_lengths):
    documents = random_documents(6, count=80)
    lengths = np.array([len(document.tokens) for document in documents])
    alone = make_iterator(lanes_of(documents, boundaries, lanes=4, segments=2, length=8, shuffle_seed=5), 0)
    expected, own_lanes = take(alone, 20), ([0, 3], [1], [2])
    read = []  # by each process
    for own in own_lanes:
        source = OnlyOwn(documents, lengths if by_lengths else None)
        dataset = LaneDataset(source, source.ordinals(5), Lanes(4, 2, 8, boundaries, own))
        iterator = make_iterator(dataset, 0)
        first = take(iterator, 7)
        resumed = make_iterator(dataset, 0)
        resumed.set_state(iterator.get_state())
        for window, whole in zip([*first, *take(resumed, 13)], expected, strict=True):
            assert_same(window, {key: rows[own] for key, rows in arrays(whole).items()})
        assert resumed.get_state() == alone.get_state()
        read.append(source.read)
    everything = set.union(*read)
    for numbers in read:  # where lengths are known, documents of other lanes are not read
        assert (numbers < everything) if by_lengths else (numbers == everything)


@pytest.mark.parametrize("boundaries", BOUNDARIES)
def test_every_document_is_read_once_an_epoch_and_in_order(boundaries):
    documents = random_documents(1, count=30)
    iterator = make_iterator(lanes_of(documents, boundaries, lanes=4, segments=3, length=8, shuffle_seed=0), 0)
    windows = [next(iterator)]
    while iterator.get_state()["epoch"] < 4:
        windows.append(next(iterator))
    stream = concatenate(windows)
    handed_out = []  # (position, lane, number of the document)
    for lane in range(4):
        filled = np.flatnonzero(stream["document_BST"][lane].ravel())
        tokens, targets = (stream[key][lane].ravel()[filled] for key in ("tokens_BST", "targets_BST"))
        starts = np.flatnonzero(tokens % 100 == 0)
        for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            number = tokens[start] // 100
            whole = documents[number - 1].tokens
            n = len(whole) - 1 if end < len(tokens) else end - start  # the lane's last one may be unfinished
            np.testing.assert_array_equal(tokens[start:end], whole[:n])
            np.testing.assert_array_equal(targets[start:end], whole[1 : n + 1])
            handed_out.append((filled[start], lane, number))
    usable = [number for number, document in enumerate(documents, start=1) if len(document.tokens) >= 2]
    assert len(usable) < 30
    order = [number for _, _, number in sorted(handed_out)]
    epochs = [order[epoch * len(usable) : (epoch + 1) * len(usable)] for epoch in range(4)]
    assert all(sorted(epoch) == usable for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_padding_is_zero_everywhere():
    stream = concatenate(
        take(make_iterator(lanes_of(random_documents(2), "segment", lanes=3, segments=2, length=8), 0), 9)
    )
    padding = stream["document_BST"] == 0
    assert padding.any()
    for key in ("tokens_BST", "targets_BST", "answers_BST"):
        assert not stream[key][padding].any()
    assert (stream["document_BST"][:, :, 0] == 1).all()


# --- Documents -----------------------------------------------------------------------------------------------------


def test_every_epoch_is_another_permutation():
    numbers = list(range(50))
    source = Documents(numbers)
    shuffled = source.ordinals(7)
    epochs = [[shuffled[epoch * 50 + position] for position in range(50)] for epoch in range(4)]
    assert all(sorted(epoch) == numbers for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert [source.ordinals(7)[position] for position in range(50)] == epochs[0]
    assert [source.ordinals(8)[position] for position in range(50)] != epochs[0]


def test_short_documents_are_skipped():
    documents = [make_document(1, 0), make_document(2, 5), make_document(3, 1), make_document(4, 5)]
    iterator = make_iterator(lanes_of(documents, "segment", lanes=1, segments=4, length=4), 0)
    np.testing.assert_array_equal(next(iterator).tokens_BST[0, :, 0], [200, 400, 200, 400])
    assert iterator.get_state() == {"ordinals": [-1], "offsets": [0], "next": 8, "epoch": 2}


@pytest.mark.parametrize("prefetch", (0, 2))
@pytest.mark.parametrize("seed", range(3))
def test_no_usable_document_ends_with_an_error(prefetch, seed):
    dataset = lanes_of([make_document(1, 1)] * 50, "packed", lanes=2, segments=1, length=4, shuffle_seed=seed)
    with pytest.raises(UserError, match="none of the 50 documents"):
        next(make_iterator(dataset, prefetch))
    one_usable = [make_document(n, 1) for n in range(1, 6)] + [make_document(6, 2)]
    dataset = lanes_of(one_usable, "packed", lanes=1, segments=1, length=6, shuffle_seed=seed)
    assert (next(make_iterator(dataset, prefetch)).tokens_BST == 600).all()


# --- State ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("boundaries", BOUNDARIES)
@pytest.mark.parametrize("prefetch", (0, 1, 3))
def test_restored_at_every_window_it_goes_on_unchanged(boundaries, prefetch):
    dataset = lanes_of(random_documents(4), boundaries, lanes=3, segments=2, length=8, shuffle_seed=1)
    plain = make_iterator(dataset, 0)
    states, windows = [plain.get_state()], []
    for _ in range(12):
        windows.append(next(plain))
        states.append(plain.get_state())

    iterator, travelling = make_iterator(dataset, prefetch), make_iterator(dataset, prefetch)
    for number, window in enumerate(windows):
        assert iterator.get_state() == states[number]  # however far the thread has read
        saved = json.loads(json.dumps(iterator.get_state()))
        assert_same(next(iterator), window)
        fresh = make_iterator(dataset, prefetch)
        fresh.set_state(saved)
        assert fresh.get_state() == saved
        for later in windows[number : number + 3]:
            assert_same(next(fresh), later)
        fresh.close()
    assert iterator.get_state() == states[-1]
    for number in (5, 0, 11, 3):  # one iterator, forwards and backwards, its thread reading ahead
        travelling.set_state(states[number])
        assert_same(next(travelling), windows[number])
        assert travelling.get_state() == states[number + 1]
    travelling.close()
    iterator.close()


def test_state_is_the_documented_object():
    iterator = make_iterator(lanes_of(TINY, "packed", lanes=2, segments=2, length=4), 0)
    assert iterator.get_state() == {"ordinals": [-1, -1], "offsets": [0, 0], "next": 0, "epoch": 0}
    next(iterator)
    assert iterator.get_state() == {"ordinals": [-1, 2], "offsets": [0, 5], "next": 4, "epoch": 0}
    next(iterator)
    assert iterator.get_state()["epoch"] == iterator.get_state()["next"] // 6 == 1


@pytest.mark.parametrize("boundaries", BOUNDARIES)
def test_a_longer_stage_goes_on_from_the_same_tokens(boundaries):
    documents = random_documents(5)
    first = make_iterator(lanes_of(documents, boundaries, lanes=3, segments=1, length=4), 0)
    take(first, 7)
    state = first.get_state()
    assert any(offset > 0 for offset in state["offsets"])
    second = make_iterator(lanes_of(documents, boundaries, lanes=3, segments=2, length=6), 2)
    second.set_state(state)
    window = next(second)
    second.close()
    for lane, (ordinal, offset) in enumerate(zip(state["ordinals"], state["offsets"], strict=True)):
        if ordinal >= 0:
            document = documents[ordinal % len(documents)]
            n = min(12, len(document.tokens) - 1 - offset)
            np.testing.assert_array_equal(window.tokens_BST[lane].ravel()[:n], document.tokens[offset : offset + n])
            assert not window.reset_BS[lane, 0]
            assert window.document_BST[lane, 0, 0] == 1
        elif boundaries != "stream":
            assert window.reset_BS[lane, 0]
    if boundaries != "segment":  # there the layout knows no segments, so the tokens are those of the short stage
        expected = concatenate(take(first, 3))
        for key in ("tokens_BST", "targets_BST", "answers_BST"):
            np.testing.assert_array_equal(arrays(window)[key].reshape(3, 12), expected[key].reshape(3, 12))


@pytest.mark.parametrize("prefetch", (0, 2))
def test_another_number_of_lanes_is_refused(prefetch):
    state = make_iterator(lanes_of(TINY, "segment", lanes=3, segments=1, length=4), 0).get_state()
    with pytest.raises(ValueError, match="has 3 lanes, this run has 2"):
        make_iterator(lanes_of(TINY, "segment", lanes=2, segments=1, length=4), prefetch).set_state(state)


def test_a_document_that_shrank_is_refused():
    iterator = make_iterator(lanes_of([make_document(1, 5)], "packed", lanes=1, segments=1, length=8), 0)
    with pytest.raises(UserError, match="document 3 has 5 tokens"):
        iterator.set_state({"ordinals": [3], "offsets": [4], "next": 4, "epoch": 4})


# --- The thread ----------------------------------------------------------------------------------------------------


class FlakySource(DocumentSource):
    """Fails once at its fifth document."""

    def __init__(self):
        self.failed = False

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 4 and not self.failed:
            self.failed = True
            raise UserError("shard.bin: gone")
        return make_document(index + 1, 5)


@pytest.mark.parametrize("prefetch", (0, 1, 4))
def test_errors_surface_where_they_belong_and_lose_nothing(prefetch):
    iterator = make_iterator(lanes_of(FlakySource(), "segment", lanes=1, segments=2, length=4), prefetch)
    firsts = [next(iterator).tokens_BST[0, 0, 0] for _ in range(2)]
    state = iterator.get_state()
    with pytest.raises(UserError, match=r"shard\.bin: gone"):
        next(iterator)
    assert iterator.get_state() == state
    firsts += [next(iterator).tokens_BST[0, 0, 0] for _ in range(2)]
    assert firsts == [100, 300, 500, 700]
    iterator.close()


def test_close_ends_the_thread():
    before = threading.active_count()
    iterator = make_iterator(lanes_of(TINY, "packed", lanes=2, segments=2, length=4), 2)
    next(iterator)
    assert threading.active_count() == before + 1
    iterator.close()
    iterator.close()
    assert threading.active_count() == before
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


def test_an_abandoned_iterator_ends_its_thread():
    before = threading.active_count()
    iterator = make_iterator(lanes_of(TINY, "packed", lanes=2, segments=2, length=4), 2)
    next(iterator)
    del iterator
    assert threading.active_count() == before


@pytest.mark.parametrize("ending", ("", "iterator.close()"))
def test_the_interpreter_exits_quietly(ending):
    program = f"""
import numpy as np
from lm2_jax.data.documents import Document, DocumentSource
from lm2_jax.data.lanes import LaneDataset, Lanes, make_iterator
class Documents(list, DocumentSource):
    pass
source = Documents([Document(np.arange(9, dtype=np.int32), np.zeros(9, bool))])
iterator = make_iterator(LaneDataset(source, source.ordinals(0), Lanes(2, 2, 4, "packed")), 2)
next(iterator)
{ending}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
