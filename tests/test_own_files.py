"""A pretrained model's own files: begin, end and pad tokens, chat template and sampling, from its texts to its export.

One statement of what a prompt is, in training, generation, evaluation and export, for every kind of post-processor.
"""

import functools
import json
import shutil
import sys

import numpy as np
import pytest
import tokenizers
from convert_helpers import convert, random_llama, random_own, torch, transformers, with_keys
from evaluated import load, make_model, needs_harness
from export_helpers import works
from helpers import quick_training, run_generate
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from lm2_jax.common.errors import UserError
from lm2_jax.config import TokenizerConfig, parse_config
from lm2_jax.data.documents import TextSource
from lm2_jax.data.prepared import PreparedSource
from lm2_jax.loading import load_run
from lm2_jax.parallel.mesh import use_mesh
from lm2_jax.tokenizer import load_tokenizer
from lm2_jax.training.loop import train

PROSE = "the white whale swam; nobody saw the ship, 12 times!\n" * 20
CONTROL = ("<|begin_of_text|>", "<|end_of_text|>", "<|start|>", "<|over|>", "<|eot_id|>", "<|pad|>")
BEGIN, END, START, OVER, EOT, PAD = range(6)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}<|over|>{{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|over|>{% endif %}"
)
CHAT = "<|begin_of_text|><|start|>user<|over|>the whale<|eot_id|>"


def byte_level(control=CONTROL, post_processor=None):
    """A tokenizer of the prose with these control tokens, whose ids come first."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=list(control), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([PROSE], trainer)
    if post_processor is not None:
        tokenizer.post_processor = post_processor
    return tokenizer


def template(single, control=CONTROL):
    named = [(name, id) for id, name in enumerate(control) if name in single]
    return processors.TemplateProcessing(single=single, special_tokens=named)


def instruct_model(path, control=CONTROL, post_processor=None, **settings):
    """A random Llama with the files of an instruct model, as its makers publish them."""
    random_llama(path, "tied, grouped")
    config = json.loads((path / "config.json").read_text())
    config |= {"vocab_size": 290, "bos_token_id": BEGIN, "eos_token_id": [END, EOT], "pad_token_id": PAD}
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).save_pretrained(path)
    tokenizer = byte_level(control, post_processor or template("<|begin_of_text|> $A"))
    tokenizer.save(str(path / "tokenizer.json"))
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": control[BEGIN], "eos_token": control[EOT]}
    own |= {"pad_token": control[PAD], "model_max_length": 131072}
    (path / "tokenizer_config.json").write_text(json.dumps(own | settings))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20}
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [END, EOT], **sampling}))
    return path


def trained(tmp_path, *overrides, source="llama"):
    """A run of two steps on prose, begun with the weights of a converted directory."""
    (tmp_path / "prose.txt").write_text(PROSE)
    warm = convert("huggingface", "lm2_jax", tmp_path / source, tmp_path / "warm", "memory.kind=lm2", *overrides)
    config = load_run(warm).config.model_dump(mode="json")
    config["data"] |= {"path": [str(tmp_path / "prose.txt")], "document_separator": "\n", "segment_length": 16}
    config["data"] |= {"batch_size": 2, "segments_per_window": 1}
    config["train"] |= {"run_dir": str(tmp_path / "run"), "init_from": str(warm), "steps": 2}
    config["optim"] |= {"warmup_steps": 1}
    with quick_training():
        train(parse_config(json.dumps(config)))
    return tmp_path / "run"


def test_what_an_instruct_model_knows_survives_training(tmp_path):
    llama = instruct_model(tmp_path / "llama")
    run = trained(tmp_path)
    shutil.rmtree(llama)  # the run keeps what it needs, but for the tokenizer's file
    out = convert("lm2_jax", "huggingface", run, tmp_path / "out")
    settings, generation = (json.loads((out / f"{n}.json").read_text()) for n in ("config", "generation_config"))
    assert settings["eos_token_id"] == generation["eos_token_id"] == [END, EOT]
    assert (settings["bos_token_id"], settings["pad_token_id"]) == (BEGIN, PAD)
    assert {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20}.items() <= generation.items()
    theirs = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == (CONTROL[BEGIN], CONTROL[EOT], CONTROL[PAD])
    assert theirs.apply_chat_template([{"role": "user", "content": "the whale"}], tokenize=False) == CHAT


# --- One statement of what a prompt is -------------------------------------------------------------------------------

BYTES_ONLY = processors.ByteLevel(trim_offsets=False)
POST_PROCESSORS = {
    "none": (None, []),
    "ByteLevel": (BYTES_ONLY, []),
    "begin": (template("<|begin_of_text|> $A"), [BEGIN]),
    "begin and end": (template("<|begin_of_text|> $A <|end_of_text|>"), [BEGIN]),
    "two before": (template("<|start|> <|begin_of_text|> $A"), [START, BEGIN]),
    "Bert": (processors.BertProcessing((CONTROL[END], END), (CONTROL[BEGIN], BEGIN)), [BEGIN]),
    "Roberta": (processors.RobertaProcessing((CONTROL[END], END), (CONTROL[BEGIN], BEGIN)), [BEGIN]),
    "Sequence": (processors.Sequence([BYTES_ONLY, template("<|begin_of_text|> $A")]), [BEGIN]),
}


@pytest.mark.parametrize("kind", POST_PROCESSORS)
def test_a_prompt_is_the_same_everywhere(tmp_path, kind):
    post_processor, prefix = POST_PROCESSORS[kind]
    instruct_model(tmp_path / "llama")
    byte_level(CONTROL, post_processor).save(str(tmp_path / "llama" / "tokenizer.json"))
    ours = convert("huggingface", "lm2_jax", tmp_path / "llama", tmp_path / "ours")
    out = convert("lm2_jax", "huggingface", ours, tmp_path / "out")
    tokenizer = load_tokenizer(load_run(ours).config.tokenizer)
    prompt = [*prefix, *tokenizer.encode("the whale")]

    (tmp_path / "a.txt").write_text("the whale")
    assert TextSource([tmp_path / "a.txt"], tokenizer)[0].tokens.tolist() == [*prompt, EOT], "training"
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert theirs("the whale").input_ids == prompt, "export"
    before = transformers.AutoTokenizer.from_pretrained(tmp_path / "llama")("the whale").input_ids
    assert before in (prompt, [*prompt, END]), "the model's own tokenizer, but for an end that a prompt has not reached"


@needs_harness
@pytest.mark.parametrize("kind", ["ByteLevel", "begin"])
def test_a_prompt_is_the_same_in_evaluation(tmp_path, kind):
    from lm_eval.models.huggingface import HFLM

    llama = instruct_model(tmp_path / "llama", post_processor=POST_PROCESSORS[kind][0])
    ours = make_model(load(convert("huggingface", "lm2_jax", llama, tmp_path / "ours")))
    theirs = HFLM(pretrained=str(llama), device="cpu", dtype="float32")
    assert ours.tok_encode("the whale") == theirs.tok_encode("the whale")
    assert ours.prefix_token_id == theirs.prefix_token_id
    pairs = [("", "the whale"), ("the white ", "whale"), ("the whale", " swam")]
    requests = [type("Request", (), {"args": pair}) for pair in pairs]
    found = [np.array(model.loglikelihood(requests)) for model in (ours, theirs)]
    np.testing.assert_allclose(found[0][:, 0], found[1][:, 0], atol=1e-4)


# --- Names that nobody could guess -----------------------------------------------------------------------------------

ODD = ("<\uff5cbegin\u2581of\u2581sentence\uff5c>", "[END]", "[A]", "[B]", "[DONE]", "[P]")


@pytest.mark.parametrize("named_in", ["tokenizer_config.json", "config.json"])
def test_named_tokens_are_found(tmp_path, named_in):
    path = instruct_model(tmp_path / "llama", ODD, template(f"{ODD[BEGIN]} $A", ODD))
    if named_in == "config.json":  # ids alone
        for file in ("tokenizer_config.json", "generation_config.json"):
            (path / file).unlink()
    tokenizer = load_tokenizer(TokenizerConfig(kind="tokenizers", path=str(path / "tokenizer.json")))
    (tmp_path / "a.txt").write_text("the whale")
    end = EOT if named_in == "tokenizer_config.json" else END
    expected = [BEGIN, *tokenizer.encode("the whale"), end]
    assert TextSource([tmp_path / "a.txt"], tokenizer)[0].tokens.tolist() == expected


def test_a_bare_file_can_be_told(tmp_path, capsys):
    """Without files beside it: one message where no end is found, and settings that name the tokens."""
    byte_level(ODD).save(str(tmp_path / "tokenizer.json"))
    settings = {"kind": "tokenizers", "path": str(tmp_path / "tokenizer.json")}
    load_tokenizer(TokenizerConfig(**settings))
    load_tokenizer(TokenizerConfig(**settings))
    assert capsys.readouterr().err.count("names no end token") == 1
    told = load_tokenizer(TokenizerConfig(**settings, bos_token=ODD[BEGIN], eos_token=[ODD[EOT], ODD[END]]))
    assert (told.special.prefix_ids, told.special.eos_id, told.special.stop_ids) == ((BEGIN,), EOT, (EOT, END))
    assert capsys.readouterr().err == ""
    none = load_tokenizer(TokenizerConfig(**settings, bos_token="", eos_token=""))
    assert (none.special.prefix_ids, none.special.eos_id, none.special.stop_ids) == ((), None, ())
    assert len({tokenizer.fingerprint() for tokenizer in (told, none)}) == 2
    with pytest.raises(UserError, match=r"tokenizer\.eos_token: '\[EOS\]' is no token of this tokenizer"):
        load_tokenizer(TokenizerConfig(**settings, eos_token="[EOS]"))


# --- Control tokens inside texts -------------------------------------------------------------------------------------


def test_control_tokens_in_a_corpus(tmp_path, capsys):
    """Read as text with one warning, or, told so, as the model's own tokenizer reads them."""
    llama = instruct_model(tmp_path / "llama")
    settings = {"kind": "tokenizers", "path": str(llama / "tokenizer.json")}
    as_text = load_tokenizer(TokenizerConfig(**settings))
    for _ in range(2):
        ids = as_text.encode(CHAT)
    warned = capsys.readouterr().err
    assert warned.count("<|begin_of_text|>") == 1 and "tokenizer.control_tokens" in warned
    assert as_text.decode(ids) == CHAT and min(ids) > PAD
    as_tokens = load_tokenizer(TokenizerConfig(**settings, control_tokens="token"))
    theirs = transformers.AutoTokenizer.from_pretrained(llama)(CHAT, add_special_tokens=False).input_ids
    assert as_tokens.encode(CHAT) == theirs and len(theirs) < len(ids) / 2
    assert as_tokens.fingerprint() != as_text.fingerprint()
    with pytest.raises(UserError, match="control_tokens token needs kind tokenizers or llama3"):
        parse_config("", ("tokenizer={kind: bytes, control_tokens: token}",))


# --- Padding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [CONTROL[PAD], CONTROL[EOT], None], ids=["its own", "an end", "none"])
def test_padding_never_hides_an_end(tmp_path, pad):
    """transformers' collator takes no loss from padding tokens: a fine-tuned model must still learn to stop."""
    path = instruct_model(tmp_path / "llama", pad_token=pad)
    if pad is None:
        with_keys(pad_token_id=None)(path)
    convert("huggingface", "lm2_jax", path, tmp_path / "ours")
    out = convert("lm2_jax", "huggingface", tmp_path / "ours", tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    collate = transformers.DataCollatorForLanguageModeling(theirs, mlm=False)
    short, long = ([*theirs("the whale").input_ids, EOT], [*theirs("the whale swam").input_ids, EOT])
    labels = works(collate, [{"input_ids": short}, {"input_ids": long}])["labels"].tolist()
    assert [row.count(EOT) for row in labels] == [1, 1]
    assert json.loads((out / "config.json").read_text())["pad_token_id"] == theirs.pad_token_id != EOT
    if pad == CONTROL[PAD]:
        assert theirs.pad_token == pad


def test_padding_of_our_own_tokenizers(tmp_path):
    ours = random_own(tmp_path / "ours", "tokenizer.kind=bytes", "model.vocab_size=258")
    out = convert("lm2_jax", "huggingface", ours, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    collate = transformers.DataCollatorForLanguageModeling(theirs, mlm=False)
    labels = collate([{"input_ids": [256, 97, 257]}, {"input_ids": [256, 97, 98, 257]}])["labels"]
    assert (labels == 257).sum() == 2


# --- Generation ------------------------------------------------------------------------------------------------------


@pytest.fixture
def generate(monkeypatch, capsys):
    """Runs the command; gives its exit code and what it wrote."""
    return functools.partial(run_generate, monkeypatch, capsys)


def test_generate_samples_chats_and_stops_as_the_model_does(tmp_path, generate, monkeypatch):
    from lm2_jax.decoding import sampling

    ours = convert("huggingface", "lm2_jax", instruct_model(tmp_path / "llama"), tmp_path / "ours")
    asked = {}

    def decode(model, params, prompts, state, **options):
        asked.update(options, prompt=prompts[0].tolist())
        return [[]], state

    monkeypatch.setattr(sampling, "decode", decode)
    capital = ("--prompt", "the whale", "--max-new-tokens", "1")
    code, _, err = generate(ours, *capital)
    assert code == 0 and "temperature 0.6, top-k 20, top-p 0.9" in err
    assert (asked["temperature"], asked["top_k"], asked["top_p"]) == (0.6, 20, 0.9)
    assert set(asked["stop_ids"]) == {END, EOT}
    _, _, err = generate(ours, *capital, "--temperature", "0")
    assert (asked["temperature"], asked["top_k"], asked["top_p"], err) == (0, None, None, "")
    generate(ours, *capital, "--chat")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "llama")
    message = [{"role": "user", "content": "the whale"}]
    expected = theirs.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    assert asked["prompt"] == expected
    (ours / "origin" / "chat_template.jinja").write_text("{{ raise_exception('no system here') }}")
    code, _, err = generate(ours, *capital, "--chat")
    assert code == 2 and "its chat template refuses these messages (no system here)" in err
    (ours / "origin" / "chat_template.jinja").unlink()
    code, _, err = generate(ours, *capital, "--chat")
    assert code == 2 and "has no chat template" in err


# --- Prepared data ---------------------------------------------------------------------------------------------------


def test_prepared_data_keep_what_the_model_says(tmp_path, monkeypatch):
    """Their copy of the tokenizer ends documents as the model's directory does, wherever that is."""
    from lm2_jax import prepare_data

    llama = instruct_model(tmp_path / "llama")
    (tmp_path / "a.txt").write_text("the whale")
    named = ("--input", str(tmp_path / "a.txt"), "--output", str(tmp_path / "prepared"))
    monkeypatch.setattr(sys, "argv", ["prepare_data", *named, "--tokenizer", str(llama / "tokenizer.json")])
    prepare_data.main()
    whole = load_tokenizer(TokenizerConfig(kind="tokenizers", path=str(llama / "tokenizer.json")))
    kept = load_tokenizer(TokenizerConfig(kind="tokenizers", path=str(tmp_path / "prepared" / "tokenizer.json")))
    assert kept.special == whole.special and kept.fingerprint() == whole.fingerprint()
    (document,) = PreparedSource([tmp_path / "prepared"], whole.fingerprint())
    assert document.tokens.tolist() == [BEGIN, *whole.encode("the whale"), EOT]


@needs_harness
def test_evaluation_asks_in_the_models_chat_template(tmp_path, monkeypatch):
    """The log-likelihoods of lm-eval's own model of the same weights, with its --apply_chat_template."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    from lm2_jax.evals import harness, scoring

    llama = instruct_model(tmp_path / "llama")
    rows = ["question,a,b,answer", "where is the whale,here,there,0", "what swam,ship,whale,1", "who saw,nobody,all,0"]
    (tmp_path / "q.csv").write_text("\n".join(rows))
    task = {
        "task": "whales",
        "dataset_path": "csv",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "q.csv")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "description": "Whales.",
        "doc_to_text": "{{question}}?",
        "doc_to_choice": ["a", "b"],
        "doc_to_target": "answer",
        "num_fewshot": 1,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "whales.yaml").write_text(json.dumps(task))
    asked = (f"eval.harness.tasks=[{tmp_path}/whales.yaml]", "eval.harness.chat=true", "data.segment_length=256")
    loaded, found = load(convert("huggingface", "lm2_jax", llama, tmp_path / "ours"), *asked), []
    score = scoring.loglikelihood

    def watched(model, pairs):
        for batch in score(model, pairs):
            found.extend((len(pairs[number][0]), log) for number, log, _ in batch)
            yield batch

    monkeypatch.setattr(scoring, "loglikelihood", watched)
    with use_mesh(loaded.mesh):
        harness.evaluate(loaded, None, lambda _: None)
    theirs = lm_eval.simple_evaluate(
        HFLM(pretrained=str(llama), device="cpu", dtype="float32"),
        tasks=[str(tmp_path / "whales.yaml")],
        apply_chat_template=True,
        fewshot_as_multiturn=True,
        log_samples=True,
    )
    expected = [answer[0] for sample in theirs["samples"]["whales"] for answer in sample["filtered_resps"]]
    assert len(expected) == len(found) == 6
    np.testing.assert_allclose(sorted(log for _, log in found), sorted(expected), atol=1e-4)
