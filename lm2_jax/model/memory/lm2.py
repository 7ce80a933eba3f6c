"""Kind `lm2`: a bank of memory slots in every block, read by its tokens and rewritten once per segment.

The equations are those of the LM2 paper (arXiv 2502.06049, section 2), made strictly causal and free in their sizes:
a segment's tokens read the bank as the previous segments left it, and write it after the segment's last token.

With memory.write top_k a router, which is not in the paper, says which k slots each token may write (`route`). Slots
that no token may write keep their content exactly.

Axes: B lanes, S segments, T tokens, D model width, N memory slots, M slot width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm2_jax.config import MemoryConfig
from lm2_jax.config.spec import ModelSpec
from lm2_jax.model.attention import attention, attention_to_cache, attention_weights
from lm2_jax.model.chosen_tiles import attend_to_either, can_choose_tiles
from lm2_jax.model.layers import Initializer, Layout, linear_init, replicated_dense, rms_norm, vector
from lm2_jax.model.memory.base import BlockMemory, Memory, MemoryKind, Parameters, select_lanes
from lm2_jax.parallel.fsdp import with_logical_constraint

Projections = tuple[jax.Array, jax.Array]  # keys and values of the read
_EXTRA_SLOTS_SEED = 2502_06049  # of the constant rows beyond the identity


def initial_bank(num_slots: int, width: int) -> jax.Array:
    """The bank at a document's start, float32 [N,M]: rows of the identity, then fixed random rows of norm 1."""
    rows_NM = jnp.eye(min(num_slots, width), width, dtype=jnp.float32)
    if num_slots > width:
        extra_NM = jax.random.normal(jax.random.key(_EXTRA_SLOTS_SEED), (num_slots - width, width), jnp.float32)
        rows_NM = jnp.concatenate([rows_NM, extra_NM / jnp.linalg.norm(extra_NM, axis=-1, keepdims=True)])
    return rows_NM


def split(x: jax.Array, num_heads: int) -> jax.Array:
    """The last axis as heads [..,H,K]."""
    return x.reshape(*x.shape[:-1], num_heads, -1)


def attend(
    q_BQM: jax.Array,
    k_BKM: jax.Array,
    v_BKM: jax.Array,
    num_heads: int,
    visible_BK: jax.Array | None = None,
    share_BQK: jax.Array | None = None,
) -> jax.Array:
    """Multi-head attention without projections, [B,Q,M].

    visible_BK: bool, keys that may be attended to; None: all. share_BQK, instead: factors of the weights before they
    are made to add up to 1; a query whose factors are all 0 gets a finite value without meaning. Keys and values that
    `by_heads` gave may be attended to as well, all of them.
    """
    if k_BKM.ndim == 4:
        last_BQ = jnp.full(q_BQM.shape[:2], k_BKM.shape[2] - 1)
        return attention_to_cache(split(q_BQM, num_heads), k_BKM, v_BKM, last_BQ).reshape(q_BQM.shape)
    if share_BQK is not None:
        q, k, v = (split(x, num_heads) for x in (q_BQM, k_BKM, v_BKM))
        bias, mask = log_share(share_BQK)[:, None].astype(q.dtype), (share_BQK > 0)[:, None]
        return jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask).reshape(q_BQM.shape)
    documents = {}
    if visible_BK is not None:
        documents["q_document_ids_BT"] = jnp.ones(q_BQM.shape[:2], jnp.int32)
        documents["kv_document_ids_BU"] = visible_BK.astype(jnp.int32)
    q, k, v = (split(x, num_heads) for x in (q_BQM, k_BKM, v_BKM))
    return attention(q, k, v, **documents).reshape(q_BQM.shape)


def attend_either(
    q_BTD: jax.Array, bank: Projections, start: Projections, reads_start_BT: jax.Array, num_heads: int
) -> jax.Array:
    """`attend` to the bank, or to the initial bank where reads_start_BT; the tokens that do are a row's last."""
    if can_choose_tiles(q_BTD.shape[1], bank[0].shape[1], q_BTD.shape[2] // num_heads):
        q_BTHK, *arrays = (split(x, num_heads) for x in (q_BTD, *bank, *start))
        return attend_to_either(q_BTHK, arrays[:2], arrays[2:], reads_start_BT).reshape(q_BTD.shape)
    start = (jnp.broadcast_to(one, of_bank.shape) for one, of_bank in zip(start, bank, strict=True))
    of_start_BTD, of_bank_BTD = (attend(q_BTD, *slots, num_heads) for slots in (start, bank))
    return jnp.where(reads_start_BT[..., None], of_start_BTD, of_bank_BTD)


def by_heads(x_BKM: jax.Array, num_heads: int) -> jax.Array:
    """Keys or values [B,H,K,M/H], as single queries want them."""
    return with_logical_constraint(split(x_BKM, num_heads).swapaxes(1, 2), "batch", "heads", None, None)


def log_share(share: jax.Array) -> jax.Array:
    """Its logarithm; 0 where it is 0, since there a mask decides."""
    return jnp.log(jnp.where(share > 0, share, 1.0))


def route(p: Parameters, num_slots: int, x_BTD: jax.Array, token_BT: jax.Array) -> jax.Array:
    """How much each token may write each slot, float32 [B,N,T]: sigmoid(x' W_router) for its k best slots, else 0.

    num_slots: k.
    """
    share_BTN = nn.sigmoid(replicated_dense(x_BTD, p["router"]).astype(jnp.float32))
    _, best_BTk = jax.lax.top_k(share_BTN, num_slots)
    may_BTN = jnp.any(best_BTk[..., None] == jnp.arange(share_BTN.shape[-1]), axis=2) & token_BT[..., None]
    return jnp.swapaxes(jnp.where(may_BTN, share_BTN, 0), 1, 2)


def project_bank(p: Parameters, eps: float, bank: jax.Array, dtype: jnp.dtype) -> Projections:
    """Bank' W_K and Bank' W_V of `read`, both [..,N,D] in `dtype`; Bank' is the normalised bank [..,N,M]."""
    slots = rms_norm(bank, p["bank_norm"], eps).astype(dtype)
    return replicated_dense(slots, p["read_key"]), replicated_dense(slots, p["read_value"])


def read(
    p: Parameters,
    config: MemoryConfig,
    x_BTD: jax.Array,
    bank: Projections,
    start: Projections | None = None,
    reads_start_BT: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Tokens attend to slots (paper 2.1).

    E_mem = MHA(q = x' W_Q, k = Bank' W_K, v = Bank' W_V) W_O;  g_out = sigmoid(E_mem W_out + b_out)

    Args:
      x_BTD: x', the normalised input of the block's self-attention.
      bank: `project_bank` of the bank, [B,N,D].
      start: `project_bank` of the initial bank, [N,D], which the tokens of reads_start_BT, the last of a segment, read
        instead.

    Returns:
      g_out ⊙ E_mem and g_out, both [B,T,D].
    """
    queries_BTD = replicated_dense(x_BTD, p["read_query"])
    if start is None:
        e_mem_BTD = attend(queries_BTD, *bank, config.num_heads)
    else:
        e_mem_BTD = attend_either(queries_BTD, bank, start, reads_start_BT, config.num_heads)
    e_mem_BTD = replicated_dense(e_mem_BTD, p["read_output"])
    g_out_BTD = nn.sigmoid(replicated_dense(e_mem_BTD, p["output_gate"]) + p["output_gate_bias"].astype(x_BTD.dtype))
    return g_out_BTD * e_mem_BTD, g_out_BTD


def write(
    p: Parameters, config: MemoryConfig, eps: float, x_BTD: jax.Array, bank_BNM: jax.Array, token_BT: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Slots attend to the segment's tokens, and gates mix in what they found (paper 2.2).

    U = MHA(q = Bank' W'_Q, k = x' W'_K, v = x' W'_V) W'_O
    C_1 = RMSNorm(Bank' + U);  C = RMSNorm(C_1 + silu(C_1 W_up) W_down)
    g_f = sigmoid(U W_f + tanh(Bank) W'_f + b_f);  g_in = 1 - g_f, or sigmoid(U W_i + tanh(Bank) W'_i + b_i)
    Bank <- g_in ⊙ tanh(C) + g_f ⊙ Bank

    With a router, the attention weights of U are multiplied by `route`, before they are made to add up to 1, and the
    change of a slot by its largest, so that all of the router is learned from what the slots hold.

    Args:
      x_BTD: x', the normalised input of the block's self-attention.
      bank_BNM: the float32 bank at the segment's start.
      token_BT: bool, the tokens that are written.

    Returns:
      the new bank, g_in and g_f; all float32 [B,N,M].
    """
    slots_BNM = rms_norm(bank_BNM, p["bank_norm"], eps).astype(x_BTD.dtype)

    # What the slots find
    share_BNT = route(p, config.write_slots, x_BTD, token_BT) if config.write == "top_k" else None
    keys_BTM, values_BTM = replicated_dense(x_BTD, p["write_key"]), replicated_dense(x_BTD, p["write_value"])
    queries_BNM = replicated_dense(slots_BNM, p["write_query"])
    u_BNM = attend(queries_BNM, keys_BTM, values_BTM, config.num_heads, token_BT, share_BNT)
    u_BNM = replicated_dense(u_BNM, p["write_output"])

    # The candidate
    c_BNM = rms_norm(slots_BNM + u_BNM, p["candidate_norm"], eps)
    hidden_BNM = nn.silu(replicated_dense(c_BNM, p["candidate_up"]))
    c_BNM = rms_norm(c_BNM + replicated_dense(hidden_BNM, p["candidate_down"]), p["candidate_norm_2"], eps)

    # The gates
    tanh_bank_BNM = jnp.tanh(bank_BNM).astype(x_BTD.dtype)

    def gate(name: str) -> jax.Array:
        from_update_BNM = replicated_dense(u_BNM, p[f"{name}_gate"]).astype(jnp.float32)
        from_bank_BNM = replicated_dense(tanh_bank_BNM, p[f"{name}_gate_bank"]).astype(jnp.float32)
        return nn.sigmoid(from_update_BNM + from_bank_BNM + p[f"{name}_gate_bias"])

    g_f_BNM = gate("forget")
    g_in_BNM = 1 - g_f_BNM if config.gates == "convex" else gate("input")
    new_BNM = g_in_BNM * jnp.tanh(c_BNM.astype(jnp.float32)) + g_f_BNM * bank_BNM
    if share_BNT is not None:
        new_BNM = bank_BNM + jnp.max(share_BNT, axis=-1, keepdims=True) * (new_BNM - bank_BNM)
    return new_BNM, g_in_BNM, g_f_BNM


class BankMemory(BlockMemory):
    """One block's bank over a window: the recurrence (`write`, scanned over the segments), then all reads at once.

    In packed segments, tokens of a document that began inside the segment read the initial bank, and only the segment's
    last document writes, from the initial bank if it began here.

    While decoding, a segment only reads, from the projections cached by `LM2.project_memory`; `LM2.finish_segment`
    writes.

    Attributes:
      kind: `LM2`, or a kind whose banks are read like its banks, but written otherwise.
    """

    kind: LM2

    @nn.compact
    def __call__(
        self, x_BSTD: jax.Array, a_BSTD: jax.Array, bank: Memory | Projections, layout: Layout, *prepared: Projections
    ) -> tuple[jax.Array, Memory | Projections]:
        """x' [B,S,T,D] and the bank before the window to (g_out ⊙ E_mem [B,S,T,D], the bank after the window).

        prepared: by `LM2.prepare`.
        """
        kind, memory, eps = self.kind, self.spec.memory, self.spec.model.norm_eps
        p = {name: self.param(name, init, shape) for name, (init, shape) in kind.block_parameters().items()}
        if layout.cache_index_BST is not None:
            return read(p, memory, x_BSTD[:, 0], bank)[0][:, None], bank
        B, S = x_BSTD.shape[:2]
        start = jax.tree.map(lambda x: jnp.broadcast_to(x, (B, *x.shape)), kind.block_start())

        def step(
            bank: Memory, segment: tuple[jax.Array, jax.Array, jax.Array]
        ) -> tuple[Memory, tuple[Memory, dict[str, jax.Array]]]:
            x_BTD, document_BT, reset_B = segment
            before = select_lanes(0, reset_B, start, bank)
            last_B = jnp.max(document_BT, axis=1)
            token_BT = (document_BT == last_B[:, None]) & (document_BT > 0)
            base = select_lanes(0, last_B > 1, start, before) if layout.packed else before
            new, gates = kind.write(p, x_BTD, base, token_BT)
            return select_lanes(0, last_B > 0, new, before), (before, jax.tree.map(jnp.mean, gates))

        segments = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (x_BSTD, layout.document_BST, layout.reset_BS))
        bank, (before_S, gates) = jax.lax.scan(step, bank, segments, unroll=self.spec.unroll)

        def merge(a_BS: jax.Array) -> jax.Array:  # every segment reads by itself
            return a_BS.reshape(B * S, *a_BS.shape[2:])

        of_start = prepared or kind.prepare(p, layout)
        packing = (*of_start, merge(layout.document_BST) != 1) if layout.packed else ()
        before = jax.tree.map(lambda x: merge(jnp.moveaxis(x, 0, 1)), before_S)
        projected = project_bank(p, eps, kind.as_slots(before), x_BSTD.dtype)
        gated_BTD, g_out_BTD = read(p, memory, merge(x_BSTD), projected, *packing)

        if self.is_mutable_collection("intermediates"):
            self._sow_weights(p, merge(x_BSTD), merge(layout.document_BST) > 0, before)
        for name, value in (*gates.items(), ("output", g_out_BTD)):
            self.sow("gates", name, jnp.mean(value.astype(jnp.float32)))
        return gated_BTD.reshape(x_BSTD.shape), bank

    def _sow_weights(self, p: Parameters, x_BTD: jax.Array, token_BT: jax.Array, bank: Memory) -> None:
        """Sows the attention weights of tokens to slots ("read") and of slots to tokens ("write")."""
        slots_BNM = rms_norm(self.kind.as_slots(bank), p["bank_norm"], self.spec.model.norm_eps)
        q, k = (split(x, self.spec.memory.num_heads) for x in (x_BTD @ p["read_query"], slots_BNM @ p["read_key"]))
        self.sow("intermediates", "read", attention_weights(q, k, jnp.ones((len(q), 1, k.shape[1]), bool)))
        self.sow("intermediates", "write", self.kind.write_weights(p, x_BTD, bank, token_BT))


def read_parameters(spec: ModelSpec) -> dict[str, tuple[Initializer, tuple[int, ...]]]:
    """Name to (initialiser, shape) of what reads a block's bank."""
    D, M = spec.model.d_model, spec.memory_width
    return {
        "bank_norm": (vector(1.0, "norm"), (M,)),
        "read_query": (linear_init(("embed", "heads")), (D, D)),
        "read_key": (linear_init(("slot_in", "heads")), (M, D)),
        "read_value": (linear_init(("slot_in", "heads")), (M, D)),
        "read_output": (linear_init(("heads", "embed"), 1 / (2 * spec.model.num_layers)), (D, D)),
        "output_gate": (linear_init(("embed", "heads")), (D, D)),
        "output_gate_bias": (vector(0.0, "norm"), (D,)),
    }


class LM2(MemoryKind):
    """Memory: the banks of all blocks that have one, float32 [L,B,N,M]."""

    lane_axis = 1

    @property
    def num_bank_layers(self) -> int:
        """Number of blocks with a bank."""
        return self.spec.num_memory_layers

    def initial(self, parameters: Parameters | None) -> Memory:
        """The same for every layer, [L,...]."""
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (self.num_bank_layers, *x.shape)), self.block_start())

    def block_start(self) -> Memory:
        """The constant bank [N,M] that a block has at a document's start."""
        return initial_bank(self.spec.memory.num_slots, self.spec.memory_width)

    def block_memory(self) -> Callable[[], BlockMemory]:
        """Read and write of one bank."""
        return functools.partial(BankMemory, self.spec, self)

    def prepare(self, block_parameters: Parameters, layout: Layout) -> tuple[Projections, ...]:
        """`project_bank` of the initial bank, [N,D], where documents begin inside segments."""
        if not layout.packed or layout.cache_index_BST is not None:
            return ()
        slots_NM, eps = self.as_slots(self.block_start()), self.spec.model.norm_eps
        return (project_bank(block_parameters, eps, slots_NM, jnp.dtype(self.spec.dtype)),)

    def block_parameters(self) -> dict[str, tuple[Initializer, tuple[int, ...]]]:
        """Name to (initialiser, shape) of one block's memory."""
        c, D, M = self.spec.memory, self.spec.model.d_model, self.spec.memory_width
        to_slots = (linear_init(("slot_in", "slot_out")), (M, M))
        slot_norm = (vector(1.0, "norm"), (M,))
        shapes = read_parameters(self.spec) | {
            "write_query": to_slots,
            "write_key": (linear_init(("embed", "slot_out")), (D, M)),
            "write_value": (linear_init(("embed", "slot_out")), (D, M)),
            "write_output": to_slots,
            "candidate_norm": slot_norm,
            "candidate_up": to_slots,
            "candidate_down": to_slots,
            "candidate_norm_2": slot_norm,
        }
        if c.write == "top_k":
            shapes["router"] = (linear_init(("embed", None)), (D, c.num_slots))
        biases = {"forget": c.forget_bias} | ({"input": c.input_bias} if c.gates == "independent" else {})
        for name, bias in biases.items():
            shapes[f"{name}_gate"] = shapes[f"{name}_gate_bank"] = to_slots
            shapes[f"{name}_gate_bias"] = (vector(bias, "norm"), (M,))
        return shapes

    def write(
        self, p: Parameters, x_BTD: jax.Array, bank: Memory, token_BT: jax.Array
    ) -> tuple[Memory, dict[str, jax.Array]]:
        """A bank after a segment, and its gates by name; `write` of this module."""
        bank, g_in_BNM, g_f_BNM = write(p, self.spec.memory, self.spec.model.norm_eps, x_BTD, bank, token_BT)
        return bank, {"input": g_in_BNM, "forget": g_f_BNM}

    def write_weights(self, p: Parameters, x_BTD: jax.Array, bank: Memory, token_BT: jax.Array) -> jax.Array:
        """Attention of the slots to the tokens in `write`, mean over heads, float32 [B,N,T]."""
        c, slots_BNM = self.spec.memory, rms_norm(bank, p["bank_norm"], self.spec.model.norm_eps)
        share_BNT = jnp.broadcast_to(token_BT[:, None], (*slots_BNM.shape[:2], token_BT.shape[1]))
        if c.write == "top_k":
            share_BNT = route(p, c.write_slots, x_BTD, token_BT)
        q, k = split(slots_BNM @ p["write_query"], c.num_heads), split(x_BTD @ p["write_key"], c.num_heads)
        return attention_weights(q, k, share_BNT > 0, log_share(share_BNT)[:, None])

    def project_memory(self, memory: Memory, block_parameters: Parameters) -> Projections:
        """Keys and values of every bank, [L,B,H,N,D/H]."""
        eps, dtype, heads = self.spec.model.norm_eps, self.spec.dtype, self.spec.memory.num_heads

        def layer(inputs: tuple[Parameters, jax.Array]) -> Projections:
            keys_BND, values_BND = project_bank(inputs[0], eps, inputs[1], dtype)
            return by_heads(keys_BND, heads), by_heads(values_BND, heads)

        return jax.lax.map(layer, (block_parameters, self.as_slots(memory)))

    def finish_segment(
        self, memory: Memory, block_parameters: Parameters, inputs_LBTD: jax.Array, token_BT: jax.Array, ends_BmD: None
    ) -> Memory:
        """The write of every bank, layer by layer."""

        def layer(inputs: tuple[Parameters, jax.Array, Memory]) -> Memory:
            p, x_BTD, bank = inputs
            return self.write(p, x_BTD, bank, token_BT)[0]

        return jax.lax.map(layer, (block_parameters, inputs_LBTD, memory))

    def as_slots(self, memory: Memory) -> jax.Array:
        """A bank for every block that has one."""
        return memory

    def attention_to_slots(self, sown: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
        """Both ways, for every bank."""
        weights = sown["bank_blocks"]["memory"]
        return weights["read"][0], weights["write"][0]
