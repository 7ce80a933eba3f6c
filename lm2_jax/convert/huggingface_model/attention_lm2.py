"""Self-attention of a block: within the segment, or with a window that reaches over the segment's edge.

With `window` W and `sinks` n a token attends to the last W tokens of its text, also to those of the segment before, and
to the text's first n. For that a block keeps, besides the keys and values of its unfinished segment, those of its edge:
first the n sinks, then the E = W - 1 tokens before the segment. None of them is rotated before it is used.

Keys are rotated by their places relative to the segment's start, where a text's first token stands at -start; so
distances are true ones. A sink farther than `max_distance` stands at that distance from every query, which no one place
gives. So queries and keys then have a second half of features for such sinks: there the query is rotated to
max_distance, and the sink not at all.

Axes: B rows, Q new entries, L entries of the segment, n sinks, U = n + E + L keys, D hidden size, H heads, G kv heads,
K head width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from .configuration_lm2 import LM2Config
from .layers_lm2 import linear
from .rows_lm2 import Layout, replace_rows, rows_where

# ---------- RoPE -----------------------------------------------------------------------------------------------------


def rope_frequencies(config: LM2Config, device: torch.device) -> Tensor:
    """Radians per position, float32 [K/2]: theta^(-2i/K), with Llama-3's scaling of low frequencies if configured."""
    rope = config.rope_parameters
    pairs_K = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
    frequencies_K = rope["rope_theta"] ** (-pairs_K / config.head_dim)
    if rope["rope_type"] == "default":
        return frequencies_K
    turns_K = rope["original_max_position_embeddings"] * frequencies_K / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    keep_K = ((turns_K - low) / (high - low)).clamp(0, 1)
    return frequencies_K * (keep_K + (1 - keep_K) / rope["factor"])


def rotation(config: LM2Config, place_BQ: Tensor) -> Tensor:
    """Cosines and sines [2,B,Q,1,K/2] of the angles by which RoPE turns pairs of features at these places."""
    angle_BQ1K = place_BQ[..., None, None] * rope_frequencies(config, place_BQ.device)
    return torch.stack([angle_BQ1K.cos(), angle_BQ1K.sin()])


def rotate(x_BQHK: Tensor, rotation_2BQ1K: Tensor) -> Tensor:
    """Rotary position embedding, rotate-half form: feature i pairs with feature i + K/2."""
    (first, second), (cos, sin) = x_BQHK.float().chunk(2, dim=-1), rotation_2BQ1K
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BQHK.dtype)


# ---------- Within the segment ---------------------------------------------------------------------------------------


class LM2Attention(nn.Module):
    """Grouped-query causal self-attention within the segment, with RoPE; no biases. Always SDPA."""

    def __init__(self, config: LM2Config) -> None:
        super().__init__()
        D, self.head_dim = config.hidden_size, config.head_dim
        self.q_proj = linear(D, config.num_attention_heads * self.head_dim)
        self.k_proj = linear(D, config.num_key_value_heads * self.head_dim)
        self.v_proj = linear(D, config.num_key_value_heads * self.head_dim)
        self.o_proj = linear(config.num_attention_heads * self.head_dim, D)

    def forward(
        self, x_BQD: Tensor, layout: Layout, keys: Tensor | None, values: Tensor | None, *unused: None
    ) -> tuple[Tensor | None, ...]:
        """x [B,Q,D], already normalised, to the same shape; and the segment's keys and values with those of x."""
        q_BQHK, k_BQGK, v_BQGK = self.heads(x_BQD)
        keys = layout.append(keys, rotate(k_BQGK, layout.rotation_2BQ1K))
        values = layout.append(values, v_BQGK)
        q, k, v = (x.transpose(1, 2) for x in (rotate(q_BQHK, layout.rotation_2BQ1K), keys, values))
        attended_BHQK = F.scaled_dot_product_attention(
            q, k, v, attn_mask=layout.seen_B1QU, is_causal=layout.is_causal, enable_gqa=True
        )
        return self.o_proj(attended_BHQK.transpose(1, 2).flatten(2)), keys, values, *unused

    def heads(self, x_BQD: Tensor) -> list[Tensor]:
        """Queries [B,Q,H,K], keys and values [B,Q,G,K] of x, not rotated."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        return [project(x_BQD).unflatten(-1, (-1, self.head_dim)) for project in projections]


# ---------- With a window --------------------------------------------------------------------------------------------


def window_layout(config: LM2Config, start: list[int], entry_BQ: Tensor, entries: int) -> dict[str, Any]:
    """Returns the parts of a `Layout` that a window needs.

    Args:
      start: tokens of each row's text before the segment.
      entry_BQ: the new entries' places in the segment.
      entries: L.
    """
    W, n, farthest, device = config.window, config.sinks, config.max_distance, entry_BQ.device
    start_B1 = torch.tensor(start, device=device)[:, None]
    sink_Bn = torch.arange(n, device=device) - start_B1
    near_BU = torch.arange(1 - W, entries, device=device).expand(len(start), -1)

    back_BQn, back_BQU = (entry_BQ[..., None] - place[:, None] for place in (sink_Bn, near_BU))
    exists_BU = near_BU >= -start_B1
    seen = [back_BQn >= W, (back_BQU >= 0) & (back_BQU < W) & exists_BU[:, None]]
    options = {"first": rows_where([tokens == 0 for tokens in start], device) if n else None}
    if n and farthest is not None and max(start) + entries - 1 > farthest:
        seen = [seen[0] & (back_BQn <= farthest), seen[1], back_BQn > farthest]
        options["far_2BQ1K"] = rotation(config, torch.tensor([[farthest]], device=device))
    options["seen_B1QU"] = torch.cat(seen, dim=-1)[:, None]
    options["key_rotation_2BU1K"] = rotation(config, torch.cat([sink_Bn, near_BU], dim=1))
    return options


class LM2WindowAttention(LM2Attention):
    """`LM2Attention` with a window over the segment's edge, and sinks; the same parameters."""

    def __init__(self, config: LM2Config) -> None:
        super().__init__(config)
        self.sinks, self.carried, self.segment_length = config.sinks, config.window - 1, config.segment_length
        self.group_size = config.num_attention_heads // config.num_key_value_heads

    def forward(
        self,
        x_BQD: Tensor,
        layout: Layout,
        keys: Tensor | None,
        values: Tensor | None,
        edge_keys: Tensor | None,
        edge_values: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """x [B,Q,D], already normalised, to the same shape; and keys and values of the segment and of its edge."""
        new_q_BQHK, new_k_BQGK, new_v_BQGK = self.heads(x_BQD)
        keys, edge_keys = self._append(keys, new_k_BQGK, edge_keys, layout)
        values, edge_values = self._append(values, new_v_BQGK, edge_values, layout)

        q = rotate(new_q_BQHK, layout.rotation_2BQ1K)
        k = rotate(torch.cat([edge_keys, keys], dim=1), layout.key_rotation_2BU1K)
        v = torch.cat([edge_values, values], dim=1)
        if layout.far_2BQ1K is not None:
            n, K = self.sinks, self.head_dim
            q = torch.cat([q, rotate(new_q_BQHK, layout.far_2BQ1K)], dim=-1)
            k = torch.cat([F.pad(k, (0, K)), F.pad(edge_keys[:, :n].to(k.dtype), (K, 0))], dim=1)
            v = torch.cat([v, edge_values[:, :n]], dim=1)

        k, v = (x.repeat_interleave(self.group_size, dim=2) for x in (k, v))  # kernels with masks know no groups
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scale = self.head_dim**-0.5
        attended_BHQK = F.scaled_dot_product_attention(q, k, v, attn_mask=layout.seen_B1QU, scale=scale)
        return self.o_proj(attended_BHQK.transpose(1, 2).flatten(2)), keys, values, edge_keys, edge_values

    def _append(self, held: Tensor | None, new: Tensor, edge: Tensor | None, layout: Layout) -> tuple[Tensor, Tensor]:
        """The segment's keys or values with new ones, [B,L,G,K], and those of its edge, [B,n+E,G,K]."""
        T, E, n = self.segment_length, self.carried, self.sinks
        if edge is None:
            edge = new.new_zeros(len(new), n + E, *new.shape[2:])
        sinks, before = edge[:, :n], edge[:, n:]
        if layout.writes is not None:  # a new segment follows these
            before = replace_rows(before, layout.writes, held[layout.writes][:, T - E : T])
        held = layout.append(held, new)
        if layout.first is not None:  # the text's first tokens are in the segment, as many as there are
            index_n = torch.arange(n, device=held.device).clamp(max=held.shape[1] - 1)
            sinks = replace_rows(sinks, layout.first, held[layout.first][:, index_n])
        return held, torch.cat([sinks, before], dim=1)
