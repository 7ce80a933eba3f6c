"""Layers that are neither attention nor memory: matrices, normalisation, feed-forward and the convolution.

Axes: B rows, Q new entries of a row, C those with the ones that they look back on, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_lm2 import LM2Config
from .rows_lm2 import Layout, replace_rows


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A matrix without bias."""
    return nn.Linear(inputs, outputs, bias=False)


class ZeroGradients(torch.autograd.Function):
    """x unchanged; in the backward pass, gradients of zero for parameters that took no part, which DDP waits for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        """Returns x."""
        ctx.save_for_backward(*parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        """Returns x's gradient and a zero for each parameter."""
        return gradient, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


class LM2RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last axis, computed in float32, returned in x's dtype."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] to the same shape."""
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


class LM2MLP(nn.Module):
    """Llama's feed-forward: down(silu(gate(x)) ⊙ up(x)); no biases."""

    def __init__(self, config: LM2Config) -> None:
        super().__init__()
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D], already normalised, to the same shape."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LM2Conv(nn.Module):
    """Depthwise causal convolution: y[t] = Σ weight[back] ⊙ x[t - back]. Beyond the segment's start it sees zeros."""

    def __init__(self, config: LM2Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.conv_width, config.hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises what belongs to no sub-module."""
        init.normal_(self.weight, std=1 / len(self.weight))

    def forward(self, x_BQD: Tensor, layout: Layout, tail: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B,Q,D], already normalised, to the same shape; and the tail that later entries look back on."""
        B, Q, D = x_BQD.shape
        reach = len(self.weight) - 1
        if layout.opens is not None:
            tail = replace_rows(tail, layout.opens, x_BQD.new_zeros(B, reach, D)[layout.opens])
        if not layout.linked:
            return x_BQD * self.weight[0], tail
        x_BCD = torch.cat([tail.to(x_BQD.dtype), x_BQD], dim=1)
        y_BQD = sum(w_D * x_BCD[:, reach - back : reach - back + Q] for back, w_D in enumerate(self.weight))
        return y_BQD, layout.last(x_BCD, reach)
