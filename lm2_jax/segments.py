"""The recurrence: a model over the S segments of a window, memory carried from each to the next.

The bank of layer l after segment s depends only on that bank after segment s - 1 and on the block's input in segment s,
so the double loop over segments and layers may run in either order:

    segment by segment:  for s: for l: x[s], bank[l] = block[l](x[s], bank[l])     memory does not grow with S
    layer by layer:      for l: for s: x[s], bank[l] = block[l](x[s], bank[l])     weights are fetched once per window

Both give the same logits, banks and gradients. Kinds whose memory passes through all layers (rmt) allow only the first.
Axes: B lanes, S segments, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lm2_jax.batch import Batch
from lm2_jax.common.errors import UserError
from lm2_jax.model.block import mean_gates
from lm2_jax.model.decoder import Decoder, window_batch
from lm2_jax.model.memory.base import Memory
from lm2_jax.parallel.fsdp import with_logical_constraint

Schedule = Literal["auto", "segment", "layer"]


class Outputs(NamedTuple):
    """Results of a window.

    Attributes:
      hidden_BSTD: hidden states after the final norm.
      memory: after the window.
      gates: the mean of each gate over the window, by name; empty without gates.
    """

    hidden_BSTD: jax.Array
    memory: Memory
    gates: dict[str, jax.Array]


def run_segments(
    model: Decoder,
    params: Any,
    tokens_BST: jax.Array,
    memory: Memory,
    *,
    reset_BS: jax.Array | None = None,
    document_BST: jax.Array | None = None,
    schedule: Schedule = "auto",
    return_hidden: bool = False,
) -> tuple[jax.Array, Memory]:
    """Runs a window of segments.

    Args:
      params: the tree under "params".
      tokens_BST: int32 token ids.
      memory: what `model.init_memory` or the previous window returned. It is not detached here.
      reset_BS: bool, the segment's first document starts here: it finds the initial memory. None: never.
      document_BST: int32 document ids: 0 padding, 1, 2, ... the documents inside a segment in order. None: one document
        without padding.
      schedule: auto | segment | layer; auto is layer where the kind allows it.
      return_hidden: hidden states after the final norm [B,S,T,D] instead of logits, to project them in chunks.

    Returns:
      float32 logits [B,S,T,V] (or hidden states), and the memory after the window.
    """
    outputs = run_batch(model, params, window_batch(tokens_BST, document_BST, reset_BS), memory, schedule=schedule)
    if return_hidden:
        return outputs.hidden_BSTD, outputs.memory
    return model.apply({"params": params}, outputs.hidden_BSTD, method=Decoder.project), outputs.memory


def run_batch(
    model: Decoder,
    params: Any,
    batch: Batch,
    memory: Memory,
    *,
    schedule: Schedule = "auto",
    dropout_key: jax.Array | None = None,
) -> Outputs:
    """Runs the window that `batch` holds; see `run_segments`. dropout_key: of a training step; None: no dropout."""

    def window(batch: Batch, memory: Memory, dropout_key: jax.Array | None) -> tuple[jax.Array, Memory, Any]:
        (hidden_BSTD, memory), sown = model.apply(
            {"params": params},
            batch,
            memory,
            deterministic=dropout_key is None,
            rngs=None if dropout_key is None else {"dropout": dropout_key},
            method=Decoder.window,
            mutable=["gates"],
        )
        return hidden_BSTD, memory, sown.get("gates", {})

    def segment(memory: Memory, inputs: tuple[Batch, Any]) -> tuple[Memory, tuple[jax.Array, Any]]:
        batch, dropout_key = inputs
        hidden_B1TD, memory, gates = window(jax.tree.map(lambda a: a[:, None], batch), memory, dropout_key)
        return memory, (hidden_B1TD[:, 0], gates)

    batch = batch.inputs()
    if choose_schedule(model, schedule) == "layer":
        hidden_BSTD, memory, gates = window(batch, memory, dropout_key)
    else:
        body = jax.checkpoint(segment, prevent_cse=False) if model.spec.recomputes_segments else segment
        by_segment = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), batch)
        keys_S = None if dropout_key is None else jax.random.split(dropout_key, batch.tokens_BST.shape[1])
        memory, (hidden_SBTD, gates) = jax.lax.scan(body, memory, (by_segment, keys_S), unroll=model.spec.unroll)
        hidden_BSTD = jnp.moveaxis(hidden_SBTD, 0, 1)
    hidden_BSTD = with_logical_constraint(hidden_BSTD, "batch", None, "tokens", "activation")
    return Outputs(hidden_BSTD, memory, mean_gates(gates))


def choose_schedule(model: Decoder, schedule: Schedule) -> Literal["segment", "layer"]:
    """The schedule to run, with `auto` resolved. Raises UserError if the kind does not allow it."""
    if schedule == "auto":
        return "layer" if model.kind.supports_layer_schedule else "segment"
    if schedule == "layer" and not model.kind.supports_layer_schedule:
        raise UserError(f"schedule layer: memory.kind {model.spec.memory.kind} allows segment only")
    return schedule
