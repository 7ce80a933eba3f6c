"""LM2 and its relatives in PyTorch, as lm2_jax trains them, for transformers >= 5.4.

Text is cut into segments of T tokens; attention sees one segment, and memory is the only link between them.

Axes: B rows, C columns of the input, Q new entries of a row, L entries of its unfinished segment, D hidden size,
H heads, G kv heads, K head width, N memory slots, M slot width, V vocabulary, R some of the rows, W convolution width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .configuration_lm2 import LM2Config

# ---------- State between calls --------------------------------------------------------------------------------------


State = dict[str, Tensor]  # in every tensor the rows come first


class LM2Cache(Cache):
    """Memory and unfinished segment of every row. The model fills an empty cache.

    Attributes:
      seen: columns of input so far, padding included.
      shared: "held" [B] entries of the unfinished segment (rmt: with its front memory tokens); rmt and official:
        "memory" [B,N,D].
      blocks: for each block the unfinished segment's "keys" and "values" [B,L,G,K], of which row b has filled the
        first held[b]; the convolution's "tail" [B,W-1,D]; where there is a bank, "bank" [B,N,M] float32 as the
        previous segments left it, and "inputs" [B,L,D], from which it will be written.
    """

    is_linear = (False,)  # transformers: generate() may be given tokens that the cache has seen
    is_croppable = False

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.seen: int = 0
        self.shared: State = {}
        self.blocks: list[State] = []

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of input so far, padding included."""
        return self.seen

    @property
    def batch_size(self) -> int:
        """B, or -1 before the first call."""
        return len(self.shared["held"]) if self.shared else -1

    def crop(self, tokens_to_remove: int) -> None:
        """Not possible: a segment that has been written cannot be unwritten. Raises NotImplementedError."""
        raise NotImplementedError("LM2 cannot unread text, so no assisted decoding: keep a copy.deepcopy of the cache")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replaces row b by row beam_idx[b]."""
        self._change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows that indices (numbers or a mask) select."""
        self._change(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row `repeats` times."""
        self._change(lambda x: x.repeat_interleave(repeats, dim=0))

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        self.shared, *self.blocks = [{n: change(x) for n, x in s.items()} for s in (self.shared, *self.blocks)]


def given(cache: LM2Cache | None, past_key_values: LM2Cache | None) -> LM2Cache:
    """The cache under its name since transformers 5.24 or the one before; an empty one if there is none."""
    return next((c for c in (cache, past_key_values) if c is not None), LM2Cache())


@dataclass
class Layout:
    """Positions of new entries in each row's unfinished segment, the same for all blocks.

    Attributes:
      take_B: number of the Q new entries that are the row's; the others are padding that no real entry sees.
      source_BL: the entries of the segment from now on, as indices into [held entries | new ones].
      seen_B1QL: which of them a new entry attends to: itself and those before it.
      cos_BQ1K, sin_BQ1K: rotation of each pair of features, float32, K/2 of them.
      linked: True if the entries follow each other in the text; rmt's memory tokens do not.
    """

    take_B: Tensor
    source_BL: Tensor
    seen_B1QL: Tensor
    cos_BQ1K: Tensor
    sin_BQ1K: Tensor
    linked: bool

    def append(self, held: Tensor, new: Tensor) -> Tensor:
        """held [B,_,...] and new [B,Q,...] entries to those of the segment from now on, [B,L,...]."""
        return take_entries(torch.cat([held.to(new.dtype), new], dim=1), self.source_BL)

    def rotate(self, x_BQHK: Tensor) -> Tensor:
        """Rotary position embedding, rotate-half form: feature i pairs with feature i + K/2."""
        first, second = x_BQHK.float().chunk(2, dim=-1)
        cos, sin = self.cos_BQ1K, self.sin_BQ1K
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BQHK.dtype)


def take_entries(x: Tensor, index_BQ: Tensor) -> Tensor:
    """Takes row b's entries index_BQ[b] of x [B,_,...], [B,Q,...]."""
    return x[torch.arange(len(x), device=x.device)[:, None], index_BQ]


# ---------- The parts of a Llama block -------------------------------------------------------------------------------


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A matrix without bias."""
    return nn.Linear(inputs, outputs, bias=False)


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


class LM2Attention(nn.Module):
    """Grouped-query causal self-attention within the segment, with RoPE; no biases. Always SDPA."""

    def __init__(self, config: LM2Config) -> None:
        super().__init__()
        D, self.head_dim = config.hidden_size, config.head_dim
        self.q_proj = linear(D, config.num_attention_heads * self.head_dim)
        self.k_proj = linear(D, config.num_key_value_heads * self.head_dim)
        self.v_proj = linear(D, config.num_key_value_heads * self.head_dim)
        self.o_proj = linear(config.num_attention_heads * self.head_dim, D)

    def forward(self, x_BQD: Tensor, layout: Layout, block: State) -> Tensor:
        """x [B,Q,D], already normalised, to the same shape; its keys and values join the block's state."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q_BQHK, k_BQGK, v_BQGK = (project(x_BQD).unflatten(-1, (-1, self.head_dim)) for project in projections)
        block["keys"] = layout.append(block["keys"], layout.rotate(k_BQGK))
        block["values"] = layout.append(block["values"], v_BQGK)
        q, k, v = (x.transpose(1, 2) for x in (layout.rotate(q_BQHK), block["keys"], block["values"]))
        attended_BHQK = F.scaled_dot_product_attention(q, k, v, attn_mask=layout.seen_B1QL, enable_gqa=True)
        return self.o_proj(attended_BHQK.transpose(1, 2).flatten(2))


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

    def forward(self, x_BQD: Tensor, layout: Layout, block: State) -> Tensor:
        """x [B,Q,D], already normalised, to the same shape; the block's state keeps what later entries look back on."""
        if not layout.linked:
            return x_BQD * self.weight[0]
        Q, reach = x_BQD.shape[1], len(self.weight) - 1
        x_BCD = torch.cat([block["tail"].to(x_BQD.dtype), x_BQD], dim=1)
        block["tail"] = take_entries(x_BCD, layout.take_B[:, None] + torch.arange(reach, device=x_BQD.device))
        return sum(w_D * x_BCD[:, reach - back : reach - back + Q] for back, w_D in enumerate(self.weight))


# ---------- Memory ---------------------------------------------------------------------------------------------------


def attend(q_BQM: Tensor, k_BKM: Tensor, v_BKM: Tensor, num_heads: int, **options: Any) -> Tensor:
    """Multi-head attention without projections, [B,Q,M]; options of scaled_dot_product_attention."""
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q_BQM, k_BKM, v_BKM))
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(2)


def initial_bank(num_slots: int, width: int) -> Tensor:
    """Rows of the identity, then random rows of norm 1, [N,M]. Exported models carry lm2_jax's own rows instead."""
    generator = torch.Generator().manual_seed(0)
    extra_NM = torch.randn(max(num_slots - width, 0), width, generator=generator)
    return torch.cat([torch.eye(min(num_slots, width), width), F.normalize(extra_NM, dim=-1)])


class BankMemory(nn.Module):
    """Kind `lm2`: one block's bank of slots, read by its tokens and rewritten once per segment (paper, section 2).

    x' is the normalised input of the block's self-attention, Bank' the normalised bank.
    """

    def __init__(self, config: LM2Config) -> None:
        super().__init__()
        D, M, eps = config.hidden_size, config.memory_width, config.rms_norm_eps
        self.num_heads = config.memory_heads
        self.bank_norm = LM2RMSNorm(M, eps)

        self.read_query, self.read_key, self.read_value = linear(D, D), linear(M, D), linear(M, D)
        self.read_output = linear(D, D)
        self.output_gate = linear(D, D)
        self.output_gate_bias = nn.Parameter(torch.empty(D))

        self.write_query, self.write_key, self.write_value = linear(M, M), linear(D, M), linear(D, M)
        self.write_output = linear(M, M)

        self.candidate_norm = LM2RMSNorm(M, eps)
        self.candidate_up, self.candidate_down = linear(M, M), linear(M, M)
        self.candidate_norm_2 = LM2RMSNorm(M, eps)

        self.convex = config.memory_gates == "convex"
        for name in ("forget",) if self.convex else ("forget", "input"):
            self.register_module(f"{name}_gate", linear(M, M))
            self.register_parameter(f"{name}_gate_bias", nn.Parameter(torch.empty(M)))
            self.register_module(f"{name}_gate_bank", linear(M, M))

    def forward(self, x_BQD: Tensor, attended_BQD: Tensor, layout: Layout, shared: State, block: State) -> Tensor:
        """Tokens attend to slots (paper 2.1). Returns what is added to x.

        E_mem = MHA(q = x' W_Q, k = Bank' W_K, v = Bank' W_V) W_O;  g_out = sigmoid(E_mem W_out + b_out)
        x <- x + g_out ⊙ E_mem
        """
        block["inputs"] = layout.append(block["inputs"], x_BQD)
        slots_BNM = self.bank_norm(block["bank"]).to(x_BQD.dtype)
        e_mem_BQD = attend(self.read_query(x_BQD), self.read_key(slots_BNM), self.read_value(slots_BNM), self.num_heads)
        e_mem_BQD = self.read_output(e_mem_BQD)
        g_out_BQD = torch.sigmoid(self.output_gate(e_mem_BQD) + self.output_gate_bias)
        return g_out_BQD * e_mem_BQD

    def write(self, x_RTD: Tensor, bank_RNM: Tensor) -> Tensor:
        """Slots attend to a whole segment, and gates mix in what they found (paper 2.2). Returns the new bank.

        U = MHA(q = Bank' W'_Q, k = x' W'_K, v = x' W'_V) W'_O
        C_1 = RMSNorm(Bank' + U);  C = RMSNorm(C_1 + silu(C_1 W_up) W_down)
        g_f = sigmoid(U W_f + tanh(Bank) W'_f + b_f);  g_in = 1 - g_f, or sigmoid(U W_i + tanh(Bank) W'_i + b_i)
        Bank <- g_in ⊙ tanh(C) + g_f ⊙ Bank
        """
        slots_RNM = self.bank_norm(bank_RNM).to(x_RTD.dtype)

        # The update that tokens give
        u_RNM = attend(self.write_query(slots_RNM), self.write_key(x_RTD), self.write_value(x_RTD), self.num_heads)
        u_RNM = self.write_output(u_RNM)

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
        return g_in_RNM * torch.tanh(c_RNM.float()) + g_f_RNM * bank_RNM


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
        self.input_gate_projector = nn.ModuleDict({"linear": nn.Linear(N, 2 * N)})
        self.input_gate_projector.w = nn.Parameter(torch.empty(N))
        self.memory_gate_projector = nn.ModuleDict({"linear": nn.Linear(N, 2 * N)})
        self.forget_bias, self.input_bias = nn.Parameter(torch.empty(())), nn.Parameter(torch.empty(()))

    def forward(self, x_BTD: Tensor, a_BTD: Tensor, layout: Layout, shared: State, block: State) -> Tensor:
        """Rewrites the bank M from what attention gave, a. Returns the new bank, as what is added to x.

        A = MHA(q = a W_Q, k = M W_K, v = M W_V), token t to slots j <= t;  Y = LN(M + A);  C = LN(Y + mlp(mlp(Y)))
        g_in, g_f = sigmoid(linear(mean over tokens of relu(w ⊙ a)) + linear(tanh(M)) + biases)
        M <- g_in ⊙ tanh(C) + g_f ⊙ M
        """
        m_BND = shared["memory"].to(a_BTD.dtype)
        q_BTD, k_BND, v_BND = self.query_proj(a_BTD), self.key_proj(m_BND), self.value_proj(m_BND)
        dropout = self.dropout if self.training else 0.0
        y_BND = m_BND + attend(q_BTD, k_BND, v_BND, self.num_heads, is_causal=True, dropout_p=dropout)
        y_BND = self.attended_memory_layernorm(y_BND)
        mlp_BND = F.relu(self.attention_mlp(F.relu(self.attention_mlp(y_BND))))  # one matrix, twice
        c_BND = self.attended_memory_layernorm2(y_BND + mlp_BND)

        pooled_B1D = F.relu(self.input_gate_projector.w * a_BTD).mean(dim=1, keepdim=True)
        of_input = self.input_gate_projector["linear"](pooled_B1D)
        g_in, g_f = (of_input + self.memory_gate_projector["linear"](torch.tanh(m_BND))).chunk(2, dim=-1)
        g_in, g_f = torch.sigmoid(g_in + self.input_bias), torch.sigmoid(g_f + self.forget_bias)
        shared["memory"] = g_in.float() * torch.tanh(c_BND.float()) + g_f.float() * shared["memory"]
        return shared["memory"].to(a_BTD.dtype)


# ---------- The decoder ----------------------------------------------------------------------------------------------


class LM2Layer(nn.Module):
    """A Llama block: convolution and memory if it has them, attention, feed-forward."""

    def __init__(self, config: LM2Config, index: int) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.conv_norm = LM2RMSNorm(D, eps) if config.conv_width else None
        self.conv = LM2Conv(config) if config.conv_width else None
        self.input_layernorm = LM2RMSNorm(D, eps)
        self.self_attn = LM2Attention(config)
        self.memory = None
        if config.memory_kind == "lm2" and index < config.memory_layers:
            self.memory = BankMemory(config)
        if config.memory_kind == "official":
            self.memory = OfficialMemory(config)
        self.post_attention_layernorm = LM2RMSNorm(D, eps)
        self.mlp = LM2MLP(config)

    def forward(self, x_BQD: Tensor, layout: Layout, shared: State, block: State) -> Tensor:
        """x [B,Q,D] to the same shape; the cache's states take in what later entries need."""
        if self.conv is not None:
            x_BQD = x_BQD + self.conv(self.conv_norm(x_BQD), layout, block)
        normed_BQD = self.input_layernorm(x_BQD)
        attended_BQD = self.self_attn(normed_BQD, layout, block)
        x_BQD = x_BQD + attended_BQD
        if self.memory is not None:
            x_BQD = x_BQD + self.memory(normed_BQD, attended_BQD, layout, shared, block)
        return x_BQD + self.mlp(self.post_attention_layernorm(x_BQD))


class LM2PreTrainedModel(PreTrainedModel):
    """Settings that transformers needs of both models below."""

    config_class = LM2Config
    base_model_prefix = "model"
    _no_split_modules = ["LM2Layer"]  # noqa: RUF012
    _supports_sdpa = True  # and nothing else
    _keep_in_fp32_modules_strict = ["initial_bank", "memory_bank"]  # noqa: RUF012
    _is_stateful = True  # no assisted decoding: a bank cannot be unwritten

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # matrices and embeddings normal, norms 1, biases 0
        c = self.config
        if isinstance(module, LM2Conv):
            init.normal_(module.weight, std=1 / c.conv_width)
        elif isinstance(module, BankMemory):
            init.zeros_(module.output_gate_bias)
            init.constant_(module.forget_gate_bias, c.forget_bias)
            if not module.convex:
                init.constant_(module.input_gate_bias, c.input_bias)
        elif isinstance(module, OfficialMemory):
            init.normal_(module.input_gate_projector.w)
            init.constant_(module.forget_bias, c.forget_bias)
            init.constant_(module.input_bias, c.input_bias)
        elif isinstance(module, LM2Model) and c.memory_kind == "lm2":
            init.copy_(module.initial_bank, initial_bank(c.memory_slots, c.memory_width))
        elif isinstance(module, LM2Model) and c.memory_kind == "rmt":
            init.normal_(module.memory_tokens, std=c.initializer_range)
        elif isinstance(module, LM2Model) and c.memory_kind == "official":
            init.copy_(module.memory_bank, torch.eye(c.memory_slots).expand(c.memory_rows, -1, -1))


class LM2Model(LM2PreTrainedModel):
    """The decoder over text of any length: the recurrence over segments, each row on its own clock."""

    def __init__(self, config: LM2Config) -> None:
        super().__init__(config)
        N, M, D = config.memory_slots, config.memory_width, config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, D)
        self.layers = nn.ModuleList(LM2Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = LM2RMSNorm(D, config.rms_norm_eps)
        if config.memory_kind == "lm2":
            self.register_buffer("initial_bank", torch.empty(N, M))
        if config.memory_kind == "rmt":
            self.memory_tokens = nn.Parameter(torch.empty(N, D))
        if config.memory_kind == "official":
            self.register_buffer("memory_bank", torch.empty(config.memory_rows, N, N))
        self.num_memory_tokens = N if config.memory_kind == "rmt" else 0
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: LM2Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: LM2Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the final norm [B,C,D] (zeros under padding), and the cache.

        Args: see `LM2ForCausalLM.forward`.
        """
        if kwargs.get("position_ids") is not None:
            raise ValueError("LM2 takes no position_ids: positions restart at 0 in every segment of every row")
        if kwargs.get("output_attentions") or kwargs.get("output_hidden_states"):
            raise ValueError("LM2 returns neither attentions nor hidden states of its layers")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x_BCD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        real_BC = self._real_tokens(x_BCD, attention_mask)
        cache = self._ready(given(cache, past_key_values), x_BCD)
        full, device = self.config.segment_length + self.num_memory_tokens, x_BCD.device

        column_BC = torch.argsort(~real_BC, dim=1, stable=True)  # where each row's real tokens are, in turn
        rank_BC = real_BC.cumsum(dim=1) - 1  # and the other way round
        total_B, done_B = real_BC.sum(dim=1), torch.zeros_like(column_BC[:, 0])
        hidden, width, source_BC = [torch.zeros_like(x_BCD[:, :1])], 1, torch.zeros_like(column_BC)
        while (more_B := done_B < total_B).any():
            full_B = more_B & (cache.shared["held"] == full)
            if full_B.any():
                self._end_segment(cache, full_B)
            take_B = torch.minimum(total_B - done_B, full - cache.shared["held"])
            rank_BQ = done_B[:, None] + torch.arange(int(take_B.max()), device=device)
            column_BQ = take_entries(column_BC, rank_BQ.clamp(max=x_BCD.shape[1] - 1))
            hidden.append(self._run(take_entries(x_BCD, column_BQ), take_B, cache, linked=True))

            index_BC = rank_BC - done_B[:, None]  # where a column's token is among the new hidden states
            taken_BC = real_BC & (index_BC >= 0) & (index_BC < take_B[:, None])
            source_BC = torch.where(taken_BC, width + index_BC, source_BC)
            width, done_B = width + rank_BQ.shape[1], done_B + take_B

        cache.seen += x_BCD.shape[1]
        use_cache = self.config.use_cache if use_cache is None else use_cache
        return BaseModelOutputWithPast(take_entries(torch.cat(hidden, 1), source_BC), cache if use_cache else None)

    def _real_tokens(self, x_BCD: Tensor, attention_mask: Tensor | None) -> Tensor:
        """True for columns that are not padding, bool [B,C]. Raises ValueError for inputs the model cannot read."""
        B, C, T = *x_BCD.shape[:2], self.config.segment_length
        real_BC = torch.ones(B, C, dtype=torch.bool, device=x_BCD.device)
        if attention_mask is not None:
            shape = tuple(attention_mask.shape)
            if len(shape) != 2 or shape[0] != B or shape[1] < C:
                raise ValueError(f"attention_mask {shape} should be [{B}, {C}], or [{B}, columns seen so far + {C}]")
            real_BC = attention_mask[:, shape[1] - C :].to(real_BC)
        if self.config.memory_kind == "official" and (C % T or not real_BC.all()):
            raise ValueError(
                f"memory_kind official reads whole segments of {T} tokens without padding, not {C} columns: "
                "its gates see all tokens of a segment, and its bank has one row for each"
            )
        return real_BC

    def _ready(self, cache: LM2Cache, x_BCD: Tensor) -> LM2Cache:
        """Returns the cache; an empty one is filled, with every row at a text's start."""
        c, B, D = self.config, len(x_BCD), x_BCD.shape[-1]
        if not isinstance(cache, LM2Cache) or cache.batch_size not in (-1, B):
            raise ValueError(f"cache should be an LM2Cache of {B} rows, as an earlier forward returned it")
        if cache.shared:
            return cache
        if c.memory_kind == "official" and c.memory_rows not in (1, B):
            raise ValueError(f"the start memory of this model has {c.memory_rows} rows, but the input has {B}")
        cache.shared["held"] = torch.zeros(B, dtype=torch.long, device=x_BCD.device)
        if c.memory_kind in ("rmt", "official"):
            start_BND = self.memory_tokens[None].to(x_BCD.dtype) if c.memory_kind == "rmt" else self.memory_bank.float()
            cache.shared["memory"] = start_BND.expand(B, -1, -1)
        for layer in self.layers:
            no_entries = x_BCD.new_zeros(B, 0, c.num_key_value_heads, c.head_dim)
            block = {"keys": no_entries, "values": no_entries}
            if layer.conv is not None:
                block["tail"] = x_BCD.new_zeros(B, c.conv_width - 1, D)
            if isinstance(layer.memory, BankMemory):
                block["inputs"], block["bank"] = x_BCD.new_zeros(B, 0, D), self.initial_bank.float().expand(B, -1, -1)
            cache.blocks.append(block)
        self._begin_segment(cache, torch.ones_like(cache.shared["held"], dtype=torch.bool))
        return cache

    def _begin_segment(self, cache: LM2Cache, begin_B: Tensor) -> None:
        """Empties the segments of the rows begin_B; rmt: only the front memory tokens remain."""
        cache.shared["held"] = cache.shared["held"].masked_fill(begin_B, 0)
        for block in cache.blocks:
            if "tail" in block:
                block["tail"] = block["tail"].masked_fill(begin_B[:, None, None], 0)
        if self.num_memory_tokens:
            self._run(cache.shared["memory"], begin_B * self.num_memory_tokens, cache, linked=False)

    def _end_segment(self, cache: LM2Cache, full_B: Tensor) -> None:
        """Writes the memory of the rows full_B and begins their next segments, when their next token arrives."""
        rows_R = full_B.nonzero()[:, 0]
        for layer, block in zip(self.layers, cache.blocks, strict=True):
            if "bank" in block:
                inputs_RTD = block["inputs"][rows_R, : self.config.segment_length]
                written_RNM = layer.memory.write(inputs_RTD, block["bank"][rows_R])
                block["bank"] = block["bank"].index_copy(0, rows_R, written_RNM)
        if self.config.memory_kind == "rmt":  # what the last layer makes of the back memory tokens
            memory_BmD = cache.shared["memory"]
            after_BmD = self._run(memory_BmD, full_B * self.num_memory_tokens, cache, linked=False)
            cache.shared["memory"] = torch.where(full_B[:, None, None], after_BmD, memory_BmD)
        if self.config.memory_kind == "official":
            cache.shared["memory"] = cache.shared["memory"].detach()
        self._begin_segment(cache, full_B)

    def _run(self, x_BQD: Tensor, take_B: Tensor, cache: LM2Cache, linked: bool) -> Tensor:
        """Runs all layers over new entries of the rows' unfinished segments, which have room for them.

        Args:
          x_BQD: embeddings, of which the first take_B[b] are row b's.
          linked: tokens of the text; else rmt's memory tokens, at position 0, where RoPE does not rotate them.

        Returns:
          hidden states after the final norm [B,Q,D].
        """
        held_B, device = cache.shared["held"], x_BQD.device
        old, Q = cache.blocks[0]["keys"].shape[1], x_BQD.shape[1]
        entry_BQ = held_B[:, None] + torch.arange(Q, device=device)
        entry_L = torch.arange(int((held_B + take_B).max()), device=device)
        new_BL = (old + entry_L - held_B[:, None]).clamp(max=old + Q - 1)
        position_BQ = (entry_BQ - self.num_memory_tokens) * linked
        angle_BQ1K = position_BQ[..., None, None] * rope_frequencies(self.config, device)
        layout = Layout(
            take_B=take_B,
            source_BL=torch.where(entry_L < held_B[:, None], entry_L, new_BL),
            seen_B1QL=(entry_L <= entry_BQ[..., None])[:, None],
            cos_BQ1K=angle_BQ1K.cos(),
            sin_BQ1K=angle_BQ1K.sin(),
            linked=linked,
        )
        for layer, block in zip(self.layers, cache.blocks, strict=True):
            x_BQD = layer(x_BQD, layout, cache.shared, block)
        cache.shared["held"] = held_B + take_B
        return self.norm(x_BQD)


class LM2ForCausalLM(LM2PreTrainedModel, GenerationMixin):
    """LM2 with a language-modelling head: forward, `generate()`, and training through segments with labels.

    Text of any length can be passed in one call, or in pieces of any size that share a cache. So a book can be read and
    asked about at the cost of one segment's attention:

        cache = None
        with torch.no_grad():
            for piece in book_1C.split(4096, dim=1):
                cache = model(piece, cache=cache, logits_to_keep=1).cache
        seen = torch.ones(1, cache.get_seq_length() + question_1C.shape[1])
        answer = model.generate(question_1C, attention_mask=seen, cache=copy.deepcopy(cache))

    The mask tells generate() that the question alone is new; the copy keeps the memory of the book as it was.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LM2Config) -> None:
        super().__init__(config)
        self.model = LM2Model(config)
        self.lm_head = linear(config.hidden_size, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: LM2Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: LM2Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of every column, as if each row stood alone and began at its first real token.

        Args:
          input_ids: token ids [B,C]; or pass inputs_embeds [B,C,D] instead.
          attention_mask: [B,C], or [B, columns seen so far + C]: 0 where there is padding, on whichever side. It is
            not seen, not written, and does not count towards a segment.
          cache: what the previous call returned; it is changed. None: the text starts here. Gradients flow through it.
            Before transformers 5.24 arguments and outputs call it past_key_values.
          labels: [B,C]; shifted here, -100 is left out of the loss.
          use_cache: whether to return the cache. Logits do not depend on it.
          logits_to_keep: number of last columns to return logits for, or their indices; 0: all columns.

        Returns:
          loss (with labels), logits [B,C,V] and cache. Raises ValueError for inputs that the model cannot read.
        """
        cache = given(cache, past_key_values)
        hidden_BCD, *_ = self.model(input_ids, attention_mask, cache, inputs_embeds, return_dict=False, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BCV = self.lm_head(hidden_BCD[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits_BCV, labels, vocab_size=self.config.vocab_size, **kwargs)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        return CausalLMOutputWithPast(loss, logits_BCV, cache if use_cache else None)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Does what transformers' generate() does. Raises NotImplementedError for kind `official`."""
        if self.config.memory_kind == "official":
            raise NotImplementedError(
                "memory_kind official cannot generate: its gates see all tokens of a segment, later ones too, so it "
                "reads whole segments and says nothing about the next token of an unfinished one"
            )
        return super().generate(*args, **kwargs)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes an LM2Cache instead
