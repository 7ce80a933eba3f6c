#!/usr/bin/env bash
# transformers 5.24.0: a GGUF file's tokenizer.ggml.pre that it does not know is read as GPT-2's, without a word.
#
# The setting names how a text is cut into words before merges apply. `smollm`, which the files of SmolLM carry, cuts
# digits off one by one first. It is not in the table of transformers, which then takes the cuts of GPT-2: other ids
# before some numbers, so that one hardly notices. One would expect the cuts of that name, or an error. Nothing is said.
#
# Seen:
#   original: ['Ċ', 'ĠĠ', '1', '6', '6', '8']
#   from GGUF with smollm: ['Ċ', 'Ġ', 'Ġ', '1', '6', '6', '8']
#   from GGUF with gpt-2: ['Ċ', 'Ġ', 'Ġ', '1', '6', '6', '8']
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check \
    transformers==5.24.0 tokenizers==0.23.3 gguf==0.19.0 torch==2.13.0
"$directory/venv/bin/python" - "$directory" <<'END'
import logging
import sys

from gguf import GGUFWriter
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

directory = sys.argv[1]
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
tokens = [*alphabet, "ĠĠ"]
original = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, [("Ġ", "Ġ")]))
original.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
found = {"original": original.encode("\n  1668").tokens}
said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
transformers_logging.set_verbosity_warning()
transformers_logging.get_logger("transformers").addHandler(handler)
for pre in ("smollm", "gpt-2"):
    writer = GGUFWriter(f"{directory}/{pre}.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["Ġ Ġ"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=f"{pre}.gguf")
    found[f"from GGUF with {pre}"] = tokenizer.convert_ids_to_tokens(tokenizer("\n  1668").input_ids)
for name, pieces in found.items():
    print(f"{name}: {pieces}")
assert found["from GGUF with smollm"] == found["from GGUF with gpt-2"] != found["original"]
assert not said
END
