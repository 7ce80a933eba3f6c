"""Memory: how a block of lm2 and of official reads and writes its bank, and what any kind starts from.

Axes: B rows, Q new entries of a row, K slots or entries that are attended to, T tokens of a whole segment,
D hidden size, N memory slots, M slot width, R some of the rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import initialization as init

from .associative_lm2 import NUM_FEATURES, AssociativeMemory
from .configuration_lm2 import LM2Config
from .delta_lm2 import DeltaMemory
from .layers_lm2 import LM2RMSNorm, ZeroGradients, linear
from .rows_lm2 import Layout, replace_rows


def attend(q_BQM: Tensor, k_BKM: Tensor, v_BKM: Tensor, num_heads: int, **options: Any) -> Tensor:
    """Multi-head attention without projections, [B,Q,M]; options of scaled_dot_product_attention."""
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q_BQM, k_BKM, v_BKM))
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(2)


def log_share(share: Tensor, dtype: torch.dtype) -> Tensor:
    """Its logarithm, for attention scores; very low where it is 0, but finite, as no token may write some slots."""
    is_open = share > 0
    return torch.where(is_open, torch.where(is_open, share, 1.0).log(), torch.finfo(dtype).min / 2).to(dtype)


class BankMemory(nn.Module):
    """Kind `lm2`: one block's bank of slots, read by its tokens and rewritten once per segment (paper, section 2).

    x' is the normalised input of the block's self-attention, Bank' the normalised bank.
    """

    def __init__(self, config: LM2Config) -> None:
        super().__init__()
        D, M, eps = config.hidden_size, config.memory_width, config.rms_norm_eps
        self.num_heads, self.segment_length = config.memory_heads, config.segment_length
        self.bank_norm = LM2RMSNorm(M, eps)

        self.read_query, self.read_key, self.read_value = linear(D, D), linear(M, D), linear(M, D)
        self.read_output = linear(D, D)
        self.output_gate = linear(D, D)
        self.output_gate_bias = nn.Parameter(torch.empty(D))

        self.write_query, self.write_key, self.write_value = linear(M, M), linear(D, M), linear(D, M)
        self.write_output = linear(M, M)
        self.router = linear(D, config.memory_slots) if config.memory_write == "top_k" else None
        self.write_slots = config.memory_write_slots

        self.candidate_norm = LM2RMSNorm(M, eps)
        self.candidate_up, self.candidate_down = linear(M, M), linear(M, M)
        self.candidate_norm_2 = LM2RMSNorm(M, eps)

        self.convex = config.memory_gates == "convex"
        for name in ("forget",) if self.convex else ("forget", "input"):
            self.register_module(f"{name}_gate", linear(M, M))
            self.register_parameter(f"{name}_gate_bias", nn.Parameter(torch.empty(M)))
            self.register_module(f"{name}_gate_bank", linear(M, M))
        self.initial_bias = {"output": 0.0, "forget": config.forget_bias, "input": config.input_bias}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises what belongs to no sub-module."""
        for name, bias in self._parameters.items():
            init.constant_(bias, self.initial_bias[name.removesuffix("_gate_bias")])

    def forward(
        self,
        x_BQD: Tensor,
        attended_BQD: Tensor,
        layout: Layout,
        inputs: Tensor | None,
        bank: Tensor,
        bank_keys: Tensor | None,
        bank_values: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Writes what a full segment left, and reads for new entries. Returns what is added to x, and the state."""
        if layout.writes is not None:
            rows, T = layout.writes, self.segment_length
            bank = replace_rows(bank, rows, self.write(inputs[rows][:, :T], bank[rows]))
        elif self.training:
            x_BQD = ZeroGradients.apply(x_BQD, *(p for p in self.parameters() if p.requires_grad))
        if layout.opens is not None:
            rows = layout.opens
            slots_RNM = self.bank_norm(bank[rows]).to(x_BQD.dtype)
            bank_keys = replace_rows(bank_keys, rows, self.read_key(slots_RNM))
            bank_values = replace_rows(bank_values, rows, self.read_value(slots_RNM))
        inputs = layout.append(inputs, x_BQD)
        return self.read(x_BQD, bank_keys, bank_values), inputs, bank, bank_keys, bank_values

    def read(self, x_BQD: Tensor, k_BND: Tensor, v_BND: Tensor) -> Tensor:
        """Tokens attend to slots (paper 2.1). Returns what is added to x.

        E_mem = MHA(q = x' W_Q, k = Bank' W_K, v = Bank' W_V) W_O;  g_out = sigmoid(E_mem W_out + b_out)
        x <- x + g_out ⊙ E_mem
        """
        e_mem_BQD = self.read_output(attend(self.read_query(x_BQD), k_BND, v_BND, self.num_heads))
        g_out_BQD = torch.sigmoid(self.output_gate(e_mem_BQD) + self.output_gate_bias)
        return g_out_BQD * e_mem_BQD

    def write(self, x_RTD: Tensor, bank_RNM: Tensor) -> Tensor:
        """Slots attend to a whole segment, and gates mix in what they found (paper 2.2). Returns the new bank.

        U = MHA(q = Bank' W'_Q, k = x' W'_K, v = x' W'_V) W'_O
        C_1 = RMSNorm(Bank' + U);  C = RMSNorm(C_1 + silu(C_1 W_up) W_down)
        g_f = sigmoid(U W_f + tanh(Bank) W'_f + b_f);  g_in = 1 - g_f, or sigmoid(U W_i + tanh(Bank) W'_i + b_i)
        Bank <- g_in ⊙ tanh(C) + g_f ⊙ Bank

        With a router, the attention weights of U are multiplied by `route`, before they are made to add up to 1, and
        the change of a slot by its largest.
        """
        slots_RNM = self.bank_norm(bank_RNM).to(x_RTD.dtype)

        # The update that tokens give
        q_RNM, k_RTM, v_RTM = self.write_query(slots_RNM), self.write_key(x_RTD), self.write_value(x_RTD)
        share_RNT = None if self.router is None else self.route(x_RTD)
        bias_R1NT = None if share_RNT is None else log_share(share_RNT, q_RNM.dtype)[:, None]
        u_RNM = self.write_output(attend(q_RNM, k_RTM, v_RTM, self.num_heads, attn_mask=bias_R1NT))

        # The candidate
        c_RNM = self.candidate_norm(slots_RNM + u_RNM)
        c_RNM = self.candidate_norm_2(c_RNM + self.candidate_down(F.silu(self.candidate_up(c_RNM))))

        # The gates
        tanh_bank_RNM = torch.tanh(bank_RNM).to(x_RTD.dtype)

        def gate(name: str) -> Tensor:
            from_update_RNM = getattr(self, f"{name}_gate")(u_RNM).float()
            from_bank_RNM = getattr(self, f"{name}_gate_bank")(tanh_bank_RNM).float()
            return torch.sigmoid(from_update_RNM + from_bank_RNM + getattr(self, f"{name}_gate_bias").float())

        g_f_RNM = gate("forget")
        g_in_RNM = 1 - g_f_RNM if self.convex else gate("input")
        new_RNM = g_in_RNM * torch.tanh(c_RNM.float()) + g_f_RNM * bank_RNM
        if share_RNT is None:
            return new_RNM
        return bank_RNM + share_RNT.amax(-1, keepdim=True) * (new_RNM - bank_RNM)

    def route(self, x_RTD: Tensor) -> Tensor:
        """How much each token may write each slot, float32 [R,N,T]: sigmoid(x' W_router) for its best, else 0."""
        share_RTN = torch.sigmoid(self.router(x_RTD).float())
        best_RTk = share_RTN.topk(self.write_slots, dim=-1).indices
        chosen_RTN = torch.zeros_like(share_RTN).scatter(-1, best_RTk, 1.0)
        return (share_RTN * chosen_RTN).transpose(1, 2)


class OfficialGates(nn.Module):
    """linear(x) for the input and the forget gate; with a scale w, linear of the mean over tokens of relu(w ⊙ x)."""

    def __init__(self, width: int, pooled: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2 * width)
        self.w = nn.Parameter(torch.empty(width)) if pooled else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises what belongs to no sub-module."""
        if self.w is not None:
            init.normal_(self.w)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,_,N] to [B,_ or 1,2N]."""
        return self.linear(x if self.w is None else F.relu(self.w * x).mean(dim=1, keepdim=True))


class OfficialMemory(nn.Module):
    """Kind `official`: the published code's memory. One bank [B,N,N] runs through all blocks; N = T = D.

    Position t adds row t of the *new* bank. The gates that wrote it saw the mean over *all* tokens, so earlier
    positions learn about later ones.
    """

    def __init__(self, config: LM2Config) -> None:
        super().__init__()
        N, self.num_heads, self.dropout = config.hidden_size, config.memory_heads, config.memory_dropout
        self.query_proj, self.key_proj, self.value_proj = nn.Linear(N, N), nn.Linear(N, N), nn.Linear(N, N)
        self.attention_mlp = nn.Linear(N, N)
        self.attended_memory_layernorm, self.attended_memory_layernorm2 = nn.LayerNorm(N), nn.LayerNorm(N)
        self.input_gate_projector = OfficialGates(N, pooled=True)
        self.memory_gate_projector = OfficialGates(N, pooled=False)
        self.forget_bias, self.input_bias = nn.Parameter(torch.empty(())), nn.Parameter(torch.empty(()))
        self.initial_bias = {"forget_bias": config.forget_bias, "input_bias": config.input_bias}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises what belongs to no sub-module."""
        for name, bias in self._parameters.items():
            init.constant_(bias, self.initial_bias[name])

    def forward(
        self, x_BTD: Tensor, a_BTD: Tensor, layout: Layout, inputs: None, bank: Tensor, *unused: None
    ) -> tuple[Tensor | None, ...]:
        """Rewrites the bank M from what attention gave, a. Returns the new bank, as what is added to x, and the state.

        A = MHA(q = a W_Q, k = M W_K, v = M W_V), token t to slots j <= t;  Y = LN(M + A);  C = LN(Y + mlp(mlp(Y)))
        g_in, g_f = sigmoid(linear(mean over tokens of relu(w ⊙ a)) + linear(tanh(M)) + biases)
        M <- g_in ⊙ tanh(C) + g_f ⊙ M
        """
        m_BND = bank.to(a_BTD.dtype)
        q_BTD, k_BND, v_BND = self.query_proj(a_BTD), self.key_proj(m_BND), self.value_proj(m_BND)
        dropout = self.dropout if self.training else 0.0
        y_BND = m_BND + attend(q_BTD, k_BND, v_BND, self.num_heads, is_causal=True, dropout_p=dropout)
        y_BND = self.attended_memory_layernorm(y_BND)
        mlp_BND = F.relu(self.attention_mlp(F.relu(self.attention_mlp(y_BND))))  # one matrix, twice
        c_BND = self.attended_memory_layernorm2(y_BND + mlp_BND)

        gates = self.input_gate_projector(a_BTD) + self.memory_gate_projector(torch.tanh(m_BND))
        g_in, g_f = gates.chunk(2, dim=-1)
        g_in, g_f = torch.sigmoid(g_in + self.input_bias), torch.sigmoid(g_f + self.forget_bias)
        bank = g_in.float() * torch.tanh(c_BND.float()) + g_f.float() * bank
        return bank.to(a_BTD.dtype), inputs, bank, *unused


BANKS = {"lm2": BankMemory, "armt": AssociativeMemory, "delta": DeltaMemory}  # the kinds with a bank in each block


class LM2StartMemory(nn.Module):
    """Memory at a text's start: lm2's fixed bank [N,M], official's banks [rows,N,N], or rmt's learned tokens [N,D].

    Kind armt has learned tokens, too, which stand after every segment.
    """

    def __init__(self, config: LM2Config) -> None:
        super().__init__()
        self.config, self.has_tokens = config, config.memory_kind in ("rmt", "armt")
        N, M = config.memory_slots, config.memory_width
        if self.has_tokens:
            self.tokens = nn.Parameter(torch.empty(N, config.hidden_size))
        else:
            shape = (config.memory_rows, N, N) if config.memory_kind == "official" else (N, M)
            self.register_buffer("bank", torch.empty(shape, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws tokens, or fills the bank with rows of the identity, and random ones of norm 1 after the last.

        Exported models carry lm2_jax's own rows instead.
        """
        if self.has_tokens:
            init.normal_(self.tokens, std=self.config.initializer_range)
            return
        N, M = self.bank.shape[-2:]
        extra_NM = torch.randn(max(N - M, 0), M, generator=torch.Generator().manual_seed(0))
        start_NM = torch.cat([torch.eye(min(N, M), M), F.normalize(extra_NM, dim=-1)])
        init.copy_(self.bank, start_NM.expand_as(self.bank))

    def forward(self, rows: int) -> Tensor:
        """Memory of as many rows [B,N,_]; a bank in float32. Raises ValueError if it was kept for other rows."""
        if self.has_tokens:
            return self.tokens.expand(rows, -1, -1)
        if self.bank.dim() == 3 and len(self.bank) not in (1, rows):
            raise ValueError(f"the start memory of this model has {len(self.bank)} rows, but the input has {rows}")
        return self.bank.float().expand(rows, -1, -1)


def block_memory(config: LM2Config, index: int) -> nn.Module | None:
    """The memory of a block, if it has any."""
    if config.memory_kind == "official":
        return OfficialMemory(config)
    has_bank = config.memory_kind in BANKS and index in config.bank_layers
    return BANKS[config.memory_kind](config) if has_bank else None


def memory_at_start(config: LM2Config, start: LM2StartMemory | None, rows: int, device: torch.device) -> Tensor:
    """Memory of `rows` texts that begin, [B,...]: what the model holds, or zeros for armt's and delta's banks."""
    if config.memory_kind == "armt":
        return torch.zeros(rows, NUM_FEATURES * config.memory_width, config.hidden_size + 1, device=device)
    if config.memory_kind == "delta":
        H = config.memory_heads
        return torch.zeros(rows, H, config.memory_width // H, config.hidden_size // H, device=device)
    return start(rows)
