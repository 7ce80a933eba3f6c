"""The run directory: who may train in it, and with which config."""

from __future__ import annotations

from pathlib import Path

from lm2_jax.config import Config, load_config


def read_run_config(run_dir: Path) -> Config | None:
    """The config that a run directory was started with; None if it holds none."""
    path = run_dir / "config.yaml"
    return load_config(path) if path.exists() else None
