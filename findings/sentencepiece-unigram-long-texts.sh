#!/usr/bin/env bash
# sentencepiece 0.2.3: a Unigram model cuts a word in a long text otherwise than in a short one.
#
# The search for the best segmentation adds the scores of a whole text in float32. After some ten thousand characters
# the rounding of the sum exceeds the difference between two segmentations of one word, and the worse one may win. One
# would expect a word between two spaces, which no piece reaches across, to have the same pieces wherever it stands.
# Other implementations of Unigram models, such as that of tokenizers, differ from sentencepiece in long texts.
#
# Seen (lines joined by spaces, against each line by itself):
#   lines 10 characters 721 same pieces True
#   lines 1000 characters 71241 same pieces False
#   in the long text "a nt e ee in", alone "a nt ee e in"
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check sentencepiece==0.2.3
"$directory/venv/bin/python" - <<'END'
import io
import random

import sentencepiece

rng = random.Random(0)
words = ["".join(rng.choices("etaoin", k=rng.randint(1, 9))) for _ in range(3000)]
lines = [" ".join(rng.choices(words, k=12)) for _ in range(1000)]
model = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines), model_writer=model, model_type="unigram", vocab_size=400, num_threads=1,
    minloglevel=2,
)
sp = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
for count in (10, 1000):
    text = " ".join(lines[:count])
    together = sp.encode(text, out_type=str)
    apart = [piece for line in lines[:count] for piece in sp.encode(line, out_type=str)]
    print("lines", count, "characters", len(text), "same pieces", together == apart)
    assert (together == apart) == (count == 10)
    assert "".join(together) == "".join(apart)  # the same words, cut otherwise
pairs = zip(" ".join(together).split(" \u2581"), " ".join(apart).split(" \u2581"))
print('in the long text "{}", alone "{}"'.format(*next(pair for pair in pairs if pair[0] != pair[1])))
END
