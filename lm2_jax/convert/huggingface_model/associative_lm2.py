"""Memory of kind `armt`: the Associative Recurrent Memory Transformer (arXiv 2407.04841).

Each block has an associative matrix A and a normaliser z. Everything that enters the block recalls from them; the m
learned memory tokens at a segment's end, as they leave the block, are stored in them. phi are DPFP-3 features (arXiv
2102.11174) of length 1. A bank is A transposed with z as its last column.

Axes: B rows, Q new entries of a row, m memory tokens, D hidden size, M key width, F = 6 M features, R some of the rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_lm2 import LM2Config
from .layers_lm2 import ZeroGradients, linear
from .rows_lm2 import Layout, replace_rows

ORDERS = (1, 2, 3)  # of DPFP-3
NUM_FEATURES = 2 * len(ORDERS)  # of each number of a key
EPS = 1e-5


def features(x: Tensor) -> Tensor:
    """DPFP-3: [..., M] to [..., 6 M] of length 1, float32 and not negative."""
    x = x.float()
    r = torch.cat([F.relu(x), F.relu(-x)], dim=-1)
    phi = torch.cat([r * r.roll(order, dims=-1) for order in ORDERS], dim=-1)
    return phi * torch.rsqrt(phi.square().sum(-1, keepdim=True) + 1e-12)


def recall(bank_BFX: Tensor, phi_BQF: Tensor) -> tuple[Tensor, Tensor]:
    """A phi / (z^T phi), float32 [B,Q,D], and z^T phi [B,Q,1], from a bank whose last column is z."""
    found_BQX = phi_BQF @ bank_BFX
    found_BQD, known_BQ1 = found_BQX[..., :-1], found_BQX[..., -1:]
    return found_BQD / (known_BQ1 + EPS), known_BQ1


class AssociativeMemory(nn.Module):
    """One block's associations, float32 [B,F,D+1]: recalled on the way in, stored on the way out."""

    def __init__(self, config: LM2Config) -> None:
        super().__init__()
        D, M = config.hidden_size, config.memory_width
        self.query_proj, self.key_proj, self.value_proj = linear(D, M), linear(D, M), linear(D, D)
        self.beta_proj = linear(D, 1)
        self.beta_bias = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A new block recalls nothing, whatever it has stored."""
        init.zeros_(self.value_proj.weight)
        init.zeros_(self.beta_bias)

    def forward(self, x_BQD: Tensor, bank: Tensor, stores: Layout | None = None) -> Tensor:
        """Recalls for everything that enters the block, and returns what is added to x; or stores, and returns banks.

        Hooks that bring weights see one call as the other.
        """
        if stores is not None:
            return self.store(x_BQD, bank, stores)
        if self.training:  # some only store
            x_BQD = ZeroGradients.apply(x_BQD, *(p for p in self.parameters() if p.requires_grad))
        return recall(bank, features(self.query_proj(x_BQD)))[0].to(x_BQD.dtype)

    def store(self, y_BmD: Tensor, bank: Tensor, layout: Layout) -> Tensor:
        """The bank after the segments that layout.writes, whose memory tokens left the block as y, by the delta rule.

        k = W_K m,  v = W_V m,  beta = sigmoid(W_beta m + b),  v_bar = A phi(k) / (z^T phi(k))
        gamma = 1 - (z^T phi(k)) / |phi(k)|^2, cut to [0, 1] and without a gradient
        A <- A + beta (v - v_bar) (x) phi(k);  z <- z + gamma phi(k)
        """
        rows = layout.writes
        y_RmD, bank_RFX = y_BmD[rows], bank[rows]
        phi_RmF = features(self.key_proj(y_RmD))
        value_RmD = self.value_proj(y_RmD).float()
        beta_Rm1 = torch.sigmoid(self.beta_proj(y_RmD).float() + self.beta_bias.float())
        before_RmD, known_Rm1 = recall(bank_RFX, phi_RmF)
        gamma_Rm1 = (1 - known_Rm1 / (phi_RmF.square().sum(-1, keepdim=True) + 1e-12)).clamp(0, 1).detach()
        change_RmX = torch.cat([beta_Rm1 * (value_RmD - before_RmD), gamma_Rm1], dim=-1)
        return replace_rows(bank, rows, bank_RFX + phi_RmF.transpose(1, 2) @ change_RmX)
