"""The sections of a config, but those of evaluation.py: keys, their defaults and the checks within a section."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

LARGEST = 2**31 - 1  # of integers: array sizes are int32
PositiveInt = Annotated[int, Field(gt=0, le=LARGEST)]
TwoOrMore = Annotated[int, Field(ge=2, le=LARGEST)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0, le=LARGEST)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
AxisSize = Annotated[int, Field(ge=-1, le=LARGEST)]
NonEmptyStr = Annotated[str, Field(min_length=1)]
ONE_OR_MORE = BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)  # a single text is a list
Texts = Annotated[tuple[NonEmptyStr, ...], ONE_OR_MORE]
Tokens = Annotated[tuple[str, ...], ONE_OR_MORE]


class Section(BaseModel):
    """A frozen, hashable group of settings that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_is_yes(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic would read true as 1
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise PydanticCustomError("bool", "should not be true or false (put it in quotes if it is meant as text)")
        return value


def raise_problems(problems: Sequence[str]) -> None:
    """Ends a validator: raises ValueError with all problems, one a line, if there are any."""
    if problems:
        raise ValueError("\n".join(problems))


def pattern_problem(document_separator: str | None) -> str | None:
    """Returns why the value is not a regular expression; None if it is one, or None."""
    try:
        re.compile(document_separator or "")
    except (re.error, OverflowError, RecursionError) as error:
        return f"document_separator {document_separator!r} is not a regular expression: {error}"
    return None


class RopeScaling(Section):
    """Llama 3's scaling of low RoPE frequencies, for contexts longer than those of pretraining."""

    factor: Annotated[float, Field(ge=1)] = 32.0  # divisor of low frequencies
    low_freq_factor: PositiveFloat = 1.0  # wavelengths above original length / this are scaled in full
    high_freq_factor: PositiveFloat = 4.0  # wavelengths below original length / this are kept
    original_max_position_embeddings: PositiveInt = 8192  # original length: longest context of pretraining

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor {self.high_freq_factor} must be above low_freq_factor {self.low_freq_factor}"
            )
        return self


LoraTarget = Literal["attention", "mlp", "query", "key", "value", "output", "gate", "up", "down", "embedding", "head"]


class LoraConfig(Section):
    """Low-rank additions to weights (LoRA, arXiv 2106.09685): W + alpha / rank · A B."""

    rank: PositiveInt = 16  # columns of A and rows of B
    alpha: PositiveFloat = 32.0  # alpha / rank multiplies A B
    targets: Annotated[tuple[LoraTarget, ...], Field(min_length=1), ONE_OR_MORE] = ("attention", "mlp")  # the weights

    @property
    def weights(self) -> frozenset[str]:
        """Names of the weights that are added to."""
        groups = {"attention": ("query", "key", "value", "output"), "mlp": ("gate", "up", "down")}
        return frozenset(name for target in self.targets for name in groups.get(target, (target,)))


class ModelConfig(Section):
    """The Llama decoder that every memory kind shares."""

    vocab_size: PositiveInt | None = None  # rows of the embedding table; null: the tokenizer's ids; more: padded
    d_model: PositiveInt = 96  # width D of the residual stream
    num_layers: PositiveInt = 3  # blocks L
    num_heads: PositiveInt = 4  # query heads of self-attention
    num_kv_heads: PositiveInt = 4  # key/value heads; fewer than num_heads: grouped-query attention
    head_dim: PositiveInt | None = None  # width of a self-attention head; null: d_model / num_heads
    d_ff: PositiveInt = 256  # width of the SwiGLU feed-forward layers
    rope_theta: PositiveFloat = 10_000.0  # base of the RoPE frequencies
    rope_scaling: RopeScaling | None = None  # null: RoPE as it is
    norm_eps: PositiveFloat = 1e-5  # epsilon of RMSNorm
    tie_embeddings: bool = True  # use the embedding table as output layer too
    embedding_std: PositiveFloat = 0.02  # standard deviation of initial embeddings and of rmt's initial memory tokens
    conv_width: Literal[0, 4, 8] = 0  # kernel of the residual causal depthwise convolution; 0: none (Llama-compatible)
    window: TwoOrMore | None = None  # a token attends to the last W, over segment edges; null: its segment alone
    sinks: NonNegativeInt = 0  # with window: the first tokens of its document that every token attends to, too
    max_distance: PositiveInt | None = None  # with window: RoPE's largest; farther sinks stand there; null: never cut
    lora: LoraConfig | None = None  # low-rank additions to the weights, trained by optim.train [lora]; null: none

    @property
    def attention_head_dim(self) -> int:
        """Width of one self-attention head."""
        return self.head_dim or self.d_model // self.num_heads

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        problems = []
        if self.head_dim is None and self.d_model % self.num_heads:
            problems.append(f"num_heads {self.num_heads} does not divide d_model {self.d_model}; or set head_dim")
        elif self.attention_head_dim % 2:
            problems.append(f"head_dim {self.attention_head_dim} is odd; RoPE rotates pairs, so it must be even")
        if self.num_heads % self.num_kv_heads:
            problems.append(f"num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}")
        if self.tie_embeddings and self.lora and "head" in self.lora.weights:
            problems.append("lora.targets: head, but tie_embeddings makes the embedding the head; use embedding")
        raise_problems(problems)
        return self


class MemoryConfig(Section):
    """The memory that carries information across segments."""

    # none: plain Llama; official: the authors' published model
    kind: Literal["lm2", "rmt", "armt", "delta", "ntm", "none", "official"] = "lm2"
    num_slots: PositiveInt = 16  # lm2, ntm: slots N of each bank; rmt, armt: memory tokens m
    width: PositiveInt | None = None  # lm2, ntm: slot width M; armt: of keys; delta: of all heads' keys; null: d_model
    num_heads: PositiveInt = 4  # of the memory: lm2, official: attention; ntm: it, and write heads; delta: matrices
    first_layer: NonNegativeInt = 0  # not rmt, official: the first block, counted from 0, that has a bank
    num_layers: PositiveInt | None = None  # not rmt: number of blocks, from first_layer on, that have a bank; null: all
    gates: Literal["convex", "independent"] = "convex"  # convex: input gate = 1 - forget gate
    forget_bias: float = 2.0  # b_f; positive: memory is retained at first
    input_bias: float = -1.0  # b_i; for independent gates only
    write: Literal["dense", "top_k"] = "dense"  # lm2: top_k: a router lets each token write its best slots alone
    write_slots: PositiveInt = 2  # with write top_k: slots k that a token may write
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # official: of its memory attention; published code: 0.9


StoryTasks = Annotated[tuple[Literal["qa1", "qa2", "qa3", "qa4", "qa5", "niah"], ...], Field(min_length=1)]


class StoriesConfig(Section):
    """bAbI-style question stories scattered among background sentences (data.source: stories)."""

    tasks: StoryTasks = ("qa1",)  # of bAbI; niah alone: a needle in a passage that repeats (RULER's S-NIAH-1)
    facts: tuple[PositiveInt, PositiveInt] = (1, 10)  # fewest and most statements of a generated story
    questions_between: tuple[NonNegativeInt, NonNegativeInt] = (0, 3)  # fewest and most questions inside a story
    questions_after: tuple[PositiveInt, PositiveInt] = (1, 4)  # fewest and most questions at a story's end
    gap: NonNegativeInt = 0  # in training: tokens of background, if there are as many, before the questions at the end
    whole_lines: bool = True  # pad with background so that, where enough is left, no line straddles two segments
    per_epoch: PositiveInt = 1_000_000  # generated stories that count as one epoch

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        for name in ("facts", "questions_between", "questions_after"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: {low} is above {high}; write [fewest, most]")
        return self


class MixtureConfig(Section):
    """One data set of a mixture (data.mixture)."""

    path: NonEmptyStr  # a prepared directory
    weight: PositiveFloat = 1.0  # share of the documents read, relative to the other weights


class DataConfig(Section):
    """The source of documents and their layout in lanes of segments."""

    source: Literal["stories", "text", "jsonl", "bin", "prepared"] = "stories"  # format of the documents
    path: Texts | None = None  # files or globs; stories: bAbI files, null: generated ones; prepared: directories
    mixture: tuple[MixtureConfig, ...] = ()  # prepared: directories with weights, instead of path
    validation_path: Texts | None = None  # null: validation_fraction of the documents is held out
    validation_fraction: Fraction = 0.05  # share of documents held out; for stories it is always one in eight
    begin_id: NonNegativeInt = 128_000  # bin: id that begins every document (Llama 3's begin-of-text)
    order: Literal["shuffled", "official"] = "shuffled"  # official: the official trainer's order of batches (bin only)
    document_separator: str | None = None  # text: a regular expression; every match starts a new document
    background: Texts | None = None  # stories: text files to scatter the facts in; null: built-in sentences
    stories: StoriesConfig = StoriesConfig()  # settings of source stories
    segment_length: PositiveInt = 32  # tokens T of a segment
    segments_per_window: PositiveInt = 4  # segments S of a training window
    batch_size: PositiveInt = 32  # lanes B (stateful batch rows) over all devices
    boundaries: Literal["segment", "packed", "stream"] = "segment"  # where a document may begin; stream: all are one
    prefetch: NonNegativeInt = 2  # windows prepared ahead by a thread; 0: none
    cache_gb: NonNegativeFloat = 100.0  # prepared shards in a store: the most that are kept on this machine; 0: none

    @model_validator(mode="after")
    def _source_has_data(self) -> Self:
        problems = []
        if self.mixture and (self.source != "prepared" or self.path):
            problems.append(
                f"mixture replaces path and needs source prepared; found source {self.source}"
                + (f" and path {', '.join(self.path)}" if self.path else "")
            )
        elif self.source == "prepared" and not (self.path or self.mixture):
            problems.append("path is missing; source prepared reads the directories that path or mixture names")
        elif self.source not in ("stories", "prepared") and not self.path:
            problems.append(f"path is missing; source {self.source} reads the files it names")
        if problem := pattern_problem(self.document_separator):
            problems.append(problem)
        raise_problems(problems)
        return self


class TokenizerConfig(Section):
    """The tokenizer of texts."""

    kind: Literal["stories", "bytes", "sentencepiece", "tokenizers", "llama3"] = "stories"  # stories: built-in words
    path: str | None = None  # the tokenizer's file; stories and bytes have none
    bos_token: str | None = None  # begins every text; "": none; null: as the model's own files or the tokenizer's say
    eos_token: Tokens | None = None  # the first ends documents, any ends generated texts; null: as the files say
    pad_token: str | None = None  # of exported models, for batches in other libraries; null: as the files say
    control_tokens: Literal["text", "token"] = "text"  # what the name of a control token inside a text becomes

    @model_validator(mode="after")
    def _file(self) -> Self:
        needs_file = self.kind not in ("stories", "bytes")
        if needs_file and not self.path:
            raise ValueError(f"path is missing; kind {self.kind} reads a file")
        if self.path and not needs_file:
            raise ValueError(f"path {self.path!r} given, but kind {self.kind} reads no file")
        if self.control_tokens == "token" and self.kind not in ("tokenizers", "llama3"):
            raise ValueError(f"control_tokens token needs kind tokenizers or llama3; found kind {self.kind}")
        return self


class OptimConfig(Section):
    """The optimizer, its schedule and the loss."""

    train: Annotated[Texts, Field(min_length=1)] = ("all",)  # all, memory, lora, or patterns such as "*/mlp/*"
    kind: Literal["adamw", "muon"] = "adamw"  # muon: orthogonalised updates for attention and feed-forward weights
    learning_rate: PositiveFloat = 2e-3  # its peak, after warm-up
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # linear: constant, then linear decay
    warmup_steps: NonNegativeInt = 50  # steps of linear warm-up
    decay_fraction: Fraction = 0.3  # linear: share of the steps, at the end, over which the learning rate decays
    final_fraction: Fraction = 0.0  # learning rate of the last step, as a fraction of learning_rate
    b1: Annotated[float, Field(ge=0, lt=1)] = 0.9  # decay of the mean of gradients
    b2: Annotated[float, Field(ge=0, lt=1)] = 0.98  # decay of the mean of squared gradients
    eps: PositiveFloat = 1e-8  # epsilon of Adam's denominator
    weight_decay: NonNegativeFloat = 0.01  # decoupled weight decay, of matrices only
    clip_norm: PositiveFloat = 1.0  # largest global norm of a gradient
    accumulation_steps: PositiveInt = 1  # microbatches per step, of batch_size / accumulation_steps lanes each
    lm_loss_weight: NonNegativeFloat = 1.0  # weight of the loss on all tokens; stories add the loss on answers


class MeshConfig(Section):
    """Number of devices along each mesh axis; -1, for at most one axis: all devices that are left."""

    data: AxisSize = 1  # shards lanes; parameters are replicated
    fsdp: AxisSize = -1  # shards lanes and parameters
    context: AxisSize = 1  # kind none: shards the tokens of a segment, and parameters
    tensor: AxisSize = 1  # shards heads and feed-forward layers
    context_keys: Literal["gather", "ring"] = "gather"  # along context: keys gathered by all, or passed round in a ring

    @model_validator(mode="after")
    def _one_free_axis(self) -> Self:
        sizes = (self.data, self.fsdp, self.context, self.tensor)
        if 0 in sizes or sizes.count(-1) > 1:
            raise ValueError(
                f"data {self.data}, fsdp {self.fsdp}, context {self.context}, tensor {self.tensor}: "
                "each must be at least 1, and one of them may be -1 (the rest)"
            )
        return self


class StageConfig(Section):
    """One stage of the curriculum; the last one lasts until train.steps."""

    segments: PositiveInt  # segments S of a window
    segment_length: PositiveInt  # tokens T of a segment
    steps: PositiveInt | None = None  # maximum number of steps; null: no limit
    advance_accuracy: Fraction | None = None  # accuracy on training answers that ends the stage early


Remat = Literal["none", "block", "full", "offload", "auto"]
Trackers = Annotated[tuple[Literal["tensorboard", "wandb"], ...], ONE_OR_MORE]


class ProfileConfig(Section):
    """A trace of some steps, which XProf shows in TensorBoard."""

    start: PositiveInt = 10  # first step of the trace; the first ones compile
    steps: PositiveInt = 3  # number of steps

    @property
    def last(self) -> int:
        """Last step of the trace."""
        return self.start + self.steps - 1


class TrainConfig(Section):
    """The training loop."""

    run_dir: NonEmptyStr = "runs/default"  # the run directory; one that holds a checkpoint is resumed
    init_from: NonEmptyStr | None = None  # initial weights: a run directory, a checkpoint or a converted one
    steps: PositiveInt = 650  # optimizer steps in all
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # of initial weights, order of documents and dropout
    dtype: Literal["float32", "bfloat16"] = "float32"  # type of activations; parameters and banks are float32
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"  # type of the parameters that optim.train leaves out
    schedule: Literal["auto", "segment", "layer"] = "auto"  # order of the loops over segments and layers
    remat: Remat = "none"  # recompute blocks, or segments (full); offload: inputs on the host; auto: fastest that fits
    unroll: PositiveInt = 1  # iterations a scan compiles as one: longer to compile, fewer buffer copies on CPU
    log_every: PositiveInt = 10  # steps between two lines of the log
    trackers: Trackers = ("tensorboard",)  # where metrics go, beside metrics.jsonl
    profile: ProfileConfig | None = None  # steps to trace for XProf; null: none
    max_skipped_steps: NonNegativeInt = 20  # consecutive non-finite steps after which the run stops; 0: never
    curriculum: tuple[StageConfig, ...] = ()  # stages; empty: the one that data describes

    @model_validator(mode="after")
    def _stages_end(self) -> Self:
        for number, stage in enumerate(self.curriculum[:-1]):
            if stage.steps is None and stage.advance_accuracy is None:
                raise ValueError(f"curriculum.{number} never ends: give it steps or advance_accuracy")
        return self


class CheckpointConfig(Section):
    """Checkpoints of a run."""

    every_steps: PositiveInt = 100  # steps between two checkpoints
    keep: PositiveInt = 3  # newest checkpoints that are kept
