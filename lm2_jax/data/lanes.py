"""Lanes: documents -> lanes of segments -> windows, saved and restored exactly.

B lanes (batch rows), S segments in a window, T tokens in a segment.

A lane reads one document from its first token to its last, then takes another. One rule decides which: **the next
document goes to the lane that is free first, ties to the lowest lane.** A document of n tokens has n - 1 positions:
token i is the input and token i + 1 the target. Documents a, b, c, d, ... with 6, 3, 7, 2, ... positions, 2 lanes and
segments of 4 (a dot is padding; the model's memory is reset at a `^`):

    boundaries "segment"                        boundaries "packed"
             lane 0   a a a a|a a . .|d d . .            lane 0   a a a a|a a d d|e e ...
                      ^               ^                           ^               ^
             lane 1   b b b .|c c c c|c c c .            lane 1   b b b c|c c c c|c c f ...
                      ^       ^                                   ^
                                                     document_BST   1 1 1 2|1 1 1 1|1 1 2 ...   (of lane 1)

- `segment`: a document starts at a segment's start and its tail is padded; a lane is free after the last segment.
- `packed`: documents follow each other inside a segment; a lane is free after the last position. No reset marks c: it
  starts inside a segment, where its number tells the model to keep it apart from b.
- `stream`: laid out like packed, but as one endless document: every number is 1 and nothing is reset.

The rule looks at lengths only, so the segments are the same however many of them make a window, and a place in the
stream is small: per lane its document and how far it is, and the next document to hand out. Of several processes each
follows all lanes, by lengths, and reads and lays out its own; the place is the same for all.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import grain
import numpy as np
from grain.experimental import ThreadPrefetchDatasetIterator

from lm2_jax.batch import Batch
from lm2_jax.common.errors import UserError
from lm2_jax.data.documents import Document, DocumentSource

Boundaries = Literal["segment", "packed", "stream"]


class Placement(NamedTuple):
    """A document and where it lies in its lane, counted in positions from the window's start."""

    ordinal: int
    number: int  # of the document in the source
    document: Document | None  # None: not read yet, or in another process's lane
    start: int  # negative: -start positions were read in earlier windows
    length: int  # tokens of the document

    @property
    def end(self) -> int:
        """One past its last position; beyond the window where later windows continue it."""
        return self.start + self.length - 1

    def after(self, length: int) -> Placement | None:
        """Counts from a window that starts `length` positions later; None if the document has ended by then."""
        return self._replace(start=self.start - length) if self.end > length else None


@dataclasses.dataclass(frozen=True)
class Lanes:
    """Shape of the windows, and the rule by which documents are laid into them.

    Attributes:
      num_lanes: lanes of all processes together.
      segments: segments in a window.
      segment_length: positions in a segment.
      boundaries: where documents may start; see the head of this file.
      own_lanes: this process's lanes, in the order of the rows of its windows; None: all lanes.
    """

    num_lanes: int
    segments: int
    segment_length: int
    boundaries: Boundaries
    own_lanes: Sequence[int] | None = None

    @functools.cached_property
    def rows(self) -> dict[int, int]:
        """The row of each of this process's lanes."""
        own = range(self.num_lanes) if self.own_lanes is None else self.own_lanes
        return {lane: row for row, lane in enumerate(own)}

    @property
    def window_length(self) -> int:
        """Positions of one lane in a window, S * T."""
        return self.segments * self.segment_length

    def free_at(self, placement: Placement) -> int:
        """The position at which the lane of `placement` takes its next document."""
        if self.boundaries == "segment":
            return -(-placement.end // self.segment_length) * self.segment_length
        return placement.end

    def fill(
        self, reading: Sequence[Placement | None], next_placement: Callable[[int, int], Placement | None]
    ) -> list[tuple[int, Placement]]:
        """Hands out documents until no lane is free inside the window, or none is left.

        Args:
          reading: the document that each lane is in as the window starts.
          next_placement: (lane, start) -> the next document, placed at `start` of the lane; None if none is left.

        Returns:
          All (lane, placement) that reach into the window; those of a lane in their order.
        """
        placements = [(lane, placement) for lane, placement in enumerate(reading) if placement is not None]
        free = [(self.free_at(placement) if placement else 0, lane) for lane, placement in enumerate(reading)]
        heapq.heapify(free)  # the lane that is free first on top; pairs compare, so ties go to the lowest lane
        while free[0][0] < self.window_length:
            start, lane = free[0]
            placement = next_placement(lane, start)
            if placement is None:
                break
            placements.append((lane, placement))
            heapq.heapreplace(free, (self.free_at(placement), lane))
        return placements

    def reading_after(self, placements: Sequence[tuple[int, Placement]]) -> list[Placement | None]:
        """The document that each lane is in after the window of `placements`."""
        last = dict(placements)  # of a lane's placements, the last one stays
        return [last[lane].after(self.window_length) if lane in last else None for lane in range(self.num_lanes)]

    def lay_out(self, placements: Sequence[tuple[int, Placement]]) -> Batch:
        """The window of all (lane, placement) that reach into it, in this process's lanes."""
        shape = (len(self.rows), self.window_length)
        tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        answers, filled, starts = np.zeros(shape, bool), np.zeros(shape, bool), np.zeros(shape, bool)
        for lane, placement in placements:
            if lane not in self.rows:
                continue
            row, document, start = self.rows[lane], placement.document, placement.start
            begin, end = max(start, 0), min(placement.end, self.window_length)
            tokens[row, begin:end] = document.tokens[begin - start : end - start]
            targets[row, begin:end] = document.tokens[begin - start + 1 : end - start + 1]
            answers[row, begin:end] = document.answers[begin - start + 1 : end - start + 1]
            filled[row, begin:end] = True
            starts[row, begin] = start >= 0 and self.boundaries != "stream"

        by_segment = (len(self.rows), self.segments, self.segment_length)
        starts_BST = starts.reshape(by_segment)
        reset_BS = starts_BST[:, :, 0].copy()
        # Number documents by their starts; one that continues from the lane's previous segment is number 1 without one.
        number_BST = starts_BST.cumsum(axis=-1, dtype=np.int32) + ~reset_BS[:, :, None]
        return Batch(
            tokens_BST=tokens.reshape(by_segment),
            document_BST=number_BST * filled.reshape(by_segment),
            reset_BS=reset_BS,
            targets_BST=targets.reshape(by_segment),
            answers_BST=answers.reshape(by_segment),
            packed=self.boundaries == "packed",
        )


class LaneDataset(grain.IterDataset[Batch]):
    """An endless stream of windows.

    The iterator's state is one JSON object, {"ordinals": [B], "offsets": [B], "next": n, "epoch": e}: per lane the
    document it is in (-1: none) and the positions already read of it, the next ordinal to hand out, and that one's
    epoch. It holds for any number and length of segments, so a run may resume with longer windows.

    Args:
      source: the documents; if it knows their lengths, documents in other processes' lanes are never read.
      ordinals: the order of reading: the number in `source` of each ordinal, as `DocumentSource.ordinals` gives it.
      lanes: the shape of the windows, and the lanes of this process.
    """

    def __init__(self, source: DocumentSource, ordinals: grain.MapDataset[int], lanes: Lanes) -> None:
        super().__init__(ordinals)
        self.source = source
        self.ordinals = ordinals
        self.lanes = lanes

    def __iter__(self) -> LaneIterator:
        return LaneIterator(self)

    def place(self, ordinal: int, lane: int, start: int) -> Placement:
        """Places the document `ordinal` at `start` of a lane; it is read here if its length is not known without."""
        number = self.ordinals[ordinal]
        if self.source.lengths is None:
            document = self.source[number]
            return Placement(
                ordinal, number, document if lane in self.lanes.rows else None, start, len(document.tokens)
            )
        return Placement(ordinal, number, None, start, int(self.source.lengths[number]))

    def read(self, placements: Sequence[tuple[int, Placement]]) -> list[tuple[int, Placement]]:
        """The (lane, placement) with the documents of this process's lanes, all read together."""
        unread = [n for n, (lane, p) in enumerate(placements) if p.document is None and lane in self.lanes.rows]
        read = list(placements)
        for n, document in zip(unread, self.source.get_many([read[n][1].number for n in unread]), strict=True):
            lane, placement = read[n]
            read[n] = lane, placement._replace(document=document)
        return read

    def place_next(self, ordinal: int, lane: int, start: int) -> Placement:
        """Places the first document at or after `ordinal` that has a target. Raises UserError if an epoch has none."""
        # Two epochs' worth of ordinals in a row contain one whole epoch, whatever the two shuffles.
        for candidate in range(ordinal, ordinal + 2 * len(self.source)):
            placement = self.place(candidate, lane, start)
            if placement.length >= 2:
                return placement
        raise UserError(
            f"data: none of the {len(self.source)} documents has 2 tokens or more; "
            "a document needs an input and a target"
        )


class LaneIterator(grain.DatasetIterator[Batch]):
    """The windows of a LaneDataset. If reading a document raises, the iterator stays where it was."""

    def __init__(self, dataset: LaneDataset) -> None:
        super().__init__()
        self._dataset = dataset
        self._reading: list[Placement | None] = [None] * dataset.lanes.num_lanes
        self._next = 0

    def __next__(self) -> Batch:
        """Hands out documents until no lane is free inside the window."""
        self._assert_not_closed()
        dataset, lanes, next_ordinal = self._dataset, self._dataset.lanes, self._next

        def next_placement(lane: int, start: int) -> Placement:
            nonlocal next_ordinal
            placement = dataset.place_next(next_ordinal, lane, start)
            next_ordinal = placement.ordinal + 1
            return placement

        placements = dataset.read(lanes.fill(self._reading, next_placement))
        window = lanes.lay_out(placements)
        self._reading, self._next = lanes.reading_after(placements), next_ordinal
        return window

    def get_state(self) -> dict[str, Any]:
        """The data position after the windows returned so far."""
        return {
            "ordinals": [reading.ordinal if reading else -1 for reading in self._reading],
            "offsets": [-reading.start if reading else 0 for reading in self._reading],
            "next": self._next,
            "epoch": self._next // len(self._dataset.source),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Resumes from a position saved by any LaneDataset over the same documents with as many lanes.

        Raises ValueError for another number of lanes, UserError if a document has become too short to continue in.
        """
        dataset, ordinals, offsets = self._dataset, state["ordinals"], state["offsets"]
        num_lanes = dataset.lanes.num_lanes
        if not len(ordinals) == len(offsets) == num_lanes:
            raise ValueError(
                f"the saved data position has {len(ordinals)} lanes, this run has {num_lanes}; "
                "resume with the number of lanes it was saved with"
            )
        reading: list[Placement | None] = [None] * num_lanes
        for lane, (ordinal, offset) in enumerate(zip(ordinals, offsets, strict=True)):
            if ordinal >= 0:
                reading[lane] = placement = dataset.place(ordinal, lane, -offset)
                if placement.end <= 0:
                    raise UserError(
                        f"data: document {ordinal} has {placement.length} tokens, but the saved data position is "
                        f"{offset} tokens into it; resume with the data it was saved with"
                    )
        self._reading, self._next = reading, state["next"]


def make_iterator(dataset: LaneDataset, prefetch: int) -> grain.DatasetIterator[Batch]:
    """The windows of `dataset`; a thread keeps `prefetch` of them ready (0: no thread).

    `get_state` is the position after the last window received, however far ahead the thread is; errors in the thread
    are raised by the `next` whose window they prevented. `close` ends the thread and drops the windows it made.
    """
    return _PrefetchIterator(iter(dataset), prefetch) if prefetch else iter(dataset)


class _PrefetchIterator(ThreadPrefetchDatasetIterator[Batch]):
    """Grain's iterator, closed before the interpreter exits: Grain's own destructor fails once its modules are gone."""

    def __init__(self, windows: grain.DatasetIterator[Batch], prefetch: int) -> None:
        super().__init__(windows, prefetch)
        # A finalizer also runs at interpreter exit, before the teardown; holding itself, the iterator would never die.
        weakref.finalize(self, _close, weakref.ref(self))

    def close(self) -> None:
        if not self._closed:
            super().close()


def _close(iterator: weakref.ref[_PrefetchIterator]) -> None:
    if alive := iterator():
        alive.close()
