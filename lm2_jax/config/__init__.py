"""Every setting of lm2_jax: typed, validated, loaded from YAML. No jax here.

A config file holds any subset of the keys below; `--set a.b=c` overrides single keys. All mistakes are collected and
reported at once, each with the file, the key, the value found and what would be right.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from lm2_jax.common.errors import UserError
from lm2_jax.common.untrusted import read_limited, short_repr
from lm2_jax.config.spec import ModelSpec

LARGEST = 2**31 - 1  # of whole numbers: an array's sizes are int32
PositiveInt = Annotated[int, Field(gt=0, le=LARGEST)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0, le=LARGEST)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
AxisSize = Annotated[int, Field(ge=-1, le=LARGEST)]
NonEmptyStr = Annotated[str, Field(min_length=1)]
Paths = tuple[NonEmptyStr, ...]


class Section(BaseModel):
    """A frozen group of settings: hashable, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic would read the true of YAML's "yes" and "on" as 1
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise PydanticCustomError("bool", "should not be yes or no (quote it if it is meant as text)")
        return value


def _lists(values: Any, *keys: str) -> Any:
    """A section's values with single texts under `keys` made lists of one."""
    if not isinstance(values, dict):
        return values
    return {key: (value,) if key in keys and isinstance(value, str) else value for key, value in values.items()}


def pattern_problem(document_separator: str | None) -> str | None:
    """What is wrong with a regular expression; None if nothing is."""
    try:
        re.compile(document_separator or "")
    except (re.error, OverflowError, RecursionError) as error:
        return f"document_separator {document_separator!r} is no regular expression: {error}"
    return None


class RopeScaling(Section):
    """Llama-3's stretching of low RoPE frequencies."""

    factor: Annotated[float, Field(ge=1)] = 32.0
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0
    original_max_position_embeddings: PositiveInt = 8192

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor {self.high_freq_factor} must be above low_freq_factor {self.low_freq_factor}"
            )
        return self


class ModelConfig(Section):
    """The Llama decoder that every memory kind shares."""

    vocab_size: PositiveInt | None = None  # null: the tokenizer's size
    d_model: PositiveInt = 96
    num_layers: PositiveInt = 3
    num_heads: PositiveInt = 4
    num_kv_heads: PositiveInt = 4
    head_dim: PositiveInt | None = None  # null: d_model / num_heads
    d_ff: PositiveInt = 256
    rope_theta: PositiveFloat = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: PositiveFloat = 1e-5
    tie_embeddings: bool = True
    embedding_std: PositiveFloat = 0.02  # of the initial embedding, and of rmt's first memory tokens
    conv_width: Literal[0, 4, 8] = 0  # kernel of the residual causal depthwise convolution; 0: none (Llama-compatible)

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
        if problems:
            raise ValueError("\n".join(problems))
        return self


class MemoryConfig(Section):
    """What remembers across segments. The README has the equations behind the lm2 knobs ("What it computes")."""

    kind: Literal["lm2", "rmt", "none", "official"] = "lm2"
    num_slots: PositiveInt = 16  # lm2: slots N of each bank; rmt: memory tokens m
    width: PositiveInt | None = None  # lm2: slot width M; null: d_model
    num_heads: PositiveInt = 4  # lm2: heads of the read and of the write attention; official: of its one attention
    num_layers: PositiveInt | None = None  # lm2: the first so many blocks have a bank; null: all of them
    gates: Literal["convex", "independent"] = "convex"  # g_in = 1 - g_f, or a gate of its own (the paper's)
    forget_bias: float = 2.0  # b_f; positive: remember at first
    input_bias: float = -1.0  # b_i; independent gates only
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # official: of its attention; the published code has 0.9


class StoriesConfig(Section):
    """bAbI-style question stories scattered among background sentences (data.source: stories)."""

    tasks: Annotated[tuple[Literal["qa1", "qa2", "qa3", "qa4", "qa5"], ...], Field(min_length=1)] = ("qa1",)
    facts: tuple[PositiveInt, PositiveInt] = (1, 10)  # fewest and most statements in a story (generator)
    questions_between: tuple[NonNegativeInt, NonNegativeInt] = (0, 3)  # questions while the story goes on, of any task
    questions_after: tuple[PositiveInt, PositiveInt] = (1, 4)  # questions at its end
    whole_lines: bool = True  # a segment's end cuts no line of a story, as far as background can make room
    per_epoch: PositiveInt = 1_000_000  # stories the generator makes before the epoch count moves on

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        for name in ("facts", "questions_between", "questions_after"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: {low} is above {high}; write [fewest, most]")
        return self


class MixtureConfig(Section):
    """A part of a mixture (data.mixture)."""

    path: NonEmptyStr  # a prepared directory
    weight: PositiveFloat = 1.0  # its share of the documents read, as against the other weights


class DataConfig(Section):
    """Where documents come from and how they are laid into lanes of segments."""

    source: Literal["stories", "text", "jsonl", "bin", "prepared"] = "stories"
    path: Paths | None = None  # files or globs; stories: real bAbI files, not the generator; prepared: directories
    mixture: tuple[MixtureConfig, ...] = ()  # prepared: directories with weights, in the place of path
    validation_path: Paths | None = None  # null: a share of the documents is held out
    validation_fraction: Fraction = 0.05  # of the documents; of stories it is always one in eight
    begin_id: NonNegativeInt = 128_000  # bin: the id that documents begin with (Llama 3's begin-of-text)
    order: Literal["shuffled", "official"] = "shuffled"  # official: bin alone; batches in the official trainer's order
    document_separator: str | None = None  # text: a regular expression; a new document starts where it matches
    background: Paths | None = None  # stories: text files to scatter facts in; null: built-in sentences
    stories: StoriesConfig = StoriesConfig()
    segment_length: PositiveInt = 32  # T
    segments_per_window: PositiveInt = 4  # S
    batch_size: PositiveInt = 32  # B, lanes over all devices
    boundaries: Literal["segment", "packed", "stream"] = "segment"
    prefetch: NonNegativeInt = 2  # windows made ahead in a thread; 0: none

    @model_validator(mode="before")
    @classmethod
    def _single_path_is_a_list(cls, values: Any) -> Any:
        return _lists(values, "path", "validation_path", "background")

    @model_validator(mode="after")
    def _source_has_data(self) -> Self:
        problems = []
        if self.mixture and (self.source != "prepared" or self.path):
            problems.append(
                f"mixture takes the place of path, for source prepared; found source {self.source}"
                + (f" and path {', '.join(self.path)}" if self.path else "")
            )
        elif self.source == "prepared" and not (self.path or self.mixture):
            problems.append("path is missing; source prepared reads the directories that it, or mixture, names")
        elif self.source not in ("stories", "prepared") and not self.path:
            problems.append(f"path is missing; source {self.source} reads the files it names")
        if problem := pattern_problem(self.document_separator):
            problems.append(problem)
        if problems:
            raise ValueError("\n".join(problems))
        return self


class TokenizerConfig(Section):
    """Text to ids and back."""

    kind: Literal["stories", "bytes", "sentencepiece", "tokenizers", "llama3"] = "stories"
    path: str | None = None  # the tokenizer's file; stories and bytes have none

    @model_validator(mode="after")
    def _file(self) -> Self:
        needs_file = self.kind not in ("stories", "bytes")
        if needs_file and not self.path:
            raise ValueError(f"path is missing; kind {self.kind} reads a file")
        if self.path and not needs_file:
            raise ValueError(f"path {self.path!r} given, but kind {self.kind} reads no file")
        return self


class OptimConfig(Section):
    """The optimizer, its schedule and the loss."""

    kind: Literal["adamw", "muon"] = "adamw"  # muon: orthogonal steps for attention and feed-forward layers
    learning_rate: PositiveFloat = 2e-3
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # linear: constant, then down over decay_fraction
    warmup_steps: NonNegativeInt = 50
    decay_fraction: Fraction = 0.3  # linear: the last share of the steps
    final_fraction: Fraction = 0.0  # of learning_rate, at the last step
    b1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    b2: Annotated[float, Field(ge=0, lt=1)] = 0.98
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.01
    clip_norm: PositiveFloat = 1.0
    accumulation_steps: PositiveInt = 1  # microbatches per step, each batch_size / accumulation_steps lanes
    lm_loss_weight: NonNegativeFloat = 1.0  # weight of the loss over all tokens; answers of stories weigh 1 more


class MeshConfig(Section):
    """Devices along each mesh axis; -1 (one axis at most): all that are left."""

    data: AxisSize = 1
    fsdp: AxisSize = -1
    tensor: AxisSize = 1

    @model_validator(mode="after")
    def _one_free_axis(self) -> Self:
        sizes = (self.data, self.fsdp, self.tensor)
        if 0 in sizes or sizes.count(-1) > 1:
            raise ValueError(
                f"data {self.data}, fsdp {self.fsdp}, tensor {self.tensor}: "
                "each must be at least 1, and one of them may be -1 (the rest)"
            )
        return self


class StageConfig(Section):
    """One stage of the curriculum; the last one lasts until train.steps."""

    segments: PositiveInt
    segment_length: PositiveInt
    steps: PositiveInt | None = None  # at most so many steps; null: no limit
    advance_accuracy: Fraction | None = None  # go on once answers reach this training accuracy


class TrainConfig(Section):
    """The loop."""

    run_dir: NonEmptyStr = "runs/default"
    init_from: NonEmptyStr | None = None  # weights to start from: a run directory, a checkpoint, or a converted one
    steps: PositiveInt = 650
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; parameters and banks stay float32
    schedule: Literal["auto", "segment", "layer"] = "auto"  # order of the double loop over segments and layers
    # recompute: nothing, each block, each block and each segment; offload: as full, block inputs in the host's memory
    remat: Literal["none", "block", "full", "offload"] = "none"
    # passes of the loops over layers and segments that are compiled as one: more to compile, less to copy on CPUs
    unroll: PositiveInt = 1
    log_every: PositiveInt = 10
    max_skipped_steps: NonNegativeInt = 20  # non-finite steps in a row before the run stops; 0: never
    curriculum: tuple[StageConfig, ...] = ()

    @model_validator(mode="after")
    def _stages_end(self) -> Self:
        for number, stage in enumerate(self.curriculum[:-1]):
            if stage.steps is None and stage.advance_accuracy is None:
                raise ValueError(f"curriculum.{number} never ends: give it steps or advance_accuracy")
        return self


class CheckpointConfig(Section):
    """When checkpoints are written and how many are kept."""

    every_steps: PositiveInt = 100
    keep: PositiveInt = 3


class PerplexityConfig(Section):
    """Documents to measure the loss on (evaluate --task perplexity)."""

    path: Paths | None = None  # files or globs; null: what the run held out
    source: Literal["text", "jsonl", "bin"] | None = None  # null: by the files' endings; text unless .jsonl or .bin
    document_separator: str | None = None  # text: as data.document_separator

    @model_validator(mode="before")
    @classmethod
    def _single_path_is_a_list(cls, values: Any) -> Any:
        return _lists(values, "path")

    @model_validator(mode="after")
    def _regular_expression(self) -> Self:
        if problem := pattern_problem(self.document_separator):
            raise ValueError(problem)
        return self


BabilongTask = Literal[
    "qa1", "qa2", "qa3", "qa4", "qa5", "qa6", "qa7", "qa8", "qa9", "qa10",
    "qa11", "qa12", "qa13", "qa14", "qa15", "qa16", "qa17", "qa18", "qa19", "qa20",
]  # fmt: skip


class BabilongConfig(Section):
    """Questions about facts in long contexts (evaluate --task babilong)."""

    tasks: Annotated[tuple[BabilongTask, ...], Field(min_length=1)] = ("qa1", "qa2", "qa3", "qa4", "qa5")
    lengths: Annotated[tuple[NonEmptyStr, ...], Field(min_length=1)] = ("0k", "1k", "2k", "4k")  # k: 1000, M: 1000k
    samples: PositiveInt = 100  # of each task at each length
    path: NonEmptyStr | None = None  # directory of samples in the hub's layout; null: samples are built
    babi: NonEmptyStr | None = None  # directory of bAbI files to build from; null: the generator (qa1 to qa5)
    books: Paths | None = None  # text files to build from; null: built-in sentences
    counter: TokenizerConfig | None = None  # tokenizer that measures contexts; null: the model's
    prompt: Literal["official", "plain"] = "official"  # plain: context and question alone, as stories are trained on
    max_new_tokens: PositiveInt = 20

    @model_validator(mode="before")
    @classmethod
    def _single_path_is_a_list(cls, values: Any) -> Any:
        return _lists(values, "books", "tasks", "lengths")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        wrong = [length for length in self.lengths if not re.fullmatch(r"\d+[kM]", length)]
        problems = [f"lengths: found {length!r}; write 0k, 4k, 128k or 1M" for length in wrong]
        for name in ("tasks", "lengths"):
            values = getattr(self, name)
            problems += [
                f"{name}: {value} stands there twice" for value in sorted({v for v in values if values.count(v) > 1})
            ]
        if self.path and (self.babi or self.books):
            problems.append(f"path {self.path!r} holds whole samples; leave out babi and books, or leave out path")
        if problems:
            raise ValueError("\n".join(problems))
        return self


class MmluConfig(Section):
    """Multiple-choice questions of many subjects (evaluate --task mmlu)."""

    path: NonEmptyStr | None = None  # directory of dev/*_dev.csv and test/*_test.csv; null: the harness's, from the hub
    subjects: tuple[NonEmptyStr, ...] | None = None  # such as astronomy; null: all
    shots: NonNegativeInt = 5  # solved questions before each
    limit: PositiveInt | None = None  # questions of each subject; null: all

    @model_validator(mode="before")
    @classmethod
    def _single_subject_is_a_list(cls, values: Any) -> Any:
        return _lists(values, "subjects")


class HarnessConfig(Section):
    """Tasks of lm-evaluation-harness by their names (evaluate --task harness)."""

    tasks: tuple[NonEmptyStr, ...] = ()  # names of tasks, groups or tags; YAML files of tasks
    include: NonEmptyStr | None = None  # a directory of task files of your own
    shots: NonNegativeInt | None = None  # null: what each task says
    limit: PositiveInt | None = None  # samples of each task; null: all

    @model_validator(mode="before")
    @classmethod
    def _single_task_is_a_list(cls, values: Any) -> Any:
        return _lists(values, "tasks")


class EvalConfig(Section):
    """Validation while training, the table of accuracy by context length at its end, and what `evaluate` measures."""

    every_steps: NonNegativeInt = 100  # 0: only at the end
    windows: PositiveInt = 8  # validation windows of batch_size lanes
    lengths: tuple[NonNegativeInt, ...] = (1, 2, 4, 8, 16, 32)  # stories: context in segments; 0: no background
    one_segment: bool = False  # stories: read a context as one segment however long it is (attention over all of it)
    questions: PositiveInt = 1000  # stories: questions per length
    path: Paths | None = None  # stories: bAbI test files to report beside the held-out stories
    perplexity: PerplexityConfig = PerplexityConfig()
    babilong: BabilongConfig = BabilongConfig()
    mmlu: MmluConfig = MmluConfig()
    harness: HarnessConfig = HarnessConfig()

    @model_validator(mode="before")
    @classmethod
    def _single_path_is_a_list(cls, values: Any) -> Any:
        return _lists(values, "path")


class Config(Section):
    """A whole run. `load_config` reads it, `save_config` writes it."""

    model: ModelConfig = ModelConfig()
    memory: MemoryConfig = MemoryConfig()
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()

    @property
    def spec(self) -> ModelSpec:
        """Everything that the model depends on."""
        train = self.train
        return ModelSpec(self.model, self.memory, self.trained_segment_length, train.dtype, train.remat, train.unroll)

    @property
    def trained_segment_length(self) -> int:
        """T of the last stage: what a trained model reads by."""
        return self.stages[-1].segment_length

    @property
    def has_tokenizer(self) -> bool:
        """Whether text can be made ids; a run on token shards may name no tokenizer."""
        return self.data.source != "bin" or self.tokenizer.kind != "stories"

    @property
    def stages(self) -> tuple[StageConfig, ...]:
        """The curriculum, or the one stage that `data` describes."""
        window = StageConfig(segments=self.data.segments_per_window, segment_length=self.data.segment_length)
        return self.train.curriculum or (window,)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        problems = []
        memory, data = self.memory, self.data
        if memory.kind == "lm2":
            for name, width in (("model.d_model", self.model.d_model), ("memory.width", memory.width)):
                if width and width % memory.num_heads:
                    problems.append(f"memory.num_heads {memory.num_heads} does not divide {name} {width}")
            if (memory.num_layers or 0) > self.model.num_layers:
                problems.append(
                    f"memory.num_layers {memory.num_layers} is above model.num_layers {self.model.num_layers}"
                )
        if memory.kind in ("rmt", "official"):
            if data.boundaries == "packed":
                problems.append(
                    f"data.boundaries packed: {memory.kind} keeps one state per lane; use segment or stream"
                )
            if self.train.schedule == "layer":
                problems.append(
                    f"train.schedule layer: {memory.kind} needs a segment's last layer before the next; use segment"
                )
        if memory.kind == "official":
            N = memory.num_slots
            sizes = {"model.d_model": self.model.d_model, "data.segment_length": data.segment_length}
            sizes |= {
                f"train.curriculum.{i}.segment_length": s.segment_length for i, s in enumerate(self.train.curriculum)
            }
            sizes |= {"memory.width": memory.width} if memory.width else {}
            unequal = [f"{key} {size}" for key, size in sizes.items() if size != N]
            if unequal:
                problems.append(
                    f"memory.kind official needs slots, segment length and model width to be equal, but "
                    f"memory.num_slots is {N} and {', '.join(unequal)}; kind lm2 has no such bound"
                )
            if N % memory.num_heads:
                problems.append(f"memory.num_heads {memory.num_heads} does not divide memory.num_slots {N}")
            if memory.num_layers not in (None, self.model.num_layers):
                problems.append(f"memory.num_layers {memory.num_layers}: kind official has its memory in all blocks")
        elif memory.dropout:
            problems.append(f"memory.dropout {memory.dropout}: only kind official has any")
        if data.batch_size % self.optim.accumulation_steps:
            problems.append(
                f"optim.accumulation_steps {self.optim.accumulation_steps} does not divide "
                f"data.batch_size {data.batch_size}"
            )
        if self.optim.warmup_steps > self.train.steps:
            problems.append(f"optim.warmup_steps {self.optim.warmup_steps} is above train.steps {self.train.steps}")
        if data.source == "stories":
            if data.boundaries != "segment":
                problems.append(f"data.boundaries {data.boundaries}: stories start at segments; use segment")
            if data.background and self.tokenizer.kind == "stories":
                problems.append(
                    "tokenizer.kind stories knows only the generator's words; data.background needs bytes, "
                    "sentencepiece, tokenizers or llama3"
                )
            if data.validation_path and not data.path:
                problems.append("data.validation_path without data.path: the generator holds out its own stories")
        elif data.source == "bin" and self.model.vocab_size is None:
            problems.append("model.vocab_size is missing; .bin shards hold ids, no text to tokenise")
        elif data.source != "bin" and self.tokenizer.kind == "stories":
            problems.append(
                f"tokenizer.kind stories knows only the generator's words; data.source {data.source} "
                "needs bytes, sentencepiece, tokenizers or llama3"
            )
        if data.order == "official" and (data.source, data.boundaries) != ("bin", "stream"):
            problems.append(
                f"data.order official: it is that of .bin shards read as a stream; found data.source {data.source}, "
                f"data.boundaries {data.boundaries}"
            )
        if data.order == "official" and len({stage.segment_length for stage in self.stages}) > 1:
            problems.append("data.order official: train.curriculum changes the segment length, which it is made of")
        if data.source != "stories" and self.optim.lm_loss_weight == 0:
            problems.append(
                f"optim.lm_loss_weight 0: data.source {data.source} has no answers, nothing would be learnt"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self


# --- Reading and writing -------------------------------------------------------------------------------------------


_LONGEST = 1 << 18  # bytes of a config, which PyYAML reads in seconds
_MOST_WRITTEN_OUT = 1 << 20  # characters of a config whose aliases are written out


class _Loader(yaml.SafeLoader):
    """As in YAML 1.2, 3e-4 is a float and 2025-01-31 is text; no duplicate keys, nothing that explodes."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _written_out(node, {}) > _MOST_WRITTEN_OUT:
            raise yaml.composer.ComposerError(
                None, None, "its aliases (*name) stand for far more than is written", node.start_mark
            )
        return node

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
            raise yaml.constructor.ConstructorError(
                None, None, "text with a NUL, or with half a surrogate pair", node.start_mark
            )
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue  # lists as keys are refused by PyYAML itself; merged keys (<<) may be overridden
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _written_out(node: yaml.Node, known: dict[int, float]) -> float:
    """Characters and values of a node in which every alias is replaced by what it stands for; infinite in a circle."""
    if isinstance(node, yaml.ScalarNode):
        return 1 + len(node.value)
    if id(node) not in known:
        known[id(node)] = math.inf  # until its parts are counted, for one that holds itself
        pairs = isinstance(node, yaml.MappingNode)
        parts = itertools.chain.from_iterable(node.value) if pairs else node.value
        known[id(node)] = 1 + sum(_written_out(part, known) for part in parts)
    return known[id(node)]


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would take for a number."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Reads a YAML config and applies overrides of the form "a.b=c" (the value is YAML).

    Raises UserError with every problem found: unreadable file, unknown keys (with a suggestion), wrong types, values
    that do not fit together.
    """
    path = Path(path)
    try:
        text = read_limited(path, _LONGEST).decode()
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a text file ({error})") from None
    return parse_config(text, overrides, where=str(path))


def parse_config(text: str, overrides: Iterable[str] = (), where: str = "config") -> Config:
    """As `load_config`, from YAML text; `where` names it in messages."""
    values = _parse_yaml(text, where)
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise UserError(f"{where}: holds {type(values).__name__}; expected sections such as 'model:' and 'data:'")
    values = {key: {} if value is None else value for key, value in values.items()}  # "train:" with nothing under it
    problems, overridden = [], []
    for override in overrides:
        try:
            overridden.append(_apply_override(values, override))
        except UserError as error:
            problems.append(str(error))
    return _validate(values, where, overridden, problems)


def save_config(config: Config, path: str | Path) -> None:
    """Writes the complete config as YAML that `load_config` reads back to an equal one."""
    Path(path).write_text(dump_config(config), encoding="utf-8")


def dump_config(config: Config) -> str:
    """The complete config as YAML text."""
    values = config.model_dump(mode="json")
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=100)


def replace(config: Config, **changes: Mapping[str, Any]) -> Config:
    """A validated copy with some keys changed: `replace(config, memory={"kind": "none"})`.

    Raises UserError as `load_config` does.
    """
    values = config.model_dump()
    for section, keys in changes.items():
        values.setdefault(section, {}).update(keys)
    return _validate(values, "config")


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}:{line} is not valid YAML: {getattr(error, 'problem', error)}") from None
    except Exception as error:  # whatever PyYAML makes of a value that is not what its tag says
        raise UserError(f"{where}: is not valid YAML: {error}") from None


def _apply_override(values: dict, override: str) -> str:
    """Puts "a.b=c" into the values; returns its key."""
    key, equals, text = override.partition("=")
    *sections, last = (part.strip() for part in key.split("."))
    if not (equals and last and all(sections)):
        raise UserError(f"--set {override!r}: write KEY=VALUE, for example --set train.steps=100")
    try:
        value = _parse_yaml(text, f"--set {key}")
    except UserError as error:
        raise UserError(f"{error}; text with special characters needs quotes, --set '{key}=\"...\"'") from None
    if value is None and text.lstrip().startswith("#"):
        raise UserError(f"--set {override!r}: YAML reads a comment here; put the value in quotes, '{key}=\"...\"'")
    node = values
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise UserError(f"--set {override!r}: {section!r} is a value, not a section with keys; set it as a whole")
    node[last] = value
    return ".".join((*sections, last))


def _validate(values: dict, where: str, overridden: Sequence[str] = (), problems: Sequence[str] = ()) -> Config:
    """The config of these values. Raises UserError with its problems and those already known, each from its origin."""
    try:
        config = Config.model_validate(values)
    except pydantic.ValidationError as error:
        found = []
        for item in error.errors():
            key = ".".join(map(str, item["loc"]))
            is_override = any(_is_within(key, other) or _is_within(other, key) for other in overridden)
            origin = "--set " if is_override and item["type"] != "value_error" else f"{where}: "
            found += [origin + line for line in _explain(item, key)]
        problems = [*problems, *found]
    if problems:
        raise UserError("\n".join(problems))
    return config


def _is_within(key: str, other: str) -> bool:
    return f"{key}.".startswith(f"{other}.")


_EXPECTED = {"model_type": "should be a section with keys", "tuple_type": "should be a list, [a, b]"}


def _explain(item: Mapping[str, Any], key: str) -> list[str]:
    """Readable lines for one pydantic error."""
    found = item.get("input")
    if item["type"] == "extra_forbidden":
        known = _known_keys(item["loc"][:-1])
        close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return [f"{key}: unknown key; {hint}"]
    if item["type"] == "value_error":  # our own checks: they begin with the key, from their section on
        prefix = f"{key}." if key else ""
        return [prefix + line for line in str(item["ctx"]["error"]).split("\n")]
    if item["type"] == "missing":
        return [f"{key}: is missing; give it a value"]
    if item["type"] == "too_short" and found:
        return []  # its items were refused one by one
    expected = _EXPECTED.get(item["type"], item["msg"]).replace("Input should be", "should be")
    expected = expected.replace("Tuple", "list").replace(" after validation", "")  # what YAML calls it
    return [f"{key}: found {short_repr(found)}; {expected[0].lower()}{expected[1:]}"]


def _known_keys(location: Sequence[str | int]) -> list[str]:
    model: type[BaseModel] = Config
    for part in location:
        if isinstance(part, int):
            continue
        model = _section_type(model.model_fields[part].annotation)
    return list(model.model_fields)


def _section_type(annotation: Any) -> type[BaseModel]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(_section_type(arg) for arg in get_args(annotation) if arg not in (type(None), Ellipsis))
