#!/usr/bin/env bash
# transformers 5.24.0: from a GGUF file, tokenizer.ggml.add_space_prefix False is read and has no effect.
#
# The setting says whether a text of a sentencepiece vocabulary begins with a space of its own. Of a file that says no,
# the tokenizer puts one before each text all the same, without a word: another first token than the model was trained
# on. One would expect the setting to hold, as add_bos_token of the same file does.
#
# Seen:
#   add_space_prefix True: ['▁a', 'b']
#   add_space_prefix False: ['▁a', 'b']
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check \
    transformers==5.24.0 tokenizers==0.23.3 gguf==0.19.0 torch==2.13.0
"$directory/venv/bin/python" - "$directory" <<'END'
import sys

from gguf import GGUFWriter
from transformers import AutoTokenizer

control = ["<unk>", "<s>", "</s>"]
tokens = [*control, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a"]
for space in (True, False):
    writer = GGUFWriter(f"{sys.argv[1]}/{space}.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-2.0, -3.0, -4.0, -1.0])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * 4)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(not space)
    writer.add_add_space_prefix(space)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], gguf_file=f"{space}.gguf")
    ids = tokenizer("ab").input_ids
    begins, pieces = ids[0] == 1, tokenizer.convert_ids_to_tokens(ids[not space :])
    print(f"add_space_prefix {space}: {pieces}")
    assert begins != space  # add_bos_token holds
    assert pieces == ["▁a", "b"]
END
