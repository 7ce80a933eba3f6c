"""The settings of an LM2 model exported from lm2_jax, under Hugging Face names. Needs transformers >= 5.4."""

from __future__ import annotations

from typing import Any

import transformers

if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 4):
    raise ImportError(f"LM2 needs transformers >= 5.4, found {transformers.__version__}")

from transformers import PreTrainedConfig

KINDS = ("lm2", "rmt", "armt", "delta", "none", "official")
GATES = ("convex", "independent")
WRITES = ("dense", "top_k")
LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE_KEYS = {"default": {"rope_type", "rope_theta"}, "llama3": {"rope_type", "rope_theta", *LLAMA3_KEYS}}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("segment_length", "memory_slots", "memory_heads", "memory_rows", "memory_write_slots")


class LM2Config(PreTrainedConfig):
    """A Llama whose text is cut into segments, and the memory that links them.

    Kinds of memory: `lm2`, a bank of slots in each of `memory_layers` blocks; `rmt`, memory tokens around every
    segment; `armt`, memory tokens after every segment, from which each of those blocks stores associations; `delta`,
    heads in each of those blocks that carry a matrix over the whole text; `none`; `official`, the published code's one
    bank through all blocks, for which hidden_size, segment_length and memory_slots are one number.
    """

    model_type = "lm2"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012

    # The decoder
    vocab_size: int = 32_000
    hidden_size: int = 96  # D
    intermediate_size: int = 256
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None  # None: num_attention_heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-5
    rope_parameters: dict[str, Any] | None = None  # {"rope_type": "default" | "llama3", "rope_theta": ..., ...}
    conv_width: int = 0  # kernel of the residual causal convolution: 0 (none), 4 or 8
    segment_length: int = 32  # T: attention sees one segment, in which positions start at 0, unless it has a window:
    window: int | None = None  # a token attends to the last W of its text, over segment edges
    sinks: int = 0  # and to the text's first n
    max_distance: int | None = None  # RoPE's largest; sinks that are farther stand there; None: never cut
    max_position_embeddings: int = 1 << 15  # for tools that cut or allocate; memory carries text of any length

    # The memory
    memory_kind: str = "lm2"
    memory_slots: int = 16  # N slots of a bank; rmt, armt: memory tokens
    memory_width: int | None = None  # M of a slot; armt, delta: of keys; None: hidden_size
    memory_heads: int = 4  # of the read and of the write attention; delta: with a matrix each
    memory_first_layer: int = 0  # the first block, counted from 0, that has a bank (lm2, armt, delta)
    memory_layers: int | None = None  # number of blocks, from that one on, that have a bank; None: all
    memory_gates: str = "convex"  # g_in = 1 - g_f, or "independent"
    memory_write: str = "dense"  # lm2: every token may write every slot; top_k: the best ones, says a router
    memory_write_slots: int = 2  # of them for each token
    memory_rows: int = 1  # official: rows of the start memory; the published code keeps one for each row of its batch
    memory_dropout: float = 0.0  # official: on the attention to slots, in training (the published code has 0.9)
    forget_bias: float = 2.0  # gate biases of a new model; the published code has 1 and 0
    input_bias: float = -1.0

    # What transformers asks for
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fills in what defaults to another size. Raises ValueError, naming every key that is wrong."""
        self._refuse([(key, getattr(self, key) > 0, "above 0") for key in SIZES])
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.memory_width = self.memory_width or self.hidden_size
        if self.memory_layers is None:
            self.memory_layers = self.num_hidden_layers - self.memory_first_layer
        super().__post_init__(**kwargs)

        D, rope, kind = self.hidden_size, self.rope_parameters, self.memory_kind
        checks = [
            ("num_key_value_heads", self.num_attention_heads % self.num_key_value_heads == 0, "a divisor of the heads"),
            ("head_dim", self.head_dim > 0 and self.head_dim % 2 == 0, "even, as RoPE rotates pairs"),
            ("rope_parameters", ROPE_KEYS.get(rope["rope_type"]) == rope.keys(), f"one of {ROPE_KEYS}"),
            ("conv_width", self.conv_width in (0, 4, 8), "0, 4 or 8"),
            ("memory_kind", kind in KINDS, f"one of {KINDS}"),
            ("memory_gates", self.memory_gates in GATES, f"one of {GATES}"),
            ("memory_write", self.memory_write in WRITES, f"one of {WRITES}"),
            ("memory_dropout", 0 <= self.memory_dropout < 1, "at least 0 and below 1"),
        ]
        if self.window is None:
            checks += [("sinks", self.sinks == 0, "0 without a window")]
            checks += [("max_distance", self.max_distance is None, "None without a window")]
        else:
            checks += [("memory_kind", kind in ("lm2", "none"), "lm2 or none with a window")]
            checks += [("window", 2 <= self.window <= self.segment_length, "2 to segment_length")]
            checks += [("sinks", 0 <= self.sinks < self.window, "at least 0 and below the window")]
            reaches = self.max_distance is None or self.max_distance >= self.window - 1
            checks += [("max_distance", reaches, "at least window - 1")]
        if kind in ("lm2", "armt", "delta"):
            above = self.num_hidden_layers - self.memory_first_layer
            checks += [("memory_first_layer", self.memory_first_layer >= 0, "at least 0")]
            checks += [("memory_layers", 1 <= self.memory_layers <= above, "1 to the number of blocks from the first")]
        if kind == "lm2" and self.memory_write == "top_k":
            checks += [("memory_write_slots", self.memory_write_slots <= self.memory_slots, "at most memory_slots")]
        if kind in ("lm2", "delta", "official"):
            widths, wanted = ("hidden_size", "memory_width"), f"a multiple of memory_heads ({self.memory_heads})"
            checks += [(key, getattr(self, key) % self.memory_heads == 0, wanted) for key in widths]
        if kind == "official":
            equal, wanted = ("segment_length", "memory_slots", "memory_width"), f"hidden_size ({D}) for kind official"
            checks += [(key, getattr(self, key) == D, wanted) for key in equal]
            checks += [("conv_width", self.conv_width == 0, "0 for kind official")]
        self._refuse(checks)

    @property
    def bank_layers(self) -> range:
        """The blocks that have a bank (lm2, armt, delta)."""
        return range(self.memory_first_layer, self.memory_first_layer + self.memory_layers)

    def _refuse(self, checks: list[tuple[str, bool, str]]) -> None:
        problems = [
            f"{key} is {getattr(self, key)!r}, should be {wanted}" for key, holds, wanted in checks if not holds
        ]
        if problems:
            raise ValueError("LM2Config: " + "; ".join(problems))
