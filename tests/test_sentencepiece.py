"""Sentencepiece models: out to transformers as tokenizer.json, and in from directories that have nothing else."""

import io
import json

import pytest
import sentencepiece
from convert_helpers import convert, random_llama, random_own, transformers
from export_helpers import works

from lm2_jax.config import TokenizerConfig
from lm2_jax.data.documents import TextSource
from lm2_jax.loading import load_run
from lm2_jax.tokenizer import load_tokenizer

PROSE = "the white whale swam; nobody saw the ship, 12 times!\n" * 20


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("normalization", ["identity", "nmt_nfkc"])
def test_sentencepiece_through_transformers(tmp_path, kind, normalization):
    """Without sentencepiece or protobuf there: our ids, begin first, padding on the left, text given back."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE.splitlines()),
        model_writer=model,
        model_type=kind,
        vocab_size=330,
        byte_fallback=True,
        normalization_rule_name=normalization,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "sp.model").write_bytes(model.getvalue())
    settings = TokenizerConfig(kind="sentencepiece", path=str(tmp_path / "sp.model"))
    tokenizer = load_tokenizer(settings)
    ours = random_own(
        tmp_path / "ours", f"model.vocab_size={tokenizer.vocab_size}", f"tokenizer={settings.model_dump_json()}"
    )
    out = convert("lm2_jax", "huggingface", ours, tmp_path / "out")
    theirs = works(transformers.AutoTokenizer.from_pretrained, out, trust_remote_code=True)
    for text in ("the whale", "12 ships \u00e9\u65e5; swam!", " the  white\nwhale "):
        assert theirs(text).input_ids == [tokenizer.special.bos_id, *tokenizer.encode(text)]
    assert theirs.decode(theirs("the whale swam").input_ids, skip_special_tokens=True) == "the whale swam"
    rows = theirs(["the whale", "the white whale swam"], padding=True).attention_mask
    assert rows[0][0] == 0 and rows[0][-1] == 1 and theirs.eos_token == "</s>" != theirs.pad_token


@pytest.mark.parametrize("told", [None, True, False])
def test_sentencepiece_begins_as_its_model_says(tmp_path, told):
    """A Llama-2 directory of old: tokenizer.model alone, with the begin token unless add_bos_token is false."""
    random_llama(tmp_path / "llama")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE.splitlines()),
        model_prefix=str(tmp_path / "llama" / "tokenizer"),
        vocab_size=61,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    if told is not None:
        (tmp_path / "llama" / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": told}))
    tokenizer = load_tokenizer(
        load_run(convert("huggingface", "lm2_jax", tmp_path / "llama", tmp_path / "ours")).config.tokenizer
    )
    (tmp_path / "a.txt").write_text("the whale")
    begin = [] if told is False else [tokenizer.special.bos_id]
    document = TextSource([tmp_path / "a.txt"], tokenizer)[0]
    assert document.tokens.tolist() == [*begin, *tokenizer.encode("the whale"), tokenizer.special.eos_id]
