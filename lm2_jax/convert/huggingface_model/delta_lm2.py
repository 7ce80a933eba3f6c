"""Memory of kind `delta`: Gated DeltaNet (arXiv 2412.06464) beside self-attention, as a memory across segments.

Axes: B rows, Q new entries of a row, C entries of a chunk, D hidden size, H heads, K key width, V value width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_lm2 import LM2Config
from .layers_lm2 import LM2RMSNorm, linear
from .rows_lm2 import Layout

CHUNK = 64
LASTS = (10, 1000)  # tokens after which a new head's S has decayed by e, of the first and the last head


def gated_delta_rule(
    q_BQHK: Tensor, k_BQHK: Tensor, v_BQHV: Tensor, log_alpha_BQH: Tensor, beta_BQH: Tensor, state_BHKV: Tensor
) -> tuple[Tensor, Tensor]:
    """o [B,Q,H,V] of all entries, and S transposed after the last; all are float32.

    S_t = S_{t-1} (alpha_t (I - beta_t k_t k_t^T)) + beta_t v_t k_t^T        o_t = S_t q_t

    In a chunk that finds S_0, with G_t the sum of its log alpha up to t, entry t adds u_t k_t^T, where
    u_t = beta_t (v_t - exp(G_t) S_0 k_t - sum over j < t of exp(G_t - G_j) (k_j . k_t) u_j): a triangular system.
    """
    out = []
    arrays = (x.transpose(1, 2).split(CHUNK, dim=2) for x in (q_BQHK, k_BQHK, v_BQHV, log_alpha_BQH, beta_BQH))
    for q, k, v, log_alpha, beta in zip(*arrays, strict=True):  # [B,H,C,..]
        decay = log_alpha.cumsum(-1)
        later_CC = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
        left = (decay[..., :, None] - decay[..., None, :]).masked_fill(later_CC, -torch.inf).exp()
        left_of_start, beta = decay.exp()[..., None], beta[..., None]

        system = (k @ k.mT * left * beta).tril(-1)
        from_values, from_state = torch.linalg.solve_triangular(
            system, torch.cat([v * beta, k * left_of_start * beta], dim=-1), upper=False, unitriangular=True
        ).split([v.shape[-1], k.shape[-1]], dim=-1)
        u = from_values - from_state @ state_BHKV
        out.append((q * left_of_start) @ state_BHKV + (q @ k.mT * left) @ u)
        state_BHKV = left_of_start[..., -1:, :] * state_BHKV + (k * left[..., -1, :, None]).mT @ u
    return torch.cat(out, dim=2).transpose(1, 2), state_BHKV


class DeltaMemory(nn.Module):
    """One block's heads. Their state is of the text: where segments end is nothing to them."""

    def __init__(self, config: LM2Config) -> None:
        super().__init__()
        D, M, self.num_heads = config.hidden_size, config.memory_width, config.memory_heads
        self.query_proj, self.key_proj, self.value_proj = linear(D, M), linear(D, M), linear(D, D)
        self.beta_proj, self.decay_proj = linear(D, self.num_heads), linear(D, self.num_heads)
        self.decay_bias = nn.Parameter(torch.empty(self.num_heads))
        self.decay_rate_bias = nn.Parameter(torch.empty(self.num_heads))
        self.gate_proj, self.output_proj = linear(D, D), linear(D, D)
        self.output_norm = LM2RMSNorm(D // self.num_heads, config.rms_norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises what belongs to no sub-module: softplus of the decays is 1 / tokens that S lasts."""
        first, last = (torch.tensor(float(tokens)).log() for tokens in LASTS)
        lasts_H = torch.linspace(first, last, self.num_heads).exp()
        init.copy_(self.decay_bias, torch.expm1(1 / lasts_H).log())
        init.zeros_(self.decay_rate_bias)

    def forward(
        self, x_BQD: Tensor, attended_BQD: Tensor, layout: Layout, inputs: None, bank: Tensor, *unused: None
    ) -> tuple[Tensor | None, ...]:
        """Returns what is added to x, and the state with S [B,H,K,V] after the last entry of each row.

        q = silu(x' W_q) and k = silu(x' W_k), each of length 1;  v = silu(x' W_v);  beta = sigmoid(x' W_beta)
        alpha = exp(-exp(a) softplus(x' W_alpha + b));  x <- x + (RMSNorm(o) ⊙ silu(x' W_g)) W_o
        """

        def heads(x_BQD: Tensor) -> Tensor:
            return F.silu(x_BQD.float()).unflatten(-1, (self.num_heads, -1))

        def of_length_1(x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)

        softplus_BQH = F.softplus(self.decay_proj(x_BQD).float() + self.decay_bias.float())
        log_alpha_BQH = -self.decay_rate_bias.float().exp() * softplus_BQH
        beta_BQH = torch.sigmoid(self.beta_proj(x_BQD).float())
        if layout.take_B is not None:  # padding changes nothing
            is_padding_BQ1 = (torch.arange(x_BQD.shape[1], device=x_BQD.device) >= layout.take_B[:, None])[..., None]
            log_alpha_BQH, beta_BQH = (x.masked_fill(is_padding_BQ1, 0) for x in (log_alpha_BQH, beta_BQH))
        q_BQHK, k_BQHK = of_length_1(heads(self.query_proj(x_BQD))), of_length_1(heads(self.key_proj(x_BQD)))
        v_BQHV = heads(self.value_proj(x_BQD))
        out_BQHV, bank = gated_delta_rule(q_BQHK, k_BQHK, v_BQHV, log_alpha_BQH, beta_BQH, bank)
        gated_BQD = self.output_norm(out_BQHV).flatten(2) * F.silu(self.gate_proj(x_BQD).float())
        return self.output_proj(gated_BQD.to(x_BQD.dtype)), inputs, bank, *unused
