"""Places of tokens: texts in rows, rows in segments, and what of them is kept between calls.

A call's input is texts, one or several a row (`read_texts`), cut where segments end (`cut_at_segment_ends`). A `Layout`
places new entries in their rows' unfinished segments, and an `LM2Cache` keeps those until the next call.

Axes: B rows, C columns of the input, Q new entries of a row, L entries of its unfinished segment, D hidden size,
H heads, G kv heads, K head width, N memory slots, M slot width, W convolution width, R some of the rows, P columns in
the order in which they are read.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

# ---------- State between calls --------------------------------------------------------------------------------------


class Block(NamedTuple):
    """State of one block between calls. None stands for nothing yet, and for what a block does not have.

    Attributes:
      keys, values: of the unfinished segment's entries [B,L,G,K]; rotated, but with a window as they are.
      edge_keys, edge_values: with a window, those of sinks and of tokens before the segment (attention_lm2.py).
      tail: what the convolution looks back on [B,W-1,D].
      inputs: the entries' normalised inputs [B,L,D], from which the bank will be written.
      bank: as the segments before left it, float32 [B,N,M]; armt and delta: of their own shapes.
      bank_keys, bank_values: its read projections [B,N,D], the same for a whole segment.
    """

    keys: Tensor | None = None
    values: Tensor | None = None
    edge_keys: Tensor | None = None
    edge_values: Tensor | None = None
    tail: Tensor | None = None
    inputs: Tensor | None = None
    bank: Tensor | None = None
    bank_keys: Tensor | None = None
    bank_values: Tensor | None = None


class LM2Cache(Cache):
    """Memory and unfinished segment of every row. The model fills an empty cache.

    Attributes:
      seen: columns of input so far, padding included.
      rows: B, or -1 before the first call.
      read: tokens of the text so far: one number while the rows are in step, else one for each row.
      segment_length: T of the model that fills it.
      memory: rmt's memory tokens [B,N,D], else None.
      blocks: state of each block.
    """

    is_linear = (False,)  # transformers: generate() may be given tokens that the cache has seen
    is_croppable = False

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.seen: int = 0
        self.rows: int = -1
        self.read: list[int] = [0]
        self.segment_length: int = 1
        self.memory: Tensor | None = None
        self.blocks: list[Block] = []

    def __len__(self) -> int:
        return len(self.blocks)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of input so far, padding included."""
        return self.seen

    @property
    def batch_size(self) -> int:
        """B, or -1 before the first call."""
        return self.rows

    def crop(self, tokens_to_remove: int) -> None:
        """Not possible: a segment that has been written cannot be unwritten. Raises NotImplementedError."""
        raise NotImplementedError("LM2 cannot unread text, so no assisted decoding: keep a copy.deepcopy of the cache")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replaces row b by row beam_idx[b]."""
        if self.blocks:
            self._take_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows that indices (numbers or a mask) select."""
        if self.blocks:
            self._take_rows(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row `repeats` times."""
        if self.blocks:
            self._take_rows(torch.arange(self.rows).repeat_interleave(repeats))

    def _take_rows(self, index_R: Tensor) -> None:
        def taken(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.index_select(0, index_R.to(x.device))

        self.memory = taken(self.memory)
        self.blocks = [Block(*map(taken, block)) for block in self.blocks]
        self.rows = len(index_R)
        if len(self.read) > 1:
            self.read = [self.read[row] for row in index_R.tolist()]
            self.fall_in_step()

    def fall_in_step(self) -> None:
        """Lets ragged rows that have read equally many tokens be in step, with no more entries than they fill."""
        if len(set(self.read)) > 1:
            return
        self.read = self.read[:1]
        entries = held_after(self.read[0], self.segment_length) + (0 if self.memory is None else self.memory.shape[1])

        def filled(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[:, :entries]

        self.blocks = [
            b._replace(keys=filled(b.keys), values=filled(b.values), inputs=filled(b.inputs)) for b in self.blocks
        ]


def held_after(read: int, segment_length: int) -> int:
    """Tokens that an unfinished segment holds after `read` of a text; row b's fill its first entries.

    0 only before a text's first token, else 1 to T: memory is written, and the next segment begun, when the token after
    a full segment arrives.
    """
    return (read - 1) % segment_length + 1 if read else 0


def given(cache: LM2Cache | None, past_key_values: LM2Cache | None) -> LM2Cache:
    """The cache under its name since transformers 5.24 or the one before; an empty one if there is none."""
    return next((c for c in (cache, past_key_values) if c is not None), LM2Cache())


# ---------- Rows -----------------------------------------------------------------------------------------------------


Rows = slice | Tensor  # all rows, or the numbers of some
ALL = slice(None)


def rows_where(chosen: list[bool], device: torch.device) -> Rows | None:
    """The rows for which chosen is True, of which it has one for each or one for all; None if there is none."""
    if all(chosen):
        return ALL
    numbers = [row for row, is_chosen in enumerate(chosen) if is_chosen]
    return torch.tensor(numbers, device=device) if numbers else None


def replace_rows(x: Tensor | None, rows: Rows, new: Tensor) -> Tensor:
    """x [B,...] with the given rows replaced by new ones [R,...]."""
    return new if isinstance(rows, slice) else x.to(new).index_copy(0, rows.to(new.device), new)


def take_entries(x: Tensor, index_BQ: Tensor) -> Tensor:
    """Takes row b's entries index_BQ[b] of x [B,_,...], [B,Q,...]."""
    return x[torch.arange(len(x), device=x.device)[:, None], index_BQ]


@dataclass
class Layout:
    """Positions of new entries in their rows' unfinished segments, the same for all blocks.

    Rows are in step until padding or documents part them; then they are ragged, and take_B and source_BL are set.

    Attributes:
      opens: rows that begin a segment with these entries; None if no row does.
      writes: those of them that have a full segment to write to memory before; with armt's memory tokens, rows whose
        segment these end.
      linked: True if the entries follow each other in the text; memory tokens do not.
      rotation_2BQ1K: of RoPE at the new entries' places in the segment, cosines and sines, float32; [2,1,...] in step.
      is_causal: True if all entries are new and unpadded: each attends to itself and those before it.
      seen_B1QU: otherwise, which keys a new entry attends to: entries of the segment, U = L, or those of
        attention_lm2.py with a window. None: to all.
      take_B: ragged: number of the Q new entries that are the row's; the others are padding that no real entry sees.
      source_BL: ragged: the entries of the segment from now on, as indices into [held entries | new ones].
      first: with sinks, rows in their text's first segment; None if no row is.
      key_rotation_2BU1K: with a window, of keys at their places relative to the segment's start.
      far_2BQ1K: with sinks, if one may be farther than max_distance, of a query that is so far away.
    """

    opens: Rows | None
    writes: Rows | None
    linked: bool
    rotation_2BQ1K: Tensor
    is_causal: bool = False
    seen_B1QU: Tensor | None = None
    take_B: Tensor | None = None
    source_BL: Tensor | None = None
    first: Rows | None = None
    key_rotation_2BU1K: Tensor | None = None
    far_2BQ1K: Tensor | None = None

    def to(self, device: torch.device) -> Layout:
        """The layout on another device. By this name accelerate moves what it gives to a block."""
        moved = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return dataclasses.replace(self, **moved)

    def append(self, held: Tensor | None, new: Tensor) -> Tensor:
        """held [B,_,...] and new [B,Q,...] entries to those of the segment from now on, [B,L,...]."""
        if held is not None and not isinstance(self.opens, slice):
            new = torch.cat([held.to(new.dtype), new], dim=1)
        return new if self.source_BL is None else take_entries(new, self.source_BL)

    def last(self, x_BCD: Tensor, count: int) -> Tensor:
        """The last `count` entries of each row of x, which ends with the Q new ones, [B,count,D]."""
        if self.take_B is None:
            return x_BCD[:, x_BCD.shape[1] - count :]
        return take_entries(x_BCD, self.take_B[:, None] + torch.arange(count, device=x_BCD.device))


# ---------- Texts: padding and documents -----------------------------------------------------------------------------


@dataclass
class Texts:
    """The R texts that a call reads: each row goes on with one, and position_ids may begin further documents.

    While it is read, each text has a row of its own.

    Attributes:
      shape: (B, C) of the input.
      total: tokens of each text; one number if all have as many.
      token_P: flat columns b·C + c of all texts' tokens, text after text; None if no column is padding and each row
        goes on with one text.
      row_R: row of the input that a text is from; None if each row has one text.
      last_B: number of each row's last text.
      fresh: for each text, True if it does not go on with what the cache has of its row.
    """

    shape: tuple[int, int]
    total: list[int]
    token_P: Tensor | None = None
    row_R: Tensor | None = None
    last_B: Tensor | None = None
    fresh: tuple[bool, ...] = (False,)

    @property
    def rows(self) -> int:
        """R."""
        return self.shape[0] if self.row_R is None else len(self.row_R)

    def order(self, runs: list[Run]) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Returns the flat column that each text reads p-th [R,P], and where in [R·P] each column is read [B,C].

        R·P stands for padding, which is not read. (None, None) if every row is read as it stands.
        """
        if self.token_P is None and (len(runs) < 2 or len(runs[0].held) == 1):
            return None, None
        (B, C), R = self.shape, self.rows
        token_P = torch.arange(B * C) if self.token_P is None else self.token_P
        total_R1 = torch.tensor(self.total).expand(R)[:, None]
        next_R1 = total_R1.cumsum(dim=0) - total_R1  # index into token_P of each text's next token
        read = [(next_R1[:, :0], torch.empty(R, 0, dtype=torch.bool))]
        for run in runs:
            entry_Q, take_R1 = torch.arange(run.width), torch.tensor(run.take)[:, None]
            read.append((next_R1 + entry_Q, (entry_Q < take_R1).expand(R, -1)))
            next_R1 = next_R1 + take_R1
        index_RP, is_real_RP = (torch.cat(parts, dim=1) for parts in zip(*read, strict=True))
        order_RP = token_P[index_RP.clamp(max=len(token_P) - 1)]
        back_N = torch.full((B * C,), order_RP.numel())
        back_N[order_RP[is_real_RP]] = is_real_RP.flatten().nonzero()[:, 0]
        return order_RP, back_N.view(B, C)


def read_texts(x_BCD: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, continues: bool) -> Texts:
    """Finds the texts of embeddings x. Raises ValueError for a mask or positions that the model cannot read.

    continues: True if earlier calls have begun texts.
    """
    B, C, _ = x_BCD.shape
    real_BC, position_BC, checks = None, None, []
    if attention_mask is not None:
        shape = tuple(attention_mask.shape)
        if len(shape) != 2 or shape[0] != B or shape[1] < C:
            raise ValueError(f"attention_mask {shape} should be [{B}, {C}], or [{B}, columns seen so far + {C}]")
        real_BC = attention_mask[:, shape[1] - C :] != 0
        checks.append(real_BC.all())
    if position_ids is not None:
        if tuple(position_ids.shape) not in ((B, C), (1, C)):
            raise ValueError(f"position_ids {tuple(position_ids.shape)} should be [{B}, {C}]")
        position_BC = position_ids.expand(B, C)
        checks.append((position_BC.diff(dim=1) == 1).all())
        if continues:
            checks.append((position_BC[:, :1] != 0).all())
    rows_as_they_stand = Texts((B, C), [C])
    if not checks:
        return rows_as_they_stand
    none_is_special = torch.stack([check.to(x_BCD.device) for check in checks]).all()
    if torch.compiler.is_compiling():
        torch._assert_async(none_is_special, "a compiled LM2 reads neither padding nor several documents in a row")
        return rows_as_they_stand
    return rows_as_they_stand if none_is_special else _parted_texts(real_BC, position_BC, (B, C))


def _parted_texts(real_BC: Tensor | None, position_BC: Tensor | None, shape: tuple[int, int]) -> Texts:
    """Texts of rows with padding, or in which documents begin; worked out on the CPU."""
    B, C = shape
    token_P = torch.arange(B * C) if real_BC is None else real_BC.flatten().nonzero()[:, 0].cpu()
    row_P = token_P // C
    is_first_P = row_P.diff(prepend=row_P.new_tensor([-1])) != 0
    position_P = None if position_BC is None else position_BC.flatten().cpu()[token_P]
    is_zero_P = torch.zeros_like(is_first_P) if position_P is None else position_P == 0
    if position_P is not None and not (is_first_P | is_zero_P | (position_P == position_P.roll(1) + 1)).all():
        raise ValueError("position_ids of tokens should be 0, where a document begins, or one more than the one before")
    begins_P = is_zero_P & ~is_first_P
    texts_B = 1 + row_P[begins_P].bincount(minlength=B)
    R, last_B = B + int(begins_P.sum()), texts_B.cumsum(dim=0) - 1
    total = (row_P + begins_P.cumsum(dim=0)).bincount(minlength=R).tolist()
    fresh_B = torch.zeros(B, dtype=torch.bool).index_fill(0, row_P[is_zero_P & is_first_P], True)
    fresh_R = torch.ones(R, dtype=torch.bool).index_copy(0, last_B - texts_B + 1, fresh_B)
    return Texts(
        shape,
        total=total[:1] if len(set(total)) == 1 else total,
        token_P=token_P,
        row_R=torch.arange(B).repeat_interleave(texts_B) if R > B else None,
        last_B=last_B,
        fresh=tuple(fresh_R.tolist()),
    )


class Run(NamedTuple):
    """New tokens that lie in one segment of each row; lists have one number for rows in step.

    Attributes:
      start: tokens of the text before that segment.
      held: tokens of the unfinished segment before, 0 to T.
      take: number of new ones, which begin the next segment if the unfinished one is full.
    """

    start: list[int]
    held: list[int]
    take: list[int]

    @property
    def width(self) -> int:
        """Q, the largest number of new tokens."""
        return max(self.take)


def cut_at_segment_ends(read: list[int], total: list[int], segment_length: int) -> tuple[list[Run], list[int]]:
    """Cuts `total` new tokens of each row where its segments end. Returns the runs, and what is read after them."""
    T, rows = segment_length, max(len(read), len(total))
    read, total = (numbers * (rows // len(numbers)) for numbers in (read, total))
    runs = []
    while any(total):
        held = [held_after(n, T) for n in read]
        take = [min(n, T - h % T) for h, n in zip(held, total, strict=True)]
        runs.append(Run([n - h % T for h, n in zip(held, read, strict=True)], held, take))
        read = [n + new for n, new in zip(read, take, strict=True)]
        total = [n - new for n, new in zip(total, take, strict=True)]
    return runs, read
