#!/usr/bin/env bash
# tokenizers 0.23.3: a copy of a Tokenizer, by pickle, copy.deepcopy or to_str, forgets `encode_special_tokens`.
#
# The attribute says that the names of special tokens inside a text are to be encoded as text. A worker process
# that is sent such a tokenizer turns "<eos>" in a document into the control token, whereas the parent does not.
# One would expect a copy to behave as its original: truncation and padding, which are set on the object as well,
# are kept.
#
# Seen:
#   original True ['a', '<', 'eos', '>']
#   pickle False ['a', '<eos>']
#   deepcopy False ['a', '<eos>']
#   to_str False ['a', '<eos>']
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3
"$directory/venv/bin/python" - <<'END'
import copy
import pickle

from tokenizers import Tokenizer, models, pre_tokenizers

tokenizer = Tokenizer(models.WordLevel({"a": 0, "<": 1, "eos": 2, ">": 3}, unk_token="a"))
tokenizer.pre_tokenizer = pre_tokenizers.Punctuation()
tokenizer.add_special_tokens(["<eos>"])
tokenizer.enable_truncation(100)
tokenizer.encode_special_tokens = True
copies = {
    "original": tokenizer,
    "pickle": pickle.loads(pickle.dumps(tokenizer)),
    "deepcopy": copy.deepcopy(tokenizer),
    "to_str": Tokenizer.from_str(tokenizer.to_str()),
}
for name, one in copies.items():
    print(name, one.encode_special_tokens, one.encode("a<eos>").tokens)
    assert one.truncation == tokenizer.truncation
    assert one.encode_special_tokens == (name == "original")
    assert one.encode("a<eos>").tokens == (["a", "<", "eos", ">"] if name == "original" else ["a", "<eos>"])
END
