#!/usr/bin/env bash
# tokenizers 0.23.3: in a vocabulary whose ids have gaps, `add_tokens` gives a new token an id that another token
# already has.
#
# New ids are counted from the number of entries, not from the highest id. The first ones fill the gap; a later
# one collides, and from then on its id decodes to the new token only. `get_vocab_size()` is the number of entries
# too, so an embedding of that many rows is too short. One would expect ids above the highest one, or an error.
# Vocabularies with gaps are valid and common (reserved ids that no token has).
#
# Seen:
#   size 2 id of b 3
#   [('a', 0), ('b', 3), ('c', 2), ('d', 3)]
#   encode b [3] encode d [3] decode 3 d
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3
"$directory/venv/bin/python" - <<'END'
from tokenizers import Tokenizer, models

tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 3}, unk_token="a"))
print("size", tokenizer.get_vocab_size(), "id of b", tokenizer.token_to_id("b"))
assert tokenizer.get_vocab_size() <= tokenizer.token_to_id("b")
tokenizer.add_tokens(["c", "d"])
print(sorted(tokenizer.get_vocab().items()))
print("encode b", tokenizer.encode("b").ids, "encode d", tokenizer.encode("d").ids, "decode 3", tokenizer.decode([3]))
assert tokenizer.encode("b").ids == tokenizer.encode("d").ids == [3]
assert tokenizer.decode(tokenizer.encode("b").ids) == "d"
END
