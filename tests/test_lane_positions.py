"""Positions in the lanes that can be saved, restored and carried to other windows; the thread that reads ahead."""

import json
import subprocess
import sys
import threading

import numpy as np
import pytest
from helpers import own_lines
from lane_helpers import (
    BOUNDARIES,
    TINY,
    arrays,
    assert_same,
    concatenate,
    lanes_of,
    make_document,
    random_documents,
    take,
)

from lm2_jax.common.errors import UserError
from lm2_jax.data.documents import DocumentSource
from lm2_jax.data.lanes import make_iterator

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
    assert own_lines(done.stderr) == ""
