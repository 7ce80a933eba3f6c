#!/usr/bin/env bash
# transformers 5.24.0: beside a tokenizer.json, `add_bos_token` in tokenizer_config.json has no effect.
#
# The setting says whether a text begins with the begin token. It is dropped, either way, where the directory holds a
# tokenizer.json; the post-processor in that file decides alone. One would expect the setting, which is documented and
# which many published models carry, to hold, or a message that it does not.
#
# Seen:
#   post-processor adds <s>, add_bos_token False: begins with <s> True
#   post-processor adds nothing, add_bos_token True: begins with <s> False
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0 tokenizers==0.23.3
"$directory/venv/bin/python" - 2>/dev/null <<'END'
import json
import pathlib
import tempfile

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer

for adds in (True, False):
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A" if adds else "$A", special_tokens=[("<s>", 0)]
    )
    with tempfile.TemporaryDirectory() as name:
        path = pathlib.Path(name)
        tokenizer.save(str(path / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "add_bos_token": not adds}
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
        (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
        begins = AutoTokenizer.from_pretrained(path)("a").input_ids[0] == 0
    print(f"post-processor adds {'<s>' if adds else 'nothing'}, add_bos_token {not adds}: begins with <s> {begins}")
    assert begins == adds
END
