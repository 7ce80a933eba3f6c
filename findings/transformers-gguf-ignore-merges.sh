#!/usr/bin/env bash
# transformers 5.24.0: of a GGUF file of Llama 3, words of the vocabulary are cut where no merges lead to them.
#
# Llama 3 takes a word that is in the vocabulary as one token, whether merges lead to it or not: its tokenizer.json says
# `ignore_merges`, and a GGUF file says tokenizer.ggml.pre `llama-bpe`, from which llama.cpp concludes the same.
# transformers takes the words' pattern from that name, but not this rule: other ids than the original, without a word.
# One would expect both, as it knows the name.
#
# Seen:
#   original: ['the']
#   from GGUF with llama-bpe: ['th', 'e'] (ignore_merges False)
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check \
    transformers==5.24.0 tokenizers==0.23.3 gguf==0.19.0 torch==2.13.0
"$directory/venv/bin/python" - "$directory" <<'END'
import sys

from gguf import GGUFWriter
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the"]
ids = {token: id for id, token in enumerate(tokens)}
original = Tokenizer(models.BPE(ids, [("t", "h")], ignore_merges=True))
original.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)

writer = GGUFWriter(f"{sys.argv[1]}/llama.gguf", "llama")
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("llama-bpe")
writer.add_token_list(tokens)
writer.add_token_types([1] * len(tokens))
writer.add_token_merges(["t h"])
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
read = AutoTokenizer.from_pretrained(sys.argv[1], gguf_file="llama.gguf")
expected, found = original.encode("the").tokens, read.convert_ids_to_tokens(read("the").input_ids)
ignores = read.backend_tokenizer.model.ignore_merges
print(f"original: {expected}\nfrom GGUF with llama-bpe: {found} (ignore_merges {ignores})")
assert expected == ["the"] and found == ["th", "e"] and not ignores
END
