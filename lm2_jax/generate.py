"""Continues a text: `python -m lm2_jax.generate --checkpoint runs/books --prompt "Call me Ishmael."`.

A prompt may be a whole book: it streams through memory. Saved memory answers many questions after one reading. Prompts
in a file, one a line (--prompts), share the rows of a batch, and each answer is printed as soon as it is done.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lm2_jax.common.command_line import generate_arguments
from lm2_jax.common.errors import UserError, run_command
from lm2_jax.common.jax_stack import check_jax_stack
from lm2_jax.common.storage import has_directory, to_path

if TYPE_CHECKING:
    from lm2_jax.model.decoder import Decoder
    from lm2_jax.tokenizer import Origin, Tokenizer


def main() -> None:
    """The command."""
    arguments = generate_arguments()
    text = _prompt(arguments)
    if arguments.save_memory and not has_directory(to_path(arguments.save_memory, "--save-memory")):
        raise UserError(f"--save-memory: the directory of {arguments.save_memory} does not exist")
    check_jax_stack()

    # imported late so that --help stays fast
    from lm2_jax.decoding.memory_file import load_state, save_state
    from lm2_jax.decoding.placement import prepare
    from lm2_jax.decoding.sampling import decode, start
    from lm2_jax.decoding.text_stream import TextStream
    from lm2_jax.loading import load_run
    from lm2_jax.tokenizer import load_text_tokenizer, origin_of_model

    config, model, params = load_run(arguments.checkpoint)
    tokenizer = load_text_tokenizer(config, arguments.checkpoint)
    origin = origin_of_model(config.tokenizer, arguments.checkpoint)
    settings = {"max_new_tokens": arguments.max_new_tokens, "stop_ids": tokenizer.special.stop_ids}
    settings |= _sampling(arguments, origin) | {"seed": arguments.seed}
    if arguments.prompts is not None:
        _continue_all(arguments, text, model, prepare(model, params), tokenizer, origin, settings)
        return
    prepared = prepare(model, params)  # beside the parameters as they are, which a memory file names
    if arguments.load_memory:
        state, prefix_ids = load_state(arguments.load_memory, model, params), ()
        if len(state.count_B) != 1:
            raise UserError(f"--load-memory: {arguments.load_memory} holds {len(state.count_B)} rows; expected one")
    else:
        state, prefix_ids = start(model, prepared, 1), tokenizer.special.prefix_ids
    prompt = _ids(text, arguments.chat, tokenizer, origin, prefix_ids)
    stream = TextStream(tokenizer, arguments.stop, functools.partial(print, end="", flush=True))
    _, state = decode(model, prepared, [prompt], state, on_token=lambda _, token: stream.push(token), **settings)
    stream.close()
    if arguments.max_new_tokens:
        print()
    if arguments.save_memory:
        save_state(arguments.save_memory, model, params, state)
        print(f"{arguments.save_memory}: memory after {int(state.read_B[0]):,} tokens", file=sys.stderr)


def _continue_all(
    arguments: argparse.Namespace,
    text: str,
    model: Decoder,
    params: Any,
    tokenizer: Tokenizer,
    origin: Origin | None,
    settings: dict[str, Any],
) -> None:
    """Continues every line of the text; prints {"line": ..., "text": ...} as lines are done."""
    from lm2_jax.decoding.batching import decode_all

    lines = text.removesuffix("\n").split("\n")
    empty = [number for number, line in enumerate(lines, 1) if not line.strip()]
    if empty:
        raise UserError(f"--prompts: {arguments.prompts}: line {empty[0]} is empty; give some text to continue")
    prompts = [_ids(line, arguments.chat, tokenizer, origin, tokenizer.special.prefix_ids) for line in lines]
    rows = min(arguments.rows or 8, len(prompts))
    for index, tokens in decode_all(model, params, prompts, rows, **settings):
        print(json.dumps({"line": index + 1, "text": tokenizer.decode(tokens)}, ensure_ascii=False), flush=True)


def _ids(
    text: str, is_chat: bool, tokenizer: Tokenizer, origin: Origin | None, prefix_ids: Sequence[int]
) -> Sequence[int]:
    """The tokens of a prompt, as an array."""
    import numpy as np

    from lm2_jax.tokenizer import encode_long
    from lm2_jax.tokenizer.chat import chat_ids, render_chat

    if is_chat:
        return chat_ids(tokenizer, render_chat(origin, [{"role": "user", "content": text}]))
    ids = np.concatenate([np.array(prefix_ids, np.int32), encode_long(tokenizer, text)])
    if len(ids) == len(prefix_ids):
        raise UserError("the prompt holds no token; give some text to continue")
    return ids


def _sampling(arguments: argparse.Namespace, origin: Origin | None) -> dict[str, Any]:
    """Temperature, top-k and top-p: those given; where none is, those of the model's generation_config.json."""
    given = {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p")}
    own = origin.sampling if origin and set(given.values()) == {None} else {}
    if own:
        text = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in own.items() if value is not None)
        print(
            f"sampling as the model's generation_config.json has it: {text}; --temperature 0 does not", file=sys.stderr
        )
    return own or given | {"temperature": arguments.temperature or 0.0}


def _prompt(arguments: argparse.Namespace) -> str:
    text, origin = arguments.prompt, "--prompt"
    if text is None:
        option, path = (
            ("--prompt-file", arguments.prompt_file) if arguments.prompts is None else ("--prompts", arguments.prompts)
        )
        origin = f"{option}: {path}"
        try:
            text = to_path(path, option).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"{origin} cannot be read ({error.strerror})") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{origin} is not UTF-8 text (byte {error.start})") from None
    if not text:
        raise UserError(f"{origin} is empty; give some text to continue")
    return text


command = functools.partial(run_command, main)

if __name__ == "__main__":
    command()
