"""Tokenizers of GGUF files give the ids of the tokenizers they were made from, and keep what goes with them."""

import json

import pytest
from gguf_helpers import SPECIAL, TEXT, WORDS, byte_level, gpt2_settings, sentencepiece, spm_settings, transformers
from tokenizers import Tokenizer

from lm2_jax.common.errors import UserError
from lm2_jax.convert.gguf_tokenizer import write_tokenizer
from lm2_jax.tokenizer.kinds import HuggingFaceTokenizer

TEXTS = ("", " ", TEXT, TEXT[::-1], "  two  spaces  42\n\n 7", "<s> </s><|end_of_text|>")


def written(directory, settings):
    """The tokenizer of the settings, the values of its other files, and the ids."""
    ids = write_tokenizer(settings, directory, directory / "x.gguf")
    files = [json.loads((directory / f"{name}.json").read_text()) for name in ("tokenizer_config", "generation_config")]
    return Tokenizer.from_file(str(directory / "tokenizer.json")), *files, ids


@pytest.mark.parametrize("words", WORDS)
def test_byte_level(tmp_path, words):
    is_llama3 = words == "llama-bpe"
    original = byte_level(words, ignore_merges=is_llama3)
    settings = gpt2_settings(original, words)
    bos, eos, eot = map(original.token_to_id, SPECIAL)
    ends = [eos, eot]
    if is_llama3:  # <|eot_id|> is an end by its name
        del settings["tokenizer.ggml.eot_token_id"]
    else:
        settings["tokenizer.ggml.eom_token_id"] = (eom := original.token_to_id("Ġthe"))
        ends.append(eom)
    tokenizer, config, generation, ids = written(tmp_path, settings)
    for special in (False, True):
        tokenizer.encode_special_tokens = original.encode_special_tokens = special
        for text in TEXTS:
            found = tokenizer.encode(text, add_special_tokens=False).ids
            assert found == original.encode(text, add_special_tokens=False).ids
            assert tokenizer.decode(found, skip_special_tokens=False) == text
    assert "Ġthe" in tokenizer.encode("near the ship").tokens
    assert ids == generation == {"bos_token_id": bos, "eos_token_id": ends}
    assert (config["bos_token"], config["eos_token"], config["chat_template"]) == (*SPECIAL[:2], "{{ messages }}")
    assert config["add_bos_token"] == is_llama3  # what llama.cpp does where the file does not say
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    plain = original.encode("the ship").ids
    assert loaded("the ship")["input_ids"] == [bos] * is_llama3 + plain
    assert loaded("the ship", "the ship")["input_ids"] == ([bos] * is_llama3 + plain) * 2


def test_default_words(tmp_path):
    """llama.cpp's own rule cuts the text by four patterns, one after another."""
    tokenizer, *_ = written(tmp_path, gpt2_settings(byte_level(), "default"))
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("Hello, it's 12345 $%!")]
    assert pieces == ["Hello", ",", "Ġit", "'", "s", "Ġ", "123", "45", "Ġ", "$%!"]


@pytest.mark.parametrize("add_bos", [None, False, True])
def test_sentencepiece(tmp_path, add_bos):
    """The ids that sentencepiece gives, with bytes for letters that have no token, and its text back."""
    processor = sentencepiece()
    settings = spm_settings(processor)
    if add_bos is not None:
        settings |= {"tokenizer.ggml.add_bos_token": add_bos, "tokenizer.ggml.add_eos_token": True}
    tokenizer, config, _, ids = written(tmp_path, settings)
    ours = HuggingFaceTokenizer(Tokenizer.from_file(str(tmp_path / "tokenizer.json")), "")
    before, after = TEXT.split("day_one")
    for text in (*TEXTS[:2], before, after, *TEXTS[3:]):
        assert ours.encode(text) == processor.encode(text)
        assert ours.decode(ours.encode(text)) == text
    assert any(processor.is_byte(id) for id in ours.encode(TEXT))
    # A user-defined token, behind which a text begins anew
    one = processor.piece_to_id("day_one")
    assert ours.encode(TEXT) == [*processor.encode(before), one, *processor.encode(after)]
    assert ids == {"bos_token_id": 1, "eos_token_id": 2}
    assert [config[f"{name}_token"] for name in ("bos", "eos", "unk")] == ["<s>", "</s>", "<unk>"]
    expected = processor.encode("the ship", add_bos=add_bos is not False, add_eos=add_bos is not None)
    assert tokenizer.encode("the ship").ids == expected
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("the ship")["input_ids"] == expected


def test_no_space_before_a_text(tmp_path):
    settings = spm_settings(sentencepiece()) | {"tokenizer.ggml.add_space_prefix": False}
    tokenizer, *_ = written(tmp_path, settings)
    assert tokenizer.encode("the whale", add_special_tokens=False).tokens[0][0] == "t"
    assert tokenizer.decode(tokenizer.encode(" the whale").ids) == " the whale"


def test_several_chat_templates(tmp_path):
    named = {"tokenizer.chat_templates": ["tool_use"], "tokenizer.chat_template.tool_use": "{{ tools }}"}
    _, config, *_ = written(tmp_path, gpt2_settings(byte_level()) | named)
    names = [(template["name"], template["template"]) for template in config["chat_template"]]
    assert names == [("default", "{{ messages }}"), ("tool_use", "{{ tools }}")]


def _changed(key, change):
    return lambda settings: settings.update({f"tokenizer.ggml.{key}": change(settings.get(f"tokenizer.ggml.{key}"))})


REFUSED = {
    "model": (_changed("model", lambda _: "bert"), "model: found 'bert'; supported are gpt2, llama"),
    "no model": (lambda settings: settings.pop("tokenizer.ggml.model"), "model: found None"),
    "words": (_changed("pre", lambda _: "tekken"), "pre: found 'tekken'; supported are default, gpt-2"),
    "no words": (lambda settings: settings.pop("tokenizer.ggml.pre"), "pre: found None"),
    "tokens that are numbers": (_changed("tokens", lambda _: [1, 2]), "tokens: found [1, 2]; expected a list of str"),
    "a token twice": (
        _changed("tokens", lambda tokens: [*tokens[:-1], "a"]),
        "tokens: found 343, 342 of them different",
    ),
    "too few types": (_changed("token_type", lambda types: types[:-1]), "token_type: found 342 values for 343 tokens"),
    "merges of others": (_changed("merges", lambda merges: [*merges, "no such"]), "its tokens and merges do not fit"),
    "merges of three": (_changed("merges", lambda merges: ["t h e"]), "its tokens and merges do not fit"),
    "an id beyond": (_changed("eos_token_id", lambda _: 343), "eos_token_id: found 343; expected the id of one of 343"),
    "no bos": (
        lambda settings: (
            settings.pop("tokenizer.ggml.bos_token_id") and _changed("add_bos_token", lambda _: True)(settings)
        ),
        "bos_token_id: is missing, but add_bos_token is true",
    ),
    "a number for a truth": (_changed("add_bos_token", lambda _: 1), "add_bos_token: found 1; expected true or false"),
    "a template that is no text": (
        lambda settings: settings.update({"tokenizer.chat_template": 5}),
        "tokenizer.chat_template: found 5; expected a text",
    ),
    "no scores": (_changed("model", lambda _: "llama"), "scores: found None; expected a list of float"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, case):
    change, message = REFUSED[case]
    settings = gpt2_settings(byte_level())
    change(settings)
    with pytest.raises(UserError) as refused:
        write_tokenizer(settings, tmp_path, tmp_path / "x.gguf")
    assert str(refused.value).startswith(f"{tmp_path / 'x.gguf'}: tokenizer.")
    assert message in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_tokens_that_would_take_forever_to_merge(tmp_path):
    settings = spm_settings(sentencepiece())
    settings["tokenizer.ggml.tokens"][-1] = "x" * 257
    with pytest.raises(UserError, match="has over 256 characters"):
        write_tokenizer(settings, tmp_path, tmp_path / "x.gguf")
