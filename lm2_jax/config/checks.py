"""Checks across sections of a config. Each function yields problems as text that begins with a key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lm2_jax.config.sections import (
    DataConfig,
    MemoryConfig,
    ModelConfig,
    OptimConfig,
    StageConfig,
    TokenizerConfig,
    TrainConfig,
)


def bank_problems(model: ModelConfig, memory: MemoryConfig) -> Iterator[str]:
    """Problems of the sizes of lm2's banks."""
    if memory.kind != "lm2":
        return
    for name, width in (("model.d_model", model.d_model), ("memory.width", memory.width)):
        if width and width % memory.num_heads:
            yield f"memory.num_heads {memory.num_heads} does not divide {name} {width}"
    if (memory.num_layers or 0) > model.num_layers:
        yield f"memory.num_layers {memory.num_layers} is above model.num_layers {model.num_layers}"


def state_problems(memory: MemoryConfig, data: DataConfig, train: TrainConfig) -> Iterator[str]:
    """Problems of layout and schedule for kinds that keep one state per lane."""
    if memory.kind not in ("rmt", "official"):
        return
    if data.boundaries == "packed":
        yield f"data.boundaries packed: {memory.kind} keeps one state per lane; use segment or stream"
    if train.schedule == "layer":
        yield f"train.schedule layer: {memory.kind} needs a segment's last layer before the next segment; use segment"


def official_problems(model: ModelConfig, memory: MemoryConfig, data: DataConfig, train: TrainConfig) -> Iterator[str]:
    """Problems of the sizes of the authors' published model, and of settings that only it has."""
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


def step_problems(data: DataConfig, optim: OptimConfig, train: TrainConfig) -> Iterator[str]:
    """Problems of microbatches and warm-up."""
    if data.batch_size % optim.accumulation_steps:
        yield f"optim.accumulation_steps {optim.accumulation_steps} does not divide data.batch_size {data.batch_size}"
    if optim.warmup_steps > train.steps:
        yield f"optim.warmup_steps {optim.warmup_steps} is above train.steps {train.steps}"


def source_problems(
    model: ModelConfig, data: DataConfig, tokenizer: TokenizerConfig, optim: OptimConfig
) -> Iterator[str]:
    """Problems of a data source's layout, tokenizer, vocabulary and loss."""
    needed = "needs bytes, sentencepiece, tokenizers or llama3"
    if data.source == "stories":
        if data.boundaries != "segment":
            yield f"data.boundaries {data.boundaries}: stories start at segments; use segment"
        if data.background and tokenizer.kind == "stories":
            yield f"tokenizer.kind stories knows only the generator's words; data.background {needed}"
        if data.validation_path and not data.path:
            yield "data.validation_path without data.path: the generator holds out its own stories"
        return
    if data.source == "bin" and model.vocab_size is None:
        yield "model.vocab_size is missing; .bin shards hold ids, no text to tokenize"
    elif data.source != "bin" and tokenizer.kind == "stories":
        yield f"tokenizer.kind stories knows only the generator's words; data.source {data.source} {needed}"
    if optim.lm_loss_weight == 0:
        yield f"optim.lm_loss_weight 0: data.source {data.source} has no answers, so nothing would be learned"


def order_problems(data: DataConfig, stages: Sequence[StageConfig]) -> Iterator[str]:
    """Problems of the official trainer's order of batches, which takes shards as one stream of equal segments."""
    if data.order != "official":
        return
    if (data.source, data.boundaries) != ("bin", "stream"):
        yield (
            "data.order official needs data.source bin and data.boundaries stream; found data.source "
            f"{data.source}, data.boundaries {data.boundaries}"
        )
    if len({stage.segment_length for stage in stages}) > 1:
        yield "data.order official needs one segment length; train.curriculum changes it"
