"""Documents whose tokens say where they belong, and lanes of them."""

import grain
import numpy as np

from lm2_jax.data.documents import Document, DocumentSource
from lm2_jax.data.lanes import LaneDataset, Lanes

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


# The documents of lm2_jax/data/lanes.py's docstring: 6, 3, 7, 2, 4, 5 positions; c answers with its tokens 1 and 7.
TINY = [make_document(n, length, a) for n, length, a in ((1, 7, ()), (2, 4, ()), (3, 8, (1, 7)), (4, 3, ()))]
TINY += [make_document(5, 5), make_document(6, 6)]
