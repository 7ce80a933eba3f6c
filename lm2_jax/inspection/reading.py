"""A trace of a model's memory while it reads a text, segment by segment.

Axes: B lanes, S segments, T tokens, K tokens at the end, N slots, M slot width, F numbers of a sketch; L blocks that
read, or banks (one, where a memory passes through all blocks).
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lm2_jax.common.errors import UserError
from lm2_jax.model.block import gate_name
from lm2_jax.model.decoder import Decoder
from lm2_jax.model.memory.base import Memory


@dataclasses.dataclass(frozen=True)
class MemoryTrace:
    """Trace of one text. Attention weights are means over heads.

    Attributes:
      num_tokens: of the text.
      segment_length: T.
      last_ids_K: the last tokens.
      read_LKN: attention of the last tokens to the slots; the rest to 1 goes to other keys.
      written_LK: attention of the slots to the last tokens when memory was written, mean over slots, times the
        segment's tokens: 1 is an even share. None where slots do not attend to tokens.
      read_LSN: attention of a segment's tokens to the slots, mean over its tokens.
      change_LSN: |slot after the segment - before| / |before|; 1 where an empty slot was filled.
      norm_LSN: |slot| after the segment.
      gates: input, forget, output: mean of each gate in a segment, [L,S]; empty without gates.
      slots_LNM: the memory at the end.
      traces_SF: the memory after every segment (see `sketch`).
    """

    num_tokens: int
    segment_length: int
    last_ids_K: np.ndarray
    read_LKN: np.ndarray
    written_LK: np.ndarray | None
    read_LSN: np.ndarray
    change_LSN: np.ndarray
    norm_LSN: np.ndarray
    gates: dict[str, np.ndarray]
    slots_LNM: np.ndarray
    traces_SF: np.ndarray

    @property
    def segment_starts(self) -> list[int]:
        """Indices of those of the last K tokens that begin a segment."""
        first = self.num_tokens - len(self.last_ids_K)  # number of tokens before them
        return [k for k in range(len(self.last_ids_K)) if (first + k) % self.segment_length == 0]


@struct.dataclass
class SegmentTrace:
    """Trace of one segment, for B lanes.

    Attributes:
      read_LBTN: attention of the tokens to the slots.
      written_LBNT: attention of the slots to the tokens when memory was written; None where they do not attend.
      change_LBN: |slot after - before| / |before|; 1 where an empty slot was filled.
      norm_LBN: |slot| after.
      gates: mean of each gate [L], by name.
      logits_BTV: of the next tokens.
    """

    read_LBTN: jax.Array
    written_LBNT: jax.Array | None
    change_LBN: jax.Array
    norm_LBN: jax.Array
    gates: dict[str, jax.Array]
    logits_BTV: jax.Array


def check_memory(model: Decoder) -> None:
    """Raises UserError if the model has no memory."""
    if model.as_slots(model.init_memory(1)) is None:
        raise UserError(
            f"memory.kind {model.spec.memory.kind}: there is no memory to look into; give a run of another kind"
        )


def read_text(model: Decoder, params: Any, ids_n: np.ndarray, last: int = 48) -> MemoryTrace:
    """Reads a text from a fresh memory, in segments of the length the model was trained with.

    Args:
      ids_n: token ids; any number of them.
      last: K, how many tokens at the end are traced one by one; fewer if the text is shorter.

    Raises UserError if the text holds no token, or the model has no memory.
    """
    check_memory(model)
    if not len(ids_n):
        raise UserError("the text holds no token; give one that does")
    T = model.spec.segment_length
    S, K = -(-len(ids_n) // T), min(last, len(ids_n))
    tokens_ST, document_ST = np.zeros((S, T), np.int32), np.zeros((S, T), np.int32)
    tokens_ST.flat[: len(ids_n)], document_ST.flat[: len(ids_n)] = ids_n, 1

    memory, by_segment, by_token = model.init_memory(1, params), defaultdict(list), defaultdict(list)
    for s in range(S):
        memory, here = trace_segment(model, params, tokens_ST[s : s + 1], memory, document_ST[s : s + 1])
        count = int(document_ST[s].sum())
        read_LtN = here.read_LBTN[:, 0, :count]
        by_segment["read"].append(read_LtN.mean(1))
        by_segment["change"].append(here.change_LBN[:, 0])
        by_segment["norm"].append(here.norm_LBN[:, 0])
        by_segment["trace"].append(sketch(np.asarray(model.as_slots(memory))))
        for name, gate_L in here.gates.items():
            by_segment[f"{name} gate"].append(gate_L)
        if s * T + count > len(ids_n) - K:
            by_token["read"].append(read_LtN)
            if here.written_LBNT is not None:
                by_token["written"].append(count * here.written_LBNT[:, 0, :, :count].mean(1))
    return MemoryTrace(
        num_tokens=len(ids_n),
        segment_length=T,
        last_ids_K=np.asarray(ids_n[-K:]),
        read_LKN=np.concatenate(by_token["read"], axis=1)[:, -K:],
        written_LK=np.concatenate(by_token["written"], axis=1)[:, -K:] if by_token["written"] else None,
        read_LSN=np.stack(by_segment["read"], axis=1),
        change_LSN=np.stack(by_segment["change"], axis=1),
        norm_LSN=np.stack(by_segment["norm"], axis=1),
        gates={
            name.removesuffix(" gate"): np.stack(gates, axis=1)
            for name, gates in by_segment.items()
            if name.endswith(" gate")
        },
        slots_LNM=np.asarray(model.as_slots(memory)[:, 0]),
        traces_SF=np.stack(by_segment["trace"]),
    )


@functools.partial(jax.jit, static_argnums=0)
def trace_segment(
    model: Decoder, params: Any, tokens_BT: jax.Array, memory: Memory, document_BT: jax.Array | None = None
) -> tuple[Memory, SegmentTrace]:
    """Reads one segment; returns the memory after it, and its trace. The model must have a memory."""
    (logits_BTV, after), sown = model.apply(
        {"params": params}, tokens_BT, memory, document_BT=document_BT, mutable=["gates", "intermediates"]
    )
    read_LBTN, write_LBNT = model.kind.attention_to_slots(sown["intermediates"])
    before_LBNM, slots_LBNM = model.as_slots(memory), model.as_slots(after)
    before_LBN, after_LBN = (jnp.linalg.norm(x, axis=-1) for x in (before_LBNM, slots_LBNM))
    base_LBN = jnp.where(before_LBN > 0, before_LBN, after_LBN)
    trace = SegmentTrace(
        read_LBTN=read_LBTN,
        written_LBNT=write_LBNT,
        change_LBN=jnp.linalg.norm(slots_LBNM - before_LBNM, axis=-1) / jnp.maximum(base_LBN, 1e-9),
        norm_LBN=after_LBN,
        gates={gate_name(path): g_L for path, g_L in jax.tree_util.tree_leaves_with_path(sown.get("gates", {}))},
        logits_BTV=logits_BTV,
    )
    return after, trace


def sketch(slots: np.ndarray, size: int = 4096) -> np.ndarray:
    """Condenses a memory to at most `size` numbers [F] whose inner products approximate those of the memories.

    This is a count sketch: every value, with a random sign of its own, is added to a random entry, always the same.
    """
    flat = slots.ravel()
    if len(flat) <= size:
        return flat
    index, sign = _random_indices(len(flat), size)
    return np.bincount(index, weights=sign * flat, minlength=size)


@functools.lru_cache(maxsize=1)
def _random_indices(count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(size, size=count), rng.choice(np.array([-1, 1], np.int8), size=count)
