"""The config of a whole run with the checks across its sections, and the part of it that a model depends on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Self

from pydantic import model_validator

from lm2_jax.config.evaluation import EvalConfig
from lm2_jax.config.sections import (
    CheckpointConfig,
    DataConfig,
    MemoryConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    Section,
    StageConfig,
    TokenizerConfig,
    TrainConfig,
    raise_problems,
)

_WITH_BANKS = ("lm2", "ntm", "armt", "delta")  # kinds with banks in the blocks that memory.num_layers says


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """The settings of a model. Runs that differ only in others have equal models, which share compiled programs.

    Attributes:
      model: the Llama blocks.
      memory: the memory.
      segment_length: T of the last stage, which a trained model reads by.
      dtype: of activations; parameters and banks are float32.
      remat: what the backward pass recomputes (train.remat).
      unroll: iterations of the scans over layers and segments that are compiled as one.
      context_keys: how keys and values travel where devices share a segment's tokens (mesh.context_keys).
    """

    model: ModelConfig
    memory: MemoryConfig
    segment_length: int
    dtype: str = "float32"
    remat: str = "none"
    unroll: int = 1
    context_keys: str = "gather"

    @property
    def memory_width(self) -> int:
        """Slot width M of the banks of lm2 and ntm; width of the keys of armt and delta."""
        return self.memory.width or self.model.d_model

    @property
    def num_memory_layers(self) -> int:
        """Number of blocks that have a bank; 0 for kinds without banks."""
        if self.memory.kind not in (*_WITH_BANKS, "official"):
            return 0
        return self.memory.num_layers or self.model.num_layers - self.memory.first_layer

    @property
    def recomputes_segments(self) -> bool:
        """True if `remat` recomputes each segment of a window by itself."""
        return self.remat in ("full", "offload")


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
        remat = "none" if train.remat == "auto" else train.remat  # the command that trains has chosen one
        keys, length = self.mesh.context_keys, self.trained_segment_length
        return ModelSpec(self.model, self.memory, length, train.dtype, remat, train.unroll, keys)

    @property
    def trained_segment_length(self) -> int:
        """T of the last stage, which a trained model reads by."""
        return self.stages[-1].segment_length

    @property
    def has_tokenizer(self) -> bool:
        """True if the run can tokenize text; a run on token shards may name no tokenizer."""
        return self.data.source != "bin" or self.tokenizer.kind != "stories"

    @property
    def stages(self) -> tuple[StageConfig, ...]:
        """The curriculum, or the one stage that `data` describes."""
        window = StageConfig(segments=self.data.segments_per_window, segment_length=self.data.segment_length)
        return self.train.curriculum or (window,)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        checks = (
            _bank_problems,
            _state_problems,
            _official_problems,
            _window_problems,
            _context_problems,
            _step_problems,
            _source_problems,
            _order_problems,
        )
        raise_problems([problem for check in checks for problem in check(self)])
        return self


# --- Checks across sections: each yields problems as text that begins with a key -------------------------------------


def _bank_problems(config: Config) -> Iterator[str]:
    """Problems of the sizes of banks, and of the blocks that have one."""
    model, memory = config.model, config.memory
    if memory.write != "dense" and memory.kind != "lm2":
        yield f"memory.write {memory.write}: only kind lm2 has a router; use dense"
    if memory.kind not in _WITH_BANKS:
        return
    for name, width in (("model.d_model", model.d_model), ("memory.width", memory.width)):
        if memory.kind != "armt" and width and width % memory.num_heads:
            yield f"memory.num_heads {memory.num_heads} does not divide {name} {width}"
    if memory.kind == "lm2" and memory.write == "top_k" and memory.write_slots > memory.num_slots:
        yield f"memory.write_slots {memory.write_slots} is above memory.num_slots {memory.num_slots}"
    first, banks = memory.first_layer, memory.num_layers or 1
    if first + banks > model.num_layers:
        found = (
            f"memory.first_layer {first} with {banks} in memory.num_layers" if first else f"memory.num_layers {banks}"
        )
        yield f"{found} is above model.num_layers {model.num_layers}"


def _state_problems(config: Config) -> Iterator[str]:
    """Problems of layout and schedule for kinds that keep one state per lane."""
    memory, data, train = config.memory, config.data, config.train
    if memory.kind not in ("rmt", "official"):
        return
    if data.boundaries == "packed":
        yield f"data.boundaries packed: {memory.kind} keeps one state per lane; use segment or stream"
    if train.schedule == "layer":
        yield f"train.schedule layer: {memory.kind} needs a segment's last layer before the next segment; use segment"


def _official_problems(config: Config) -> Iterator[str]:
    """Problems of the sizes of the authors' published model, and of settings that only it has."""
    model, memory, data, train = config.model, config.memory, config.data, config.train
    if memory.kind != "official":
        if memory.dropout:
            yield f"memory.dropout {memory.dropout}: only kind official has dropout"
        return
    N = memory.num_slots
    sizes = {"model.d_model": model.d_model, "data.segment_length": data.segment_length}
    sizes |= {f"train.curriculum.{i}.segment_length": stage.segment_length for i, stage in enumerate(train.curriculum)}
    sizes |= {"memory.width": memory.width} if memory.width else {}
    unequal = [f"{key} {size}" for key, size in sizes.items() if size != N]
    if unequal:
        yield (
            "memory.kind official needs the number of slots, the segment length and the model width to be equal, but "
            f"memory.num_slots is {N} and {', '.join(unequal)}; kind lm2 has no such limit"
        )
    if N % memory.num_heads:
        yield f"memory.num_heads {memory.num_heads} does not divide memory.num_slots {N}"
    if memory.num_layers not in (None, model.num_layers):
        yield f"memory.num_layers {memory.num_layers}: kind official has its memory in all blocks"
    if memory.first_layer:
        yield f"memory.first_layer {memory.first_layer}: kind official has its memory in all blocks"


def _window_problems(config: Config) -> Iterator[str]:
    """Problems of attention over the edges of segments."""
    model, kind = config.model, config.memory.kind
    if model.window is None:
        if model.sinks:
            yield f"model.sinks {model.sinks} needs model.window"
        if model.max_distance is not None:
            yield f"model.max_distance {model.max_distance} needs model.window"
        return
    if kind in ("rmt", "armt", "official"):
        yield f"model.window {model.window}: memory.kind {kind} attends to one segment alone; use another, or null"
    shortest = min(stage.segment_length for stage in config.stages)
    if model.window > shortest:
        yield f"model.window {model.window} is above the segment length {shortest}; it reaches one segment back at most"
    if model.sinks >= model.window:
        yield f"model.sinks {model.sinks} must be below model.window {model.window}"
    if model.max_distance is not None and model.max_distance < model.window - 1:
        yield f"model.max_distance {model.max_distance} is below {model.window - 1}, the farthest in model.window"


def _context_problems(config: Config) -> Iterator[str]:
    """Problems of segments whose tokens are spread over devices."""
    model, mesh = config.model, config.mesh
    if mesh.context == 1:
        return
    found = f"mesh.context {mesh.context}"
    if config.memory.kind != "none":
        yield f"{found}: memory.kind {config.memory.kind} reads its memory in whole segments; only none can share one"
    if model.window is not None:
        yield f"{found}: model.window {model.window} attends to tokens nearby; use null"
    if model.conv_width:
        yield f"{found}: model.conv_width {model.conv_width} needs the tokens before; use 0"
    if mesh.tensor != 1:
        yield f"{found}: found mesh.tensor {mesh.tensor} beside it; use 1"


def _step_problems(config: Config) -> Iterator[str]:
    """Problems of what is trained, of microbatches, of warm-up and of the steps to trace."""
    data, optim, train = config.data, config.optim, config.train
    if "lora" in optim.train and config.model.lora is None:
        yield "optim.train lora needs model.lora"
    if data.batch_size % optim.accumulation_steps:
        yield f"optim.accumulation_steps {optim.accumulation_steps} does not divide data.batch_size {data.batch_size}"
    if optim.warmup_steps > train.steps:
        yield f"optim.warmup_steps {optim.warmup_steps} is above train.steps {train.steps}"
    if train.profile and train.profile.last > train.steps:
        yield f"train.profile ends with step {train.profile.last}, after train.steps {train.steps}"


def _source_problems(config: Config) -> Iterator[str]:
    """Problems of a data source's layout, tokenizer, vocabulary and loss."""
    data, optim = config.data, config.optim
    needed = "needs bytes, sentencepiece, tokenizers or llama3"
    if data.source == "stories":
        if data.boundaries != "segment":
            yield f"data.boundaries {data.boundaries}: stories start at segments; use segment"
        if data.background and config.tokenizer.kind == "stories":
            yield f"tokenizer.kind stories knows only the generator's words; data.background {needed}"
        if data.validation_path and not data.path:
            yield "data.validation_path without data.path: the generator holds out its own stories"
        return
    if data.source == "bin" and config.model.vocab_size is None:
        yield "model.vocab_size is missing; .bin shards hold ids, no text to tokenize"
    elif data.source != "bin" and config.tokenizer.kind == "stories":
        yield f"tokenizer.kind stories knows only the generator's words; data.source {data.source} {needed}"
    if optim.lm_loss_weight == 0:
        yield f"optim.lm_loss_weight 0: data.source {data.source} has no answers, so nothing would be learned"


def _order_problems(config: Config) -> Iterator[str]:
    """Problems of the official trainer's order of batches, which takes shards as one stream of equal segments."""
    data = config.data
    if data.order != "official":
        return
    if (data.source, data.boundaries) != ("bin", "stream"):
        yield (
            "data.order official needs data.source bin and data.boundaries stream; found data.source "
            f"{data.source}, data.boundaries {data.boundaries}"
        )
    if len({stage.segment_length for stage in config.stages}) > 1:
        yield "data.order official needs one segment length; train.curriculum changes it"
