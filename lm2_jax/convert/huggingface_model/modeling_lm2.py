"""LM2 and its relatives in PyTorch, as lm2_jax trains them, for transformers >= 5.4.

Text is cut into segments of T tokens; attention sees one segment, and memory is the only link between them, unless a
window of attention reaches over their edges. A block is a function of new entries and its state,
`x, *state = layer(x, layout, *state)`, and the model a loop over segments.

Places of tokens are in rows_lm2.py, the parts of a block in attention_lm2.py, memory_lm2.py and layers_lm2.py.

Axes: B rows, C columns of the input, Q new entries of a row, L entries of its unfinished segment, D hidden size,
N memory slots, M slot width, V vocabulary, R some of the rows, P columns in the order in which they are read.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .adapter_lm2 import put_onto, read_adapter
from .associative_lm2 import AssociativeMemory
from .attention_lm2 import LM2Attention, LM2WindowAttention, rotation, window_layout
from .configuration_lm2 import LM2Config
from .layers_lm2 import LM2MLP, LM2Conv, LM2RMSNorm, ZeroGradients, linear
from .memory_lm2 import BANKS, LM2StartMemory, OfficialGates, OfficialMemory, block_memory, memory_at_start
from .rows_lm2 import (
    ALL,
    Block,
    Layout,
    LM2Cache,
    Rows,
    Run,
    Texts,
    cut_at_segment_ends,
    given,
    read_texts,
    replace_rows,
    rows_where,
)


class LM2Layer(GradientCheckpointingLayer):
    """A Llama block: convolution and memory if it has them, attention, feed-forward.

    A function of what it is given: hooks may copy its arguments, and checkpointing may call it again.
    """

    def __init__(self, config: LM2Config, index: int) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.conv_norm = LM2RMSNorm(D, eps) if config.conv_width else None
        self.conv = LM2Conv(config) if config.conv_width else None
        self.input_layernorm = LM2RMSNorm(D, eps)
        self.self_attn = (LM2Attention if config.window is None else LM2WindowAttention)(config)
        self.memory = block_memory(config, index)
        self.post_attention_layernorm = LM2RMSNorm(D, eps)
        self.mlp = LM2MLP(config)

    def forward(self, x_BQD: Tensor, layout: Layout, *state: Tensor | None) -> tuple[Tensor | None, ...]:
        """New entries x [B,Q,D] to the same shape, and the state, in the order of `Block`, that later ones need."""
        keys, values, edge_keys, edge_values, tail, *memory = state
        associates = isinstance(self.memory, AssociativeMemory)
        if associates:
            x_BQD = x_BQD + self.memory(x_BQD, memory[1])
        if self.conv is not None:
            y_BQD, tail = self.conv(self.conv_norm(x_BQD), layout, tail)
            x_BQD = x_BQD + y_BQD
        normed_BQD = self.input_layernorm(x_BQD)
        attended_BQD, *attention = self.self_attn(normed_BQD, layout, keys, values, edge_keys, edge_values)
        x_BQD = x_BQD + attended_BQD
        if self.memory is not None and not associates:
            y_BQD, *memory = self.memory(normed_BQD, attended_BQD, layout, *memory)
            x_BQD = x_BQD + y_BQD
        x_BQD = x_BQD + self.mlp(self.post_attention_layernorm(x_BQD))
        if associates and layout.writes is not None and not layout.linked:
            memory[1] = self.memory(x_BQD, memory[1], layout)
        return x_BQD, *attention, tail, *memory


class LM2PreTrainedModel(PreTrainedModel):
    """Settings that transformers needs of both models below."""

    config_class = LM2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LM2Layer"]  # noqa: RUF012
    _supports_sdpa = True  # and nothing else
    _is_stateful = True  # no assisted decoding: a bank cannot be unwritten

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # matrices and embeddings normal, norms 1, biases 0
        if isinstance(module, (LM2Conv, *BANKS.values(), OfficialGates, OfficialMemory, LM2StartMemory)):
            module.reset_parameters()


class LM2Model(LM2PreTrainedModel):
    """The decoder over text of any length: the recurrence over segments, each row on its own clock."""

    def __init__(self, config: LM2Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.start_memory = LM2StartMemory(config) if config.memory_kind not in ("delta", "none") else None
        if config.memory_kind in ("lm2", "official"):
            self._keep_in_fp32_modules_strict = ["start_memory.bank"]
        self.layers = nn.ModuleList(LM2Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = LM2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.num_front_tokens = config.memory_slots if config.memory_kind == "rmt" else 0
        self.num_back_tokens = config.memory_slots if config.memory_kind in ("rmt", "armt") else 0
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: LM2Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: LM2Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the final norm [B,C,D], the cache, and the hidden states that were asked for.

        Args: see `LM2ForCausalLM.forward`.
        """
        c = self.config
        if kwargs.get("output_attentions") or c.output_attentions:
            raise ValueError("LM2 returns no attentions: output_attentions should be False")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        asked = kwargs.get("output_hidden_states")
        every_layer = bool(c.output_hidden_states) if asked is None else asked is not False
        x_BCD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        B, C, _ = x_BCD.shape
        cache = given(cache, past_key_values)
        if not isinstance(cache, LM2Cache) or cache.rows not in (-1, B):
            raise ValueError(f"cache should be an LM2Cache of {B} rows, as an earlier forward returned it")

        texts = read_texts(x_BCD, attention_mask, position_ids, continues=bool(cache))
        if c.memory_kind == "official" and (texts.token_P is not None or C % c.segment_length):
            raise ValueError(
                f"memory_kind official reads whole segments of {c.segment_length} tokens without padding, not {C} "
                "columns: its gates see all tokens of a segment, and its bank has one row for each"
            )
        self._start_texts(cache, texts, x_BCD)
        runs, read = cut_at_segment_ends(cache.read, texts.total, c.segment_length)
        order_RP, back_BC = texts.order(runs)
        x_RPD = x_BCD
        if order_RP is not None:
            x_BCD = x_BCD.masked_fill((back_BC == order_RP.numel())[..., None].to(x_BCD.device), 0)
            x_RPD = x_BCD.flatten(0, 1)[order_RP.to(x_BCD.device)]

        pieces = zip(x_RPD.split([run.width for run in runs], dim=1), runs, strict=True)
        hidden = [self._read_run(x_RQD, run, cache, every_layer) for x_RQD, run in pieces]
        hidden = [torch.cat(states, dim=1) if len(runs) > 1 else states[0] for states in zip(*hidden, strict=True)]
        if not runs:  # all is padding
            hidden = [x_RPD] * (1 + c.num_hidden_layers * every_layer)
        if back_BC is not None:  # zeros under padding
            hidden = [F.pad(x.flatten(0, 1), (0, 0, 0, 1))[back_BC.to(x.device)] for x in hidden]
        if every_layer:
            hidden[0] = x_BCD  # through which gradients flow

        cache.read = read
        if len(read) > 1:
            cache.fall_in_step()
        if texts.row_R is not None:
            cache.batch_select_indices(texts.last_B)
        cache.seen += C
        use_cache = c.use_cache if use_cache is None else use_cache
        return BaseModelOutputWithPast(hidden[-1], cache if use_cache else None, tuple(hidden) if every_layer else None)

    def _start_texts(self, cache: LM2Cache, texts: Texts, x_BCD: Tensor) -> None:
        """Gives each text its row of the cache, and to those that begin here memory as it is at a text's start."""
        fresh = rows_where(texts.fresh, x_BCD.device) if cache else ALL
        if not cache:
            cache.blocks, cache.rows = [Block()] * len(self.layers), texts.rows
            cache.segment_length = self.config.segment_length
        elif texts.row_R is not None:
            cache.batch_select_indices(texts.row_R)
        if fresh is None:
            return
        if isinstance(fresh, slice):
            cache.read = [0]
        else:
            read = cache.read * (texts.rows // len(cache.read))
            cache.read = [0 if is_fresh else n for is_fresh, n in zip(texts.fresh, read, strict=True)]
        kind = self.config.memory_kind
        if kind == "none":
            return
        start_RNM = memory_at_start(self.config, self.start_memory, texts.rows, x_BCD.device)[fresh]
        if self.num_front_tokens:
            cache.memory = replace_rows(cache.memory, fresh, start_RNM.to(x_BCD.dtype))
            return
        for index in self.config.bank_layers if kind in BANKS else (0,):
            block = cache.blocks[index]
            cache.blocks[index] = block._replace(bank=replace_rows(block.bank, fresh, start_RNM))

    def _read_run(self, x_BQD: Tensor, run: Run, cache: LM2Cache, every_layer: bool) -> list[Tensor]:
        """Reads embeddings x, of which the first run.take[b] are row b's: the recurrence over segments.

        Rows whose segment is full write it to memory first, and begin the next one.

        Returns:
          hidden states after the final norm [B,Q,D]; with every_layer before them those that enter each block.
        """
        T, front, back, device = self.config.segment_length, self.num_front_tokens, self.num_back_tokens, x_BQD.device
        is_full = [h == T and n > 0 for h, n in zip(run.held, run.take, strict=True)]
        is_new = [full or h == 0 for h, full in zip(run.held, is_full, strict=True)]
        writes, opens = rows_where(is_full, device), rows_where(is_new, device)
        entries = [h + front for h in run.held]

        if back and writes is not None:  # memory tokens after the segment, from which blocks store
            tokens_BmD = cache.memory if front else self.start_memory(cache.rows).to(x_BQD.dtype)
            after = run._replace(held=entries, take=[back * full for full in is_full])
            layout = self._layout(tokens_BmD, cache, after, writes=writes, linked=False)
            (after_BmD,) = self._run_layers(tokens_BmD, layout, cache)
            if front:  # rmt's next memory is what the last block makes of them
                cache.memory = replace_rows(cache.memory, writes, after_BmD[writes])
        elif back and not front and self.training:
            x_BQD = ZeroGradients.apply(x_BQD, self.start_memory(1))
        if isinstance(opens, slice):
            cache.blocks = [self._after_segment(block) for block in cache.blocks]
        entries = [0 if new else n for n, new in zip(entries, is_new, strict=True)]
        if front and opens is not None:  # memory tokens before the segment
            before = run._replace(held=entries, take=[front * new for new in is_new])
            layout = self._layout(cache.memory, cache, before, opens, linked=False)
            self._run_layers(cache.memory, layout, cache)
            entries, opens = [front if new else n for n, new in zip(entries, is_new, strict=True)], None

        layout = self._layout(x_BQD, cache, run._replace(held=entries), opens, writes)
        return self._run_layers(x_BQD, layout, cache, every_layer)

    def _after_segment(self, block: Block) -> Block:
        """Returns a block's state without what the next segment does not start from."""
        if self.config.window is None:
            block = block._replace(keys=None, values=None)
        return block._replace(tail=None, bank_keys=None, bank_values=None)

    def _run_layers(self, x_BQD: Tensor, layout: Layout, cache: LM2Cache, every_layer: bool = False) -> list[Tensor]:
        """Runs all blocks over new entries, which change their states. Returns hidden states as `_read_run`."""
        blocks, shares_bank = cache.blocks, self.config.memory_kind == "official"
        if shares_bank:
            blocks[0] = blocks[0]._replace(bank=blocks[0].bank.detach())
        entering = []
        for index, layer in enumerate(self.layers):
            entering.append(x_BQD)
            x_BQD, *state = layer(x_BQD, layout, *blocks[index])
            blocks[index] = Block(*state)
            if shares_bank:  # which goes from block to block, and from the last one to the first of the next segment
                bank, blocks[index] = blocks[index].bank, blocks[index]._replace(bank=None)
                following = (index + 1) % len(blocks)
                blocks[following] = blocks[following]._replace(bank=bank)
        return [*(entering if every_layer else ()), self.norm(x_BQD)]

    def _layout(
        self,
        x_BQD: Tensor,
        cache: LM2Cache,
        run: Run,
        opens: Rows | None = None,
        writes: Rows | None = None,
        linked: bool = True,
    ) -> Layout:
        """Layout of new entries x, of which the first run.take[b] are row b's, after run.held[b] of its segment.

        linked: tokens of the text; else memory tokens, at position 0, where RoPE does not rotate them.
        """
        c, Q, device, options = self.config, x_BQD.shape[1], x_BQD.device, {}
        L = max(map(sum, zip(run.held, run.take, strict=True)))
        entry_L = torch.arange(L, device=device)
        in_step = len(run.held) == 1
        if in_step:
            entry_BQ = entry_L[None, run.held[0] :]
        else:
            held_B, take_B = torch.tensor([run.held, run.take], device=device)
            keys = cache.blocks[0].keys
            old = 0 if keys is None or isinstance(opens, slice) else keys.shape[1]
            entry_BQ = (held_B[:, None] + torch.arange(Q, device=device)).clamp(max=L - 1)  # padding, too, sees one
            new_BL = (old + entry_L - held_B[:, None]).clamp(max=old + Q - 1)
            options["take_B"], options["source_BL"] = take_B, torch.where(entry_L < held_B[:, None], entry_L, new_BL)

        if c.window is not None:
            options |= window_layout(c, run.start, entry_BQ, L)
        elif not in_step or 1 < Q < L:
            options["seen_B1QU"] = (entry_L <= entry_BQ[..., None])[:, None]
        else:
            options["is_causal"] = Q > 1
        turned = rotation(c, (entry_BQ - self.num_front_tokens) * linked)
        return Layout(opens, writes, linked, turned, **options)


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
        position_ids: Tensor | None = None,
        cache: LM2Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: LM2Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of every column, as if each text stood alone and began at its first token.

        Args:
          input_ids: token ids [B,C]; or pass inputs_embeds [B,C,D] instead.
          attention_mask: [B,C], or [B, columns seen so far + C]: 0 where there is padding, on whichever side. It is
            not seen, not written, and does not count towards a segment.
          position_ids: [B,C] or [1,C]. A token with position 0 begins a document, with memory as at a text's start; the
            cache goes on with each row's last one. Other positions follow the one before, or an earlier call.
          cache: what the previous call returned; it is changed. None: the text starts here. Gradients flow through it.
            Before transformers 5.24 arguments and outputs call it past_key_values.
          labels: [B,C]; shifted here, -100 is left out of the loss.
          use_cache: whether to return the cache. Logits do not depend on it.
          logits_to_keep: number of last columns to return logits for, or their indices; 0: all columns.

        With output_hidden_states (here or in the config) the hidden states [B,C,D] that enter each block are returned,
        and those after the final norm; zeros under padding.

        Returns:
          loss (with labels), logits [B,C,V], cache and hidden states. Raises ValueError for inputs that the model
          cannot read.
        """
        cache = given(cache, past_key_values)
        outputs = self.model(input_ids, attention_mask, position_ids, cache, inputs_embeds, return_dict=True, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BCV = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits_BCV, labels, vocab_size=self.config.vocab_size, **kwargs)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        return CausalLMOutputWithPast(loss, logits_BCV, cache if use_cache else None, outputs.hidden_states)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Does what transformers' generate() does. Raises NotImplementedError for kind `official`."""
        if self.config.memory_kind == "official":
            raise NotImplementedError(
                "memory_kind official cannot generate: its gates see all tokens of a segment, later ones too, so it "
                "reads whole segments and says nothing about the next token of an unfinished one"
            )
        return super().generate(*args, **kwargs)

    @classmethod
    def from_adapter(cls, adapter: str, base: str | PreTrainedModel, **kwargs: Any) -> LM2ForCausalLM:
        """The whole model of an adapter that lm2_jax wrote, and of the Llama that it was trained on.

        Args:
          adapter: its directory, or its name on the hub.
          base: the Llama's directory, its name on the hub, or the Llama itself, which is left as it is.
          kwargs: of from_pretrained, such as dtype and device_map.

        Raises ValueError, naming everything that does not fit, or if the Llama has other weights.
        """
        config, settings, tensors = read_adapter(adapter)
        llama = AutoModelForCausalLM.from_pretrained(base, dtype="auto") if isinstance(base, str) else base
        with torch.device("meta"):
            whole = cls(config)
        state = put_onto(whole, llama, tensors, settings)
        model = cls.from_pretrained(None, config=config, state_dict=state, **kwargs)
        model.generation_config = llama.generation_config
        return model

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes an LM2Cache instead
