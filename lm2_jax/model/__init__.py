"""The model: Llama blocks and the memory kinds. `build_model` makes one from a config."""

from __future__ import annotations

from lm2_jax.common.errors import UserError
from lm2_jax.config import Config
from lm2_jax.model.decoder import Decoder
from lm2_jax.model.memory.armt import ARMT
from lm2_jax.model.memory.base import MemoryKind
from lm2_jax.model.memory.delta import Delta
from lm2_jax.model.memory.lm2 import LM2
from lm2_jax.model.memory.ntm import NTM
from lm2_jax.model.memory.official import Official
from lm2_jax.model.memory.rmt import RMT

KINDS: dict[str, type[MemoryKind]] = {
    "lm2": LM2,
    "rmt": RMT,
    "armt": ARMT,
    "delta": Delta,
    "ntm": NTM,
    "none": MemoryKind,
    "official": Official,
}


def build_model(config: Config) -> Decoder:
    """A linen module: `init(key, tokens_BT, memory)`, `apply({"params": ...}, tokens_BT, memory)`, `init_memory(B)`.

    Raises UserError if model.vocab_size is null: it stands for the tokenizer's size, which `train` fills in.
    """
    if config.model.vocab_size is None:
        raise UserError("model.vocab_size: null; give the number of token ids, as no tokenizer fills it in here")
    return Decoder(config.spec, KINDS[config.memory.kind](config.spec))
