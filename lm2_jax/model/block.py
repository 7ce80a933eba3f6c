"""One Llama block over the segments of a window, with a bank of memory slots where the kind asks for one.

Axes: B lanes, S segments, T tokens, D model width.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lm2_jax.config.spec import ModelSpec
from lm2_jax.model.edge import Edge
from lm2_jax.model.layers import CausalConv, KVCache, Layout, RMSNorm, SelfAttention, SwiGLU, write_at
from lm2_jax.model.memory.base import Memory, MemoryKind
from lm2_jax.model.windowed import WindowedAttention
from lm2_jax.parallel.fsdp import all_gather_params, can_shard_batch, per_device, with_logical_constraint


class Block(nn.Module):
    """One layer over the S segments of a window; with a bank if `with_bank`."""

    spec: ModelSpec
    kind: MemoryKind
    with_bank: bool

    @nn.compact
    def __call__(
        self,
        carry: tuple[jax.Array, Memory],
        own_bank: Memory,
        layout: Layout,
        cache: KVCache | None = None,
        edge: Edge | None = None,
    ) -> tuple[tuple[jax.Array, Memory], tuple[Memory, KVCache | None, Edge | None]]:
        """Runs the block: (x [B,S,T,D], a shared bank or None) and the block's own bank, before the window to after.

        Decoding: with a cache, x [B,1,T,D] continues an unfinished segment. Its keys and values are appended, and
        `own_bank` holds what the kind made of the bank for reading, unless it decodes in place.

        edge: what is carried over the segment's edge, before the window to after; None without model.window.
        """
        x_BSTD, shared_bank = carry
        x_BSTD = checkpoint_name(x_BSTD, "block_input")
        carry = x_BSTD, shared_bank
        # Dropout (kind official alone has any) needs rngs, which the sharded call below is not given.
        if can_shard_batch(x_BSTD.shape[0]) and layout.deterministic and not self.is_initializing():
            return self._on_each_device(carry, own_bank, layout, cache, edge)
        bank = own_bank if shared_bank is None else shared_bank
        prepared = ()
        if self.with_bank and "memory" in self.variables.get("params", {}):
            prepared = self.kind.prepare(self.variables["params"]["memory"], layout)
        if (self.spec.recomputes_segments or self.kind.block_is_recurrent) and x_BSTD.shape[1] > 1:
            x_BSTD, bank, edge = self._segment_by_segment(x_BSTD, bank, layout, edge, prepared)
        else:
            x_BSTD, bank, cache, edge = self._window(x_BSTD, bank, layout, cache, edge, prepared)
        return ((x_BSTD, None), (bank, cache, edge)) if shared_bank is None else ((x_BSTD, bank), (None, cache, edge))

    def _on_each_device(self, *arrays: Any) -> Any:
        """Runs the block on every device, for the device's own lanes; there `can_shard_batch` is false."""
        unbound = self.clone(parent=None)
        axes = nn.get_partition_spec(jax.eval_shape(lambda: unbound.init(jax.random.key(0), *arrays)["params"]))

        def run(shards: Any, specs: Any, arrays: Any) -> tuple[Any, Any]:
            weights = all_gather_params(shards, specs, self.spec.dtype)
            outputs, sown = unbound.apply({"params": weights}, *arrays, mutable=["gates"])
            return outputs, sown.get("gates", {})

        outputs, gates = per_device(run, self.variables["params"], axes, arrays)
        for path, value in jax.tree_util.tree_leaves_with_path(gates):
            self.sow("gates", gate_name(path), value)
        return outputs

    def _window(
        self,
        x_BSTD: jax.Array,
        bank: Memory,
        layout: Layout,
        cache: KVCache | None,
        edge: Edge | None,
        prepared: tuple[Any, ...],
    ) -> tuple[jax.Array, Memory, KVCache | None, Edge | None]:
        c = self.spec.model
        memory = self.kind.block_memory()(name="memory") if self.with_bank else None
        if memory is not None:
            x_BSTD, bank = memory.before_attention(x_BSTD, bank, layout)
        if c.conv_width:
            normed_BSTD = RMSNorm(c.norm_eps, name="conv_norm")(x_BSTD)
            conv_BSTD, cache = CausalConv(c.conv_width, name="conv")(normed_BSTD, layout, cache)
            x_BSTD += conv_BSTD
        normed_BSTD = RMSNorm(c.norm_eps, name="attention_norm")(x_BSTD)
        if cache is not None:  # the cache of inputs lies by width; activations do not
            normed_BSTD = with_logical_constraint(normed_BSTD, "batch", None, None, "activation")
        if edge is None:
            attention = SelfAttention(c, self.kind.linear_init, self.spec.context_keys, name="attention")
            attended_BSTD, cache = attention(normed_BSTD, layout, cache)
        else:
            attention = WindowedAttention(c, self.kind.linear_init, name="attention")
            attended_BSTD, edge, cache = attention(normed_BSTD, layout, edge, cache)
        x_BSTD += attended_BSTD
        if memory is not None:
            if cache is not None and cache.inputs_BCD is not None:
                inputs_BCD = write_at(cache.inputs_BCD, normed_BSTD[:, 0], layout.cache_index_BST[:, 0])
                cache = cache.replace(inputs_BCD=inputs_BCD)
            added_BSTD, bank = memory(normed_BSTD, attended_BSTD, bank, layout, *prepared)
            x_BSTD += added_BSTD
        normed_BSTD = RMSNorm(c.norm_eps, name="mlp_norm")(x_BSTD)
        x_BSTD += SwiGLU(c, self.kind.linear_init, name="mlp")(normed_BSTD)
        if memory is not None:
            bank = memory.after_feed_forward(x_BSTD, bank, layout)
        return with_logical_constraint(x_BSTD, "batch", None, "tokens", "activation"), bank, cache, edge

    def _segment_by_segment(
        self, x_BSTD: jax.Array, bank: Memory, layout: Layout, edge: Edge | None, prepared: tuple[Any, ...]
    ) -> tuple[jax.Array, Memory, Edge | None]:
        """Does the same, one segment after the other; if segments are recomputed, only x, bank and edge are kept."""

        def segment(
            block: Block,
            carried: tuple[Memory, Edge | None],
            inputs: tuple[jax.Array, Layout],
            prepared: tuple[Any, ...],
        ) -> tuple[tuple[Memory, Edge | None], jax.Array]:
            bank, edge = carried
            x_B1TD, layout = jax.tree.map(lambda a: a[:, None], inputs)
            x_B1TD, bank, _, edge = block._window(x_B1TD, bank, layout, None, edge, prepared)
            return (bank, edge), x_B1TD[:, 0]

        over_segments = nn.scan(
            nn.remat(segment, prevent_cse=False) if self.spec.recomputes_segments else segment,
            variable_broadcast="params",
            variable_axes={"gates": 0},
            split_rngs={"params": False},
            in_axes=(1, nn.broadcast),
            out_axes=1,
        )
        (bank, edge), x_BSTD = over_segments(self, (bank, edge), (x_BSTD, layout), prepared)
        return x_BSTD, bank, edge


def gate_name(path: tuple[Any, ...]) -> str:
    """Name of a gate ("input", "forget", "output"), from the pytree path of its sown mean."""
    return next(key.key for key in reversed(path) if isinstance(key, jax.tree_util.DictKey))


def mean_gates(gates: Any) -> dict[str, jax.Array]:
    """One number a gate: the mean of its sown means over layers and segments."""
    return {gate_name(path): jnp.mean(value) for path, value in jax.tree_util.tree_leaves_with_path(gates)}
