"""Programs of Hugging Face transformers that `bench --against transformers` runs in turns with ours, on CPUs.

Both are a plain Llama of the config's sizes (without memory, convolution, window and LoRA), trained by AdamW, in
float32, with as many threads as there are cores. Decoding continues full contexts greedily, token by token.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm2_jax.common.errors import UserError
from lm2_jax.compiled.comparisons import Comparison, Program, train_program
from lm2_jax.config import Config, replace
from lm2_jax.decoding import placement, sampling
from lm2_jax.model import build_model

CONTEXTS = (512, 2048, 8192)
BATCHES = (1, 8)
_STEPS = 16  # tokens decoded in a run
_MOST_WEIGHTS = 2**28  # of eager attention in a layer, which holds all of them


def peer_comparisons(config: Config) -> Iterator[Comparison]:
    """Training, prefill and decoding of the config's Llama, ours first.

    Raises UserError if a package is missing, or JAX would not run on CPUs.
    """
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"--against transformers: {package} is missing; pip install torch transformers")
    if jax.default_backend() != "cpu":
        raise UserError(f"--against transformers: found JAX on {jax.default_backend()}; set JAX_PLATFORMS=cpu")
    config = plain_llama(config)
    training = _with_context(config, 8, 512)
    has_compiler = shutil.which(os.environ.get("CXX", "g++")) is not None  # for torch.compile
    names = ("sdpa", "eager", "compiled") if has_compiler else ("sdpa", "eager")
    theirs = {name: functools.partial(_their_training, name) for name in names}
    yield _against("Training, 8 x 512", train_program, theirs, training)
    for context in CONTEXTS:
        for batch in BATCHES:
            sized = _with_context(config, batch, context)
            names = ("sdpa", "eager") if batch * config.model.num_heads * context**2 <= _MOST_WEIGHTS else ("sdpa",)
            for title, ours, their in (
                ("Prefill", our_prefill, _their_prefill),
                ("Decoding", our_decoding, _their_decoding),
            ):
                theirs = {name: functools.partial(their, name) for name in names}
                yield _against(f"{title}, {batch} x {context}", ours, theirs, sized)


def plain_llama(config: Config) -> Config:
    """The config's Llama, in float32, with none of what transformers' has not."""
    return replace(
        config,
        model={"conv_width": 0, "window": None, "sinks": 0, "max_distance": None, "lora": None},
        memory={"kind": "none", "dropout": 0.0, "first_layer": 0},
        optim={"kind": "adamw", "train": ["all"]},
        train={"dtype": "float32", "frozen_dtype": "float32", "remat": "none"},
    )


def _against(
    title: str,
    ours: Callable[[Config], Program],
    theirs: dict[str, Callable[[Config], Program]],
    config: Config,
) -> Comparison:
    makers = {"lm2_jax": ours, **{f"transformers, {name}": make for name, make in theirs.items()}}
    return Comparison(title, ours, dict.fromkeys(makers, config), makers)


def _with_context(config: Config, batch: int, context: int) -> Config:
    """One segment a window, of `context` tokens."""
    data = {"batch_size": batch, "segments_per_window": 1, "segment_length": context}
    return replace(config, data=data, train={"curriculum": ()}, optim={"accumulation_steps": 1})


def _random_tokens(config: Config) -> np.ndarray:
    shape = (config.data.batch_size, config.data.segment_length)
    return np.random.default_rng(0).integers(0, config.model.vocab_size, shape)


# --- Ours ----------------------------------------------------------------------------------------------------------


def our_prefill(config: Config) -> Program:
    """Reads a context in each row."""
    model, params, state, tokens_BT = _our_rows(config)

    def run(times: int) -> None:
        for _ in range(times):
            logits_BV, _ = sampling.read(model, params, tokens_BT, state)
            jax.block_until_ready(logits_BV)

    return Program(run, tokens_BT.size, config)


def our_decoding(config: Config) -> Program:
    """Continues a context in each row; every run continues the same one."""
    model, params, state, tokens_BT = _our_rows(config)
    logits_BV, state = sampling.read(model, params, tokens_BT, state)
    held, token_B, count_B = [state], np.argmax(logits_BV, axis=-1), np.asarray(state.count_B)

    def run(times: int) -> None:
        for _ in range(times):
            state, next_B = held[0].replace(count_B=jnp.asarray(count_B)), token_B
            for _ in range(_STEPS):
                logits_BV, state = sampling.advance(model, params, next_B[:, None], np.ones_like(count_B), state)
                next_B = np.asarray(jnp.argmax(logits_BV, axis=-1))
            held[0] = state

    return Program(run, _STEPS * len(token_B), config)


def _our_rows(config: Config) -> tuple[Any, Any, Any, np.ndarray]:
    model, tokens_BT = build_model(config), _random_tokens(config)
    params = placement.prepare(model, jax.jit(model.init_params)(jax.random.key(0)))
    rows, T = tokens_BT.shape
    return model, params, sampling.start(model, params, rows, T + _STEPS), tokens_BT


# --- Theirs --------------------------------------------------------------------------------------------------------


def _their_prefill(attention: str, config: Config) -> Program:
    torch, model, tokens_BT = _their_model(attention, config)

    @torch.no_grad()
    def run(times: int) -> None:
        for _ in range(times):
            model(tokens_BT, use_cache=True, logits_to_keep=1)

    return Program(run, tokens_BT.numel(), config)


def _their_decoding(attention: str, config: Config) -> Program:
    torch, model, tokens_BT = _their_model(attention, config)
    with torch.no_grad():
        read = model(tokens_BT, use_cache=True, logits_to_keep=1)
    cache, token_B1 = read.past_key_values, read.logits[:, -1:].argmax(-1)

    @torch.no_grad()
    def run(times: int) -> None:
        for _ in range(times):
            next_B1 = token_B1
            for _ in range(_STEPS):
                next_B1 = model(next_B1, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            cache.crop(-_STEPS)

    return Program(run, _STEPS * len(tokens_BT), config)


def _their_training(attention: str, config: Config) -> Program:
    torch, model, tokens_BT = _their_model("sdpa" if attention == "compiled" else attention, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    forward = torch.compile(model) if attention == "compiled" else model

    def run(times: int) -> None:
        for _ in range(times):
            optimizer.zero_grad()
            forward(tokens_BT, labels=tokens_BT).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    return Program(run, tokens_BT.numel(), config)


def _their_model(attention: str, config: Config) -> tuple[Any, Any, Any]:
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)
    c = config.model
    llama = transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.d_model,
        intermediate_size=c.d_ff,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.attention_head_dim,
        max_position_embeddings=2 * config.data.segment_length,
        tie_word_embeddings=c.tie_embeddings,
        attn_implementation=attention,
    )
    return torch, transformers.LlamaForCausalLM(llama), torch.tensor(_random_tokens(config))
