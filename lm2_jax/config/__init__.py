"""Every setting of lm2_jax: typed, validated, loaded from YAML. No jax here.

A config file holds any subset of the keys of `Config`; `--set a.b=c` overrides single keys. All mistakes are collected
and reported at once, each with the file, the key, the value found and what would be right.
"""

# ruff: noqa: F401 (imported here for others)

from __future__ import annotations

from lm2_jax.config.evaluation import (
    BabilongConfig,
    BabilongTask,
    EvalConfig,
    HarnessConfig,
    MmluConfig,
    PerplexityConfig,
)
from lm2_jax.config.files import SHIPPED, dump_config, load_config, parse_config, replace, save_config
from lm2_jax.config.sections import (
    LARGEST,
    CheckpointConfig,
    DataConfig,
    MemoryConfig,
    MeshConfig,
    MixtureConfig,
    ModelConfig,
    OptimConfig,
    ProfileConfig,
    RopeScaling,
    StageConfig,
    StoriesConfig,
    TokenizerConfig,
    TrainConfig,
    pattern_problem,
)
from lm2_jax.config.spec import Config, ModelSpec
