"""What tests of evaluations share: checkpoints, the harness's model of one, scores of token lists."""

import functools
import importlib.util

import pytest
from helpers import random_checkpoint

from lm2_jax.evals import scoring
from lm2_jax.evals.model import load_for_evaluation
from lm2_jax.evals.results import ResultLog
from lm2_jax.parallel.mesh import use_mesh

T = 16
SETTINGS = ("data.batch_size=8", f"data.segment_length={T}", "data.segments_per_window=1", "eval.mmlu.shots=0")
needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed (requirements-dev.txt)"
)


@functools.cache
def make_checkpoint(folder, kind):
    return random_checkpoint(folder / kind, *SETTINGS, f"memory.kind={kind}")


def load(checkpoint, *overrides):
    return load_for_evaluation(checkpoint, overrides)


def score(loaded, asked):
    with use_mesh(loaded.mesh):
        found = {index: rest for batch in scoring.loglikelihood(loaded, asked) for index, *rest in batch}
    assert sorted(found) == list(range(len(asked)))
    return [found[index] for index in range(len(asked))]


def make_model(loaded, finished=None):
    from lm2_jax.evals.harness_model import HarnessModel

    return HarnessModel(loaded, finished or ResultLog(None, {}, ("request",)), lambda _: None)
