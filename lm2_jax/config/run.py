"""The config of a whole run."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from lm2_jax.config import checks
from lm2_jax.config.evaluation import EvalConfig
from lm2_jax.config.section import Section, raise_problems
from lm2_jax.config.sections import (
    CheckpointConfig,
    DataConfig,
    MemoryConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    StageConfig,
    TokenizerConfig,
    TrainConfig,
)
from lm2_jax.config.spec import ModelSpec


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
        model, memory, data, optim, train = self.model, self.memory, self.data, self.optim, self.train
        raise_problems(
            [
                *checks.bank_problems(model, memory),
                *checks.state_problems(memory, data, train),
                *checks.official_problems(model, memory, data, train),
                *checks.step_problems(data, optim, train),
                *checks.source_problems(model, data, self.tokenizer, optim),
                *checks.order_problems(data, self.stages),
            ]
        )
        return self
