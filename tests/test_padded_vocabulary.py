"""A model whose embedding table has more rows than its tokenizer has ids: trained, fine-tuned and evaluated."""

import numpy as np
import pytest
from helpers import on_one_device, quick_training, short_config, text_overrides
from helpers import random_checkpoint as make_checkpoint

from lm2_jax.common.errors import UserError
from lm2_jax.data.prepare.inputs import open_inputs
from lm2_jax.data.prepare.plan import prepare
from lm2_jax.data.prepare.shards import Settings, run_locally
from lm2_jax.decoding.sampling import generate
from lm2_jax.evals import perplexity
from lm2_jax.evals.model import load_for_evaluation
from lm2_jax.loading import load_run
from lm2_jax.tokenizer import load_tokenizer
from lm2_jax.training.loop import train

ROWS = 300  # of the table; the bytes tokenizer has 258 ids


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("padded") / "model", f"model.vocab_size={ROWS}")


def _fine_tuning(path, padded, *overrides):
    text = text_overrides(path / "text.txt", "stream")
    return short_config(
        path / "run", *text, f"train.init_from={padded}", "train.steps=2", "train.curriculum=[]", *overrides
    )


def test_fine_tuned(tmp_path, padded):
    with quick_training():
        summary = train(_fine_tuning(tmp_path, padded, f"model.vocab_size={ROWS}"))
    assert np.isfinite(summary["loss"])
    run = load_run(tmp_path / "run")
    assert run.params["embedding"].shape[0] == run.config.model.vocab_size == ROWS
    (ids,) = generate(run.model, run.params, [[104, 105, 299]], max_new_tokens=9, temperature=9.0)
    assert max(ids) >= 258  # it was trained for two steps
    load_tokenizer(run.config.tokenizer).decode(ids)


def test_null_says_what_to_set(tmp_path, padded):
    """Null is the tokenizer's number of ids, which such weights do not fit."""
    with quick_training(), pytest.raises(UserError, match=r"are padding there, set model\.vocab_size to 300 here"):
        train(_fine_tuning(tmp_path, padded))


def test_fine_tuned_on_prepared_data(tmp_path, padded):
    config = _fine_tuning(tmp_path, padded)
    settings = Settings(tokenizer=config.tokenizer, output=tmp_path / "prepared")
    inputs = open_inputs(
        [str(tmp_path / "text.txt")], field="text", separator="\n\n", split="", vocab_size=258, bos_id=256
    )
    prepare(inputs, settings, run_locally(1, lambda tally: None))
    source = ("data.source=prepared", f"data.path={settings.output}", "data.document_separator=null")
    with quick_training():
        summary = train(_fine_tuning(tmp_path, padded, *source, f"model.vocab_size={ROWS}"))
    assert np.isfinite(summary["loss"])


def test_evaluated(tmp_path, padded):
    (tmp_path / "text.txt").write_text("the memory keeps what a segment said " * 9)
    with on_one_device():
        loaded = load_for_evaluation(padded, [f"eval.perplexity.path={tmp_path / 'text.txt'}"])
        result = perplexity.evaluate(loaded, None, lambda line: None)
    assert result["task"] == "perplexity"
