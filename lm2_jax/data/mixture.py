"""Mixtures of sources by weight."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import grain
import numpy as np

from lm2_jax.data.documents import Document, DocumentSource


class Mixture:
    """The documents of several sources, one source after the other, and the weights to read them by.

    Args:
      parts: the sources.
      weights: positive, one a source; what counts are their ratios.
    """

    def __init__(self, parts: Sequence[DocumentSource], weights: Sequence[float]) -> None:
        self._parts, self._weights = tuple(parts), tuple(weights)
        self._starts = np.cumsum([0, *map(len, parts)])
        lengths = [part.lengths for part in parts]
        self.lengths = None if any(of_part is None for of_part in lengths) else np.concatenate(lengths)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Document:
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._parts[part][index - int(self._starts[part])]

    def __repr__(self) -> str:
        parts = ", ".join(f"{weight:g} x {part!r}" for part, weight in zip(self._parts, self._weights, strict=True))
        return f"Mixture({parts})"

    def shuffled(self, seed: int) -> grain.MapDataset[int]:
        """An endless dataset of document numbers, by ordinal: a function of `seed` and the ordinal alone.

        Each source is read in an order of its own, another in each of its epochs. Each has its share of a long stretch
        of ordinals, to a hundredth of it: grain rounds weights to hundredths of the smallest.
        """
        parts = [
            grain.MapDataset.range(start, stop).seed(seed + number).shuffle().repeat(None)
            for number, (start, stop) in enumerate(itertools.pairwise(self._starts.tolist()))
        ]
        return grain.MapDataset.mix(parts, self._weights)
