"""Mixtures of sources by weight."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import grain
import numpy as np

from lm2_jax.data.documents import Document, DocumentSource


class Mixture(DocumentSource):
    """The documents of several sources, one source after the other, read in the proportion of weights.

    Args:
      sources: the sources.
      weights: positive, one a source; only their ratios count.
    """

    def __init__(self, sources: Sequence[DocumentSource], weights: Sequence[float]) -> None:
        self._sources, self._weights = tuple(sources), tuple(weights)
        self._starts = np.cumsum([0, *map(len, sources)])
        lengths = [source.lengths for source in sources]
        self.lengths = None if any(of_source is None for of_source in lengths) else np.concatenate(lengths)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Document:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._sources[number][index - int(self._starts[number])]

    def __repr__(self) -> str:
        weighted = zip(self._weights, self._sources, strict=True)
        return f"Mixture({', '.join(f'{weight:g} x {source!r}' for weight, source in weighted)})"

    def ordinals(self, seed: int) -> grain.MapDataset[int]:
        """The order of reading, without end: ordinal -> document number, a function of `seed` and the ordinal alone.

        Each source is read in an order of its own, shuffled anew in each of its epochs. Each gets its share of a long
        stretch of ordinals, to a hundredth of it: grain rounds weights to hundredths of the smallest.
        """
        orders = [
            grain.MapDataset.range(start, stop).seed(seed + number).shuffle().repeat(None)
            for number, (start, stop) in enumerate(itertools.pairwise(self._starts.tolist()))
        ]
        return grain.MapDataset.mix(orders, self._weights)
