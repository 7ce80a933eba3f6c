"""The settings that a model's parameters and compiled programs depend on, and nothing else of a run."""

from __future__ import annotations

import dataclasses

from lm2_jax.config.sections import MemoryConfig, ModelConfig


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
    """

    model: ModelConfig
    memory: MemoryConfig
    segment_length: int
    dtype: str = "float32"
    remat: str = "none"
    unroll: int = 1

    @property
    def memory_width(self) -> int:
        """Slot width M of the lm2 banks."""
        return self.memory.width or self.model.d_model

    @property
    def num_memory_layers(self) -> int:
        """Number of blocks, counted from the first, that have a bank; 0 for kinds without banks."""
        if self.memory.kind not in ("lm2", "official"):
            return 0
        return self.memory.num_layers or self.model.num_layers

    @property
    def recomputes_segments(self) -> bool:
        """True if `remat` recomputes each segment of a window by itself."""
        return self.remat in ("full", "offload")
