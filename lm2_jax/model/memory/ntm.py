"""Kind `ntm`: the addressing of Neural Turing Machines (arXiv 1410.5401) over the slots of a bank, once per segment.

H write heads address the slots and write them after a segment's last token. The equations are the paper's, by its
numbers and letters, for each head with its weights w over the slots, which are carried with the bank M:

    (5)-(6)  w_c = softmax over the slots i of beta cos(k, M_i)      by content
    (7)      w_g = g w_c + (1 - g) w                                 or where the head was
    (8)      w_s(i) = sum over j of w_g(j) s(i - j)                  shifted around the circle of slots, by -1, 0 or 1
    (9)      w <- w_s^gamma / sum of w_s^gamma                       sharpened
    (3)-(4)  M_i <- M_i ⊙ product of (1 - w(i) e) + sum of w(i) a    over the heads: all erase, then all add

The paper's controller is here the block: a learned query of each head attends to the segment's tokens, and from what it
finds, r, come k = r W_k, beta = softplus(.), g = sigmoid(.), s = softmax(.), gamma = 1 + softplus(.), and the vectors
e = sigmoid(r W_e) and a = tanh(r W_a), with weights of the head's own.

Tokens read the bank as they read lm2's, by attention, and a document starts from the same bank: so the two kinds differ
in how they write, and in nothing else. (A read head per token with a sharpened focus of its own would have to be
carried from token to token, which a segment that is read at once cannot do.) At a document's start head h points at
slot h N / H.

Axes: B lanes, T tokens, D model width, N slots, M slot width, H write heads.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from lm2_jax.model.attention import attention_weights
from lm2_jax.model.layers import Initializer, linear_init, of_length_1, replicated_dense, vector
from lm2_jax.model.memory.base import Parameters
from lm2_jax.model.memory.lm2 import LM2, attend, initial_bank, read_parameters, split
from lm2_jax.parallel.fsdp import with_logical_constraint

_CONTROLS = 6  # numbers of a head before their functions: beta, g, three of s, gamma
_SHIFTS = (-1, 0, 1)


@struct.dataclass
class Tape:
    """A bank and where its write heads are.

    Attributes:
      slots_BNM: the bank, float32. With a leading axis L in the memory of a model, as the next.
      weights_BHN: w of every head, float32; they add up to 1.
    """

    slots_BNM: jax.Array
    weights_BHN: jax.Array


def address(tape: Tape, key_BHM: jax.Array, controls_BHC: jax.Array) -> jax.Array:
    """The new w of every head, float32 [B,H,N]; equations 5 to 9."""
    strength, gate, *shifts, sharpness = jnp.split(controls_BHC, _CONTROLS, axis=-1)
    cosine_BHN = jnp.einsum("bhm,bnm->bhn", of_length_1(key_BHM), of_length_1(tape.slots_BNM))
    content_BHN = jax.nn.softmax(nn.softplus(strength) * cosine_BHN, axis=-1)
    gate = nn.sigmoid(gate)
    gated_BHN = gate * content_BHN + (1 - gate) * tape.weights_BHN
    shares = jnp.split(jax.nn.softmax(jnp.concatenate(shifts, axis=-1), axis=-1), len(_SHIFTS), axis=-1)
    shifted = (share * jnp.roll(gated_BHN, by, axis=-1) for share, by in zip(shares, _SHIFTS, strict=True))
    return jax.nn.softmax((1 + nn.softplus(sharpness)) * jnp.log(sum(shifted) + 1e-20), axis=-1)


class NTM(LM2):
    """Memory: a tape for every block that has a bank, [L,B,...]."""

    def block_start(self) -> Tape:
        """The constant tape, [N,M] and [H,N], that a block has at a document's start."""
        H, N = self.spec.memory.num_heads, self.spec.memory.num_slots
        weights_HN = jax.nn.one_hot(np.arange(H) * N // H, N)
        return Tape(initial_bank(N, self.spec.memory_width), weights_HN)

    def block_parameters(self) -> dict[str, tuple[Initializer, tuple[int, ...]]]:
        """Name to (initialiser, shape) of one block's memory."""
        D, M, H = self.spec.model.d_model, self.spec.memory_width, self.spec.memory.num_heads
        initializer = nn.initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=(0,))
        of_heads = nn.with_logical_partitioning(initializer, (None, "slot_in", "slot_out"))
        return read_parameters(self.spec) | {
            "write_query": (nn.with_logical_partitioning(nn.initializers.normal(1.0), (None, "slot_out")), (H, M)),
            "write_key": (linear_init(("embed", "slot_out")), (D, M)),
            "write_value": (linear_init(("embed", "slot_out")), (D, M)),
            "head_key": (of_heads, (H, M, M)),
            "head_erase": (of_heads, (H, M, M)),
            "head_add": (of_heads, (H, M, M)),
            "head_controls": (nn.with_logical_partitioning(initializer, (None, "slot_in", None)), (H, M, _CONTROLS)),
            "head_controls_bias": (vector(0.0, None), (H * _CONTROLS,)),
        }

    def write(
        self, p: Parameters, x_BTD: jax.Array, bank: Tape, token_BT: jax.Array
    ) -> tuple[Tape, dict[str, jax.Array]]:
        """A tape after a segment, and what its heads left of each slot as the gate "forget"; equations 3 and 4."""
        H, M = p["write_query"].shape
        query_BHM = jnp.broadcast_to(p["write_query"].astype(x_BTD.dtype), (len(x_BTD), H, M))
        keys_BTM, values_BTM = replicated_dense(x_BTD, p["write_key"]), replicated_dense(x_BTD, p["write_value"])
        found_BHM = attend(query_BHM, keys_BTM, values_BTM, self.spec.memory.num_heads, token_BT).astype(jnp.float32)

        def emit(name: str) -> jax.Array:
            weight_HMO = p[name].astype(x_BTD.dtype)
            return with_logical_constraint(jnp.einsum("bhm,hmo->bho", found_BHM, weight_HMO), None, None, None)

        controls_BHC = emit("head_controls") + p["head_controls_bias"].reshape(H, _CONTROLS)
        weights_BHN = address(bank, emit("head_key"), controls_BHC)
        erase_BHM, add_BHM = nn.sigmoid(emit("head_erase")), jnp.tanh(emit("head_add"))
        kept_BNM = jnp.prod(1 - weights_BHN[..., None] * erase_BHM[:, :, None], axis=1)
        slots_BNM = bank.slots_BNM * kept_BNM + jnp.einsum("bhn,bhm->bnm", weights_BHN, add_BHM)
        return Tape(slots_BNM, weights_BHN), {"forget": kept_BNM}

    def write_weights(self, p: Parameters, x_BTD: jax.Array, bank: Tape, token_BT: jax.Array) -> jax.Array:
        """Shares of the tokens in what each slot takes, by way of the heads; float32 [B,N,T]."""
        (H, M), c = p["write_query"].shape, self.spec.memory
        q_BHM = jnp.broadcast_to(p["write_query"], (len(x_BTD), H, M))
        q, k = split(q_BHM, c.num_heads), split(x_BTD @ p["write_key"], c.num_heads)
        seen_BHT = attention_weights(q, k, token_BT[:, None])
        weights_BHN = self.write(p, x_BTD, bank, token_BT)[0].weights_BHN
        return jnp.einsum("bhn,bht->bnt", weights_BHN / jnp.sum(weights_BHN, axis=1, keepdims=True), seen_BHT)

    def as_slots(self, memory: Tape) -> jax.Array:
        """The bank of every block that has one."""
        return memory.slots_BNM
