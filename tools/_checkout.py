"""Lets the tools run from a checkout of lm2_jax that is not installed: `import _checkout` comes before lm2_jax."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
