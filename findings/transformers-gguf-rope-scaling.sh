#!/usr/bin/env bash
# transformers 5.24.0: a Llama read from a GGUF file loses its RoPE scaling, without a word.
#
# llama.cpp writes the scaling of Llama 3.1 as a tensor, rope_freqs.weight, that divides the frequencies, and linear
# scaling as settings, llama.rope.scaling.*. Both are dropped: the model has the default frequencies and computes
# something else. One would expect the scaling, or to be told that a tensor and settings of the file were not read.
# The loading report names neither; no warning does.
#
# Seen:
#   llama3: file says [1.0, 0.05, 0.00125, 3.13e-05], model has [1.0, 0.1, 0.01, 0.001] (default)
#   linear: file says [0.25, 0.025, 0.0025, 0.00025], model has [1.0, 0.1, 0.01, 0.001] (default)
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check \
    transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0 torch==2.13.0
TQDM_DISABLE=1 "$directory/venv/bin/python" - "$directory" <<'END'
import logging
import sys
import warnings

import numpy as np
from gguf import GGUFWriter, RopeScalingType
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

directory = sys.argv[1]
shapes = {"attn_norm": (8,), "ffn_norm": (8,), "attn_q": (8, 8), "attn_k": (8, 8), "attn_v": (8, 8)}
shapes |= {"attn_output": (8, 8), "ffn_gate": (8, 8), "ffn_up": (8, 8), "ffn_down": (8, 8)}
tensors = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
tensors |= {"token_embd.weight": (5, 8), "output_norm.weight": (8,), "output.weight": (5, 8)}
frequencies, divisors = np.array([1, 0.1, 0.01, 0.001]), np.array([1, 2, 8, 32])
said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
transformers_logging.set_verbosity_warning()
transformers_logging.get_logger("transformers").addHandler(handler)
warnings.simplefilter("error")

for scaling, expected in {"llama3": frequencies / divisors, "linear": frequencies / 4}.items():
    writer = GGUFWriter(f"{directory}/{scaling}.gguf", "llama")
    writer.add_vocab_size(5)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(8)
    for name, shape in tensors.items():
        writer.add_tensor(name, np.ones(shape, np.float32))
    if scaling == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)
    else:
        writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = AutoModelForCausalLM.from_pretrained(directory, gguf_file=f"{scaling}.gguf")
    found, kind = model.model.rotary_emb.inv_freq.numpy(), model.config.rope_parameters["rope_type"]
    said_by_file, in_model = ([float(f"{x:.3g}") for x in numbers] for numbers in (expected, found))
    print(f"{scaling}: file says {said_by_file}, model has {in_model} ({kind})")
    np.testing.assert_allclose(found, frequencies, rtol=1e-5)
assert not [message for message in said if "rope" in message], said
END
