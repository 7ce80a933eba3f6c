#!/usr/bin/env bash
# transformers 5.24.0, sentencepiece 0.2.3, protobuf 6.33.6: AutoTokenizer asks for tiktoken to read a sentencepiece model.
#
# Its reader of tokenizer.model takes the description of the file format from the sentencepiece package, which was
# generated for protobuf 7 and cannot be imported with protobuf 6. No package declares that. The error is caught, the file
# is taken for one of tiktoken, and the user reads that tiktoken is required. sentencepiece itself reads the same file.
# One would expect an install without conflicts to work, or the message to be about protobuf.
#
# Seen:
#   sentencepiece: ['▁a', '▁a']
#   AutoTokenizer: ValueError: `tiktoken` is required to read a `tiktoken` file. Install it with `pip install tiktoken`.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0 sentencepiece==0.2.3 protobuf==6.33.6
"$directory/venv/bin/pip" check
"$directory/venv/bin/python" - 2>/dev/null <<'END'
import json
import pathlib
import tempfile

import sentencepiece
from transformers import AutoTokenizer

with tempfile.TemporaryDirectory() as name:
    path = pathlib.Path(name)
    (path / "a.txt").write_text("a b a\n" * 100)
    sentencepiece.SentencePieceTrainer.train(
        input=str(path / "a.txt"), model_prefix=str(path / "tokenizer"), vocab_size=8, hard_vocab_limit=False,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
    print("sentencepiece:", model.encode("a a", out_type=str))
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    try:
        AutoTokenizer.from_pretrained(path)
    except ValueError as error:
        print("AutoTokenizer: ValueError:", error)
        assert "tiktoken" in str(error)
    else:
        raise AssertionError("AutoTokenizer reads the model")
END
