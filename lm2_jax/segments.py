"""The recurrence: a model over the S segments of a window, memory carried from each to the next.

The bank of layer l after segment s depends only on that bank after segment s - 1 and on the block's input in segment s,
so the double loop over segments and layers may run in either order:

    segment by segment:  for s: for l: x[s], bank[l] = block[l](x[s], bank[l])     memory does not grow with S
    layer by layer:      for l: for s: x[s], bank[l] = block[l](x[s], bank[l])     weights are fetched once per window

Both give the same logits, banks and gradients. Kinds whose memory passes through all layers (rmt) allow only the first.
Axes: B lanes, S segments, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from lm2_jax.common.errors import UserError
from lm2_jax.model.decoder import Decoder, gate_name
from lm2_jax.model.memory.base import Memory
from lm2_jax.parallel.fsdp import with_logical_constraint

Schedule = Literal["auto", "segment", "layer"]


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
      document_BST: int32, 0 padding, 1, 2, ... the documents inside the segment in order. None: one, no padding.
      schedule: auto | segment | layer; auto is layer where the kind allows it.
      return_hidden: hidden states after the final norm [B,S,T,D] instead of logits, to project them in chunks.

    Returns:
      float32 logits [B,S,T,V] (or hidden states), and the memory after the window.
    """
    hidden_BSTD, memory, _ = run_window(model, params, tokens_BST, memory, reset_BS, document_BST, schedule)
    if return_hidden:
        return hidden_BSTD, memory
    return model.apply({"params": params}, hidden_BSTD, method="project"), memory


def run_window(
    model: Decoder,
    params: Any,
    tokens_BST: jax.Array,
    memory: Memory,
    reset_BS: jax.Array | None,
    document_BST: jax.Array | None,
    schedule: Schedule,
    packed: bool = True,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, Memory, dict[str, jax.Array]]:
    """As `run_segments`, to (hidden states [B,S,T,D], memory, mean of each gate over the window).

    packed: whether document numbers above 1 can occur; False saves the reads of the initial bank that packing needs.
    dropout_key: of a training step; None: no dropout.
    """

    def window(
        tokens_BST: jax.Array, memory: Memory, document_BST: Any, reset_BS: Any, dropout_key: jax.Array | None
    ) -> tuple[jax.Array, Memory, Any]:
        (hidden_BSTD, memory), sown = model.apply(
            {"params": params},
            tokens_BST,
            memory,
            document_BST,
            reset_BS,
            packed,
            deterministic=dropout_key is None,
            rngs=None if dropout_key is None else {"dropout": dropout_key},
            method="window",
            mutable=["gates"],
        )
        return hidden_BSTD, memory, sown.get("gates", {})

    def segment(memory: Memory, inputs: Any) -> tuple[Memory, tuple[jax.Array, Any]]:
        arrays, dropout_key = inputs
        tokens_B1T, document_B1T, reset_B1 = jax.tree.map(lambda a: a[:, None], arrays)
        hidden_B1TD, memory, gates = window(tokens_B1T, memory, document_B1T, reset_B1, dropout_key)
        return memory, (hidden_B1TD[:, 0], gates)

    if choose_schedule(model, schedule) == "layer":
        hidden_BSTD, memory, gates = window(tokens_BST, memory, document_BST, reset_BS, dropout_key)
    else:
        body = jax.checkpoint(segment, prevent_cse=False) if model.config.train.recomputes_segments else segment
        arrays = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (tokens_BST, document_BST, reset_BS))
        keys_S = None if dropout_key is None else jax.random.split(dropout_key, tokens_BST.shape[1])
        memory, (hidden_SBTD, gates) = jax.lax.scan(body, memory, (arrays, keys_S), unroll=model.config.train.unroll)
        hidden_BSTD = jnp.moveaxis(hidden_SBTD, 0, 1)
    hidden_BSTD = with_logical_constraint(hidden_BSTD, "batch", None, None, "activation")
    return hidden_BSTD, memory, _mean_by_name(gates)


def choose_schedule(model: Decoder, schedule: Schedule) -> Literal["segment", "layer"]:
    """What `auto` means for this model. Raises UserError if the kind does not allow the schedule asked for."""
    if schedule == "auto":
        return "layer" if model.kind.supports_layer_schedule else "segment"
    if schedule == "layer" and not model.kind.supports_layer_schedule:
        raise UserError(f"schedule layer: memory.kind {model.config.memory.kind} allows segment only")
    return schedule


def _mean_by_name(gates: Any) -> dict[str, jax.Array]:
    """Sown gate means, one number per gate: the mean over layers and segments."""
    means: dict[str, jax.Array] = {}
    for path, value in jax.tree_util.tree_leaves_with_path(gates):
        means[gate_name(path)] = jnp.mean(value)
    return means
