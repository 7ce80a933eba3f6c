"""One window of text: what the data hands to the model, the loss and the evaluations.

Axes: B lanes (stateful batch rows), S segments, T tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import numpy as np

Array = Any  # np.ndarray, jax.Array, or shapes of them


@dataclasses.dataclass(frozen=True)
class Batch:
    """S consecutive segments of every lane: NumPy arrays until they are on devices, then a pytree (parallel/mesh.py).

    Attributes:
      tokens_BST: int32, the inputs; 0 for padding.
      document_BST: int32 document ids: 0 for padding, then 1, 2, ... the documents inside a segment in order.
      reset_BS: bool, the segment's first document starts here: it finds the initial memory.
      targets_BST: int32, the token after each input in its document; None where nothing is predicted.
      answers_BST: bool, the target is part of an answer; None where nothing is predicted.
      packed: static; whether document ids above 1 can occur. False saves the reads of the initial bank.
    """

    tokens_BST: Array
    document_BST: Array
    reset_BS: Array
    targets_BST: Array = None
    answers_BST: Array = None
    packed: bool = False

    @classmethod
    def zeros(cls, num_lanes: int, segments: int, segment_length: int, packed: bool = False) -> Self:
        """A window of padding alone."""
        shape = (num_lanes, segments, segment_length)
        return cls(
            tokens_BST=np.zeros(shape, np.int32),
            document_BST=np.zeros(shape, np.int32),
            reset_BS=np.zeros(shape[:2], bool),
            targets_BST=np.zeros(shape, np.int32),
            answers_BST=np.zeros(shape, bool),
            packed=packed,
        )

    def inputs(self) -> Self:
        """The batch without targets and answers: all that the model reads."""
        return dataclasses.replace(self, targets_BST=None, answers_BST=None)
