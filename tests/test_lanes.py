"""Lanes: exact layouts, the scheduling rule, and the order of documents."""

import numpy as np
import pytest
from lane_helpers import (
    BOUNDARIES,
    TINY,
    Documents,
    arrays,
    assert_same,
    concatenate,
    lanes_of,
    make_document,
    random_documents,
    reference,
    take,
    window_of,
)

from lm2_jax.common.errors import UserError
from lm2_jax.data.documents import DocumentSource
from lm2_jax.data.lanes import LaneDataset, Lanes, make_iterator

# --- Layouts -------------------------------------------------------------------------------------------------------


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
