"""Chat templates: messages to the text of a prompt, as the model was trained to read it.

A template is a program in Jinja that comes with a model's weights. It runs in Jinja's sandbox, with the names that
Hugging Face's templates may use (docs "Chat templates" of transformers).
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lm2_jax.common.errors import UserError
from lm2_jax.tokenizer.kinds import Tokenizer
from lm2_jax.tokenizer.origin import Origin

Message = Mapping[str, str]  # "role" (system, user or assistant) and "content"


class _Generation(Extension):
    """`{% generation %}` marks what the assistant said, for training; here it is only text."""

    tags = frozenset(("generation",))

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render_chat(origin: Origin | None, messages: Sequence[Message], answer: bool = True) -> str:
    """The text of a chat.

    answer: the assistant's answer comes next; False: the last message is the beginning of it.
    Raises UserError if the model has no chat template, or its template refuses the messages.
    """
    template = origin.chat_template if origin else None
    if template is None:
        raise UserError("the model has no chat template (chat_template.jinja, or one in tokenizer_config.json)")
    names = {key: origin.token(key) or "" for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    settings = {"messages": list(messages), "add_generation_prompt": answer, **names}
    try:
        rendered = _environment().from_string(template).render(settings)
        beginning = messages[-1]["content"].strip()
        return rendered if answer else rendered[: rendered.rindex(beginning) + len(beginning)]
    except Exception as error:  # a template is somebody else's program
        raise UserError(f"{origin.directory}: its chat template refuses these messages ({error})") from None


def chat_ids(tokenizer: Tokenizer, rendered: str) -> np.ndarray:
    """Ids of a rendered chat, int32 [n], in which the names of control tokens are those tokens."""
    return np.array(tokenizer.encode_prompt(rendered), np.int32)


def _environment() -> ImmutableSandboxedEnvironment:
    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment
