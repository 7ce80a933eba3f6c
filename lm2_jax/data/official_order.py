"""The official trainer's data order: `.bin` shards cut into items, shuffled within each shard by torch's sampler.

An item is a batch: B·T consecutive tokens as [B,T] row by row, so that row b + 1 continues where row b ends, and the
last row's last target is the token after them. Every pass over a shard takes its items in the same order.

Axes: B lanes, T tokens in a segment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import grain
import numpy as np

from lm2_jax.common.errors import UserError
from lm2_jax.data.documents import BinSource

_SAMPLER_SEED = 0


class OfficialItems(BinSource):
    """The rows of the items as documents of T + 1 tokens, in the order in which the official trainer reads them.

    With boundaries `stream` and B lanes, segment i of lane b is row b of item i. Tokens after a shard's last whole item
    are dropped.

    Raises UserError for damaged shards, and for one with less than an item.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        vocab_size: int,
        batch_size: int,
        segment_length: int,
        key: str = "data.path",
    ) -> None:
        self._batch_size, self._segment_length = batch_size, segment_length
        super().__init__(paths, vocab_size, key=key)

    def ordinals(self, seed: int) -> grain.MapDataset[int]:
        """The order of reading, without end: every epoch takes the rows as they stand."""
        return grain.MapDataset.range(len(self)).repeat(None)

    def _find(self, path: Path) -> Iterator[tuple[int, int]]:
        for _ in super()._find(path):  # checks every id
            pass
        B, T = self._batch_size, self._segment_length
        count = self._check_header(path)
        if count < B * T + 1:
            raise UserError(f"{path}: {count} tokens; an item of {B} x {T} needs {B * T + 1}")
        for item in torch_permutation((count - 1) // (B * T), _SAMPLER_SEED):
            for row in range(B):
                first = (item * B + row) * T
                yield self._offset(first), self._offset(first + T + 1)


def torch_permutation(n: int, seed: int) -> list[int]:
    """Computes `torch.randperm(n, generator=torch.Generator().manual_seed(seed))` without torch, for n < 2**32 / 20.

    Fisher-Yates from the front, each swap by one 32-bit number of a Mersenne Twister.
    """
    draws = np.random.RandomState(seed).randint(0, 2**32, size=max(n - 1, 0), dtype=np.uint32).tolist()
    order = list(range(n))
    for i, draw in enumerate(draws):
        j = i + draw % (n - i)
        order[i], order[j] = order[j], order[i]
    return order
