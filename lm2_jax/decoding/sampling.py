"""Generation: prompts of any length stream through memory, then tokens are sampled one at a time.

Every row of a batch has its own segment clock. Keys and values are cached for the unfinished segment only; when a row
has filled its segment and reads on, its memory is written and its next segment begins. So neither the cost per token
nor the state grows with the text, and the logits are those of `segments.run_segments` over all of it. A prompt is read
in windows of `WINDOW` tokens, so what reading it holds does not grow with T either.

Parameters are taken as they are or, for speed, as `placement.prepare` returns them.

Axes: B rows, Q tokens at a time, T tokens in a segment, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm2_jax.common.errors import UserError
from lm2_jax.decoding.placement import lay_out, mesh_of, prepare
from lm2_jax.model.decode import (
    DecodeState,
    append_tokens,
    finish_segment,
    init_decode_state,
    refresh_memory_cache,
    restart,
)
from lm2_jax.model.decoder import Decoder

WINDOW = 256  # tokens of a prompt that a row reads at once
OnToken = Callable[[int, int], bool | None]
_DRAW = zlib.crc32(b"lm2_jax.decoding.draw")  # name of the random stream: a change would change what seeds give

# --- State in, state out -------------------------------------------------------------------------------------------


def start(model: Decoder, params: Any, batch_size: int, segment_length: int | None = None) -> DecodeState:
    """The state of `batch_size` rows at a document's start. segment_length: T; None: that of the run's last stage.

    Raises UserError if the memory kind looks ahead.
    """
    if not model.kind.is_causal:
        raise UserError(
            f"memory.kind {model.spec.memory.kind}: cannot generate; its tokens look ahead to the end of their "
            "segment, so there is no next token to ask for before the segment is complete"
        )
    params = prepare(model, params)
    with mesh_of(params):
        return initial_state(model, params, batch_size, segment_length or model.spec.segment_length)


def with_memory_cache(model: Decoder, params: Any, state: DecodeState) -> DecodeState:
    """Completes a state that was saved without its memory cache."""
    params = prepare(model, params)
    with mesh_of(params):
        return _with_memory_cache(model, params, state)


def advance(
    model: Decoder, params: Any, tokens_BQ: np.ndarray, count_B: np.ndarray, state: DecodeState
) -> tuple[jax.Array, DecodeState]:
    """Reads up to Q tokens a row, which fit into the row's segment or, if that is full, into its next one.

    Args:
      tokens_BQ: token ids, each row padded on its right.
      count_B: how many of a row are not padding.
      state: given up: its arrays are written in place.

    Returns:
      float32 logits [B,V] of the token after each row's last (without meaning for rows that read nothing), the state.
    """
    params, count_B = prepare(model, params), np.asarray(count_B, np.int32)
    full_B = (np.asarray(state.count_B) == state.segment_length) & (count_B > 0)
    with mesh_of(params):
        if full_B.any():
            state = _finish(model, params, full_B, state)
        return append(model, params, np.asarray(tokens_BQ, np.int32), count_B, state)


def restart_rows(model: Decoder, params: Any, rows_B: np.ndarray, state: DecodeState) -> DecodeState:
    """Puts the selected rows at a document's start. state: given up, as by `advance`."""
    params = prepare(model, params)
    with mesh_of(params):
        return _restart(model, params, np.asarray(rows_B, bool), state)


def read(
    model: Decoder, params: Any, prompts: Sequence[Sequence[int]], state: DecodeState
) -> tuple[jax.Array, DecodeState]:
    """Streams a prompt into each row, a window at a time.

    Returns float32 logits [B,V] of the next token, and the state. Raises UserError for an empty prompt or an id that is
    not in the vocabulary.
    """
    rests, params = check_prompts(prompts, model.spec.model.vocab_size), prepare(model, params)
    B, Q = len(rests), min(state.segment_length, WINDOW)
    if len(state.count_B) != B:
        raise ValueError(f"{B} prompts for a state of {len(state.count_B)} rows")
    with mesh_of(params):
        state = jax.tree.map(jnp.copy, state)
        logits_BV = jnp.zeros((B, model.spec.model.vocab_size))
    while any(map(len, rests)):
        tokens_BQ, count_B = next_window(rests, state, Q)
        rests = [rest[count:] for rest, count in zip(rests, count_B, strict=True)]
        new_BV, state = advance(model, params, tokens_BQ, count_B, state)
        with mesh_of(params):
            logits_BV = jnp.where(count_B[:, None] > 0, new_BV, logits_BV)
    return logits_BV, state


def next_window(unread: Sequence[np.ndarray], state: DecodeState, Q: int) -> tuple[np.ndarray, np.ndarray]:
    """Up to Q tokens of each row, as many as `advance` reads at once [B,Q], padded; and how many [B]."""
    tokens_BQ, count_B = np.zeros((len(unread), Q), np.int32), np.zeros(len(unread), np.int32)
    T = state.segment_length
    for row, (rest, before) in enumerate(zip(unread, np.asarray(state.count_B), strict=True)):
        chunk = rest[: min(Q, T - before % T)]  # a full segment makes room for T
        tokens_BQ[row, : len(chunk)], count_B[row] = chunk, len(chunk)
    return tokens_BQ, count_B


# --- Drawing tokens ------------------------------------------------------------------------------------------------


def generate(
    model: Decoder, params: Any, prompts: Sequence[Sequence[int]], *, state: DecodeState | None = None, **options: Any
) -> list[list[int]]:
    """Continuations of prompts: the token lists of `decode`, from a document's start unless a state is given."""
    state = start(model, params, len(prompts)) if state is None else state
    return decode(model, params, prompts, state, **options)[0]


@dataclasses.dataclass(frozen=True)
class DecodeOptions:
    """Settings of a continuation. Raises UserError for values that make no sense.

    Attributes:
      max_new_tokens: 0: only read.
      temperature: 0: the most likely token.
      top_k: sample from the k most likely tokens.
      top_p: sample from the fewest most likely tokens that together have at least this probability.
      stop_ids: tokens that end a row; they are neither returned nor read.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    stop_ids: Collection[int] = ()

    def __post_init__(self) -> None:
        problems = []
        if self.max_new_tokens < 0:
            problems.append(f"max_new_tokens: found {self.max_new_tokens}; give 0 (only read) or more")
        if not 0 <= self.temperature < float("inf"):
            problems.append(f"temperature: found {self.temperature}; give 0 (the most likely token) or more")
        if self.top_k is not None and self.top_k < 1:
            problems.append(f"top_k: found {self.top_k}; give 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            problems.append(f"top_p: found {self.top_p}; give a probability above 0 and up to 1")
        if problems:
            raise UserError("\n".join(problems))


def decode(
    model: Decoder,
    params: Any,
    prompts: Sequence[Sequence[int]],
    state: DecodeState,
    *,
    seed: int | Sequence[int] = 0,
    on_token: OnToken | None = None,
    **options: Any,
) -> tuple[list[list[int]], DecodeState]:
    """Reads a prompt in each row and continues it. A row's continuation does not depend on the rows beside it.

    Args:
      prompts: token ids, of any lengths.
      state: from `start`, or from an earlier call.
      seed: row b draws from seed + b, or from seed[b], and the number of tokens read before.
      on_token: called with (row, token) for every token; True ends the row, and that token is not read.
      options: fields of `DecodeOptions`; max_new_tokens is required.

    Returns:
      the new tokens of each row, and the state after all that was read, the new tokens included.
      Raises UserError for an option that makes no sense, and as `read` does.
    """
    wanted, params = DecodeOptions(**options), prepare(model, params)
    logits_BV, state = read(model, params, prompts, state)
    seeds = [seed + row for row in range(len(prompts))] if isinstance(seed, int) else seed
    seed_B = np.array([seed % 2**32 for seed in seeds], np.uint32)
    written: list[list[int]] = [[] for _ in prompts]
    active_B = np.ones(len(prompts), bool)
    for _ in range(wanted.max_new_tokens):
        token_B = next_tokens(logits_BV, seed_B, state.read_B, wanted)
        for row in np.flatnonzero(active_B).tolist():
            token = int(token_B[row])
            if token in wanted.stop_ids:
                active_B[row] = False
                continue
            written[row].append(token)
            if on_token is not None and on_token(row, token):
                active_B[row] = False
        if not active_B.any():
            break
        logits_BV, state = advance(model, params, token_B[:, None], active_B, state)
    return written, state


def next_tokens(logits_BV: jax.Array, seed_B: np.ndarray, read_B: jax.Array, wanted: DecodeOptions) -> np.ndarray:
    """The next token of each row [B]: the most likely one, or one drawn from the row's seed and what it has read."""
    cut = wanted.top_k or jnp.inf, wanted.top_p or jnp.inf
    with mesh_of(logits_BV):
        if wanted.temperature == 0:
            return np.asarray(jnp.argmax(logits_BV, axis=-1))
        return np.asarray(draw(logits_BV, seed_B, read_B, wanted.temperature, *cut))


@jax.jit
def draw(
    logits_BV: jax.Array,
    seed_B: jax.Array,
    index_B: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
) -> jax.Array:
    """Samples a token a row [B], from softmax(logits / temperature) cut to its top k and its top p (inf: not cut).

    A row's randomness comes from its seed and its index alone.
    """
    order_BV = jnp.argsort(-logits_BV, axis=-1)  # of equal logits, the lowest id first
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1) / temperature
    kept_BV = jnp.where(jnp.arange(logits_BV.shape[-1]) < top_k, sorted_BV, -jnp.inf)
    probability_BV = jax.nn.softmax(kept_BV, axis=-1)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    kept_BV = jnp.where(before_BV < top_p, kept_BV, -jnp.inf)

    def one(seed: jax.Array, index: jax.Array, logits_V: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _DRAW), index)
        return jax.random.categorical(key, logits_V)

    rank_B = jax.vmap(one)(seed_B, index_B, kept_BV)
    return jnp.take_along_axis(order_BV, rank_B[:, None], axis=-1)[:, 0]


# --- Compiled programs: few for each model and batch size ----------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def initial_state(model: Decoder, params: Any, batch_size: int, segment_length: int) -> DecodeState:
    """The compiled part of `start`."""
    memory = model.init_memory(batch_size, params)
    state = model.apply({"params": params}, memory, batch_size, segment_length, method=init_decode_state)
    return lay_out(model, state)


@functools.partial(jax.jit, static_argnums=0)
def _with_memory_cache(model: Decoder, params: Any, state: DecodeState) -> DecodeState:
    return lay_out(model, model.apply({"params": params}, state, method=refresh_memory_cache))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def append(
    model: Decoder, params: Any, tokens_BQ: jax.Array, count_B: jax.Array, state: DecodeState
) -> tuple[jax.Array, DecodeState]:
    """Does what `advance` does where every row's tokens fit into its segment."""
    hidden_BQD, state = model.apply({"params": params}, tokens_BQ, count_B, state, method=append_tokens)
    last_B11 = jnp.maximum(count_B - 1, 0)[:, None, None]
    hidden_BD = jnp.take_along_axis(hidden_BQD, last_B11, axis=1)[:, 0]
    return model.apply({"params": params}, hidden_BD, method=Decoder.project), lay_out(model, state)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _finish(model: Decoder, params: Any, rows_B: jax.Array, state: DecodeState) -> DecodeState:
    return lay_out(model, model.apply({"params": params}, rows_B, state, method=finish_segment))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _restart(model: Decoder, params: Any, rows_B: jax.Array, state: DecodeState) -> DecodeState:
    return lay_out(model, model.apply({"params": params}, rows_B, state, method=restart))


# --- What a caller can get wrong -----------------------------------------------------------------------------------


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> list[np.ndarray]:
    """The prompts as arrays. Raises UserError for an empty one, or an id that is not in the vocabulary."""
    arrays = [np.asarray(prompt) for prompt in prompts]
    for row, array in enumerate(arrays):
        if not array.size:
            raise UserError(f"prompt {row} is empty; generation needs a token to continue")
        wrong = array[(array < 0) | (array >= vocab_size)]
        if wrong.size:
            raise UserError(f"prompt {row} holds token id {wrong[0]}, but the model has ids below {vocab_size}")
    return arrays
