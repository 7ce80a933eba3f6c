#!/usr/bin/env bash
# transformers 4.57.6: a Llama that transformers 5.24.0 saved is read with RoPE's default base and no scaling.
#
# Version 5 writes both as `rope_parameters` alone. Version 4 keeps that as an attribute that nothing reads, and takes
# rope_theta 10,000 and no rope_scaling: the model loads and computes something else. One would expect version 5 to
# write the older names as well, or version 4 to warn of a file from a later version.
#
# Seen:
#   5.24.0 saves ['rope_parameters']; frequencies [0.576, 0.0047, 0.000177, 6.65e-06]
#   4.57.6 reads rope_theta 10000.0, rope_scaling None; frequencies [1.0, 0.1, 0.01, 0.001]
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
for version in 5.24.0 4.57.6; do
    python3 -m venv "$directory/$version"
    "$directory/$version/bin/pip" install --quiet --disable-pip-version-check transformers==$version torch==2.13.0
done
TQDM_DISABLE=1 "$directory/5.24.0/bin/python" - "$directory/model" <<'END'
import json
import pathlib
import sys

from transformers import LlamaConfig, LlamaForCausalLM

rope = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
rope["original_max_position_embeddings"] = 16
sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 5}
model = LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=rope))
model.save_pretrained(sys.argv[1])
settings = json.loads((pathlib.Path(sys.argv[1]) / "config.json").read_text())
names = [name for name in settings if "rope" in name]
frequencies = [float(f"{x:.3g}") for x in model.model.rotary_emb.inv_freq]
print(f"5.24.0 saves {names}; frequencies {frequencies}")
assert names == ["rope_parameters"] and settings[names[0]] == rope
END
"$directory/4.57.6/bin/python" - "$directory/model" <<'END'
import logging
import sys
import warnings

from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
transformers_logging.get_logger("transformers").addHandler(handler)
warnings.simplefilter("error")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
theta, scaling = model.config.rope_theta, model.config.rope_scaling
frequencies = [float(f"{x:.3g}") for x in model.model.rotary_emb.inv_freq]
print(f"4.57.6 reads rope_theta {theta}, rope_scaling {scaling}; frequencies {frequencies}")
assert theta == 10_000 and scaling is None and frequencies == [1.0, 0.1, 0.01, 0.001]
assert not said, said
END
