"""The control tokens around a text: which begin it, end it and fill up a batch, and who says so.

The first of these that names one decides: the settings (`tokenizer.bos_token`, ...); the model's own files
(`Origin`); the tokenizer's file itself, whose post-processor puts tokens around a text; the usual names.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from lm2_jax.common.errors import UserError
from lm2_jax.config import TokenizerConfig
from lm2_jax.tokenizer.origin import Origin

_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>")
_EOS_NAMES = ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>")
_UNK_NAMES = ("<unk>", "[UNK]", "<|endoftext|>")


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Ids of control tokens.

    Attributes:
      prefix_ids: those before every text, in training, generation, evaluation and export alike.
      bos_id: the begin token by name; texts need not begin with it.
      eos_id: the one that ends a document in training.
      stop_ids: any of them ends a generated text; `eos_id` is among them.
      pad_id: fills up batches in other libraries, never an end token, which would be masked there; here none is needed.
    """

    prefix_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    eos_id: int | None = None
    stop_ids: tuple[int, ...] = ()
    pad_id: int | None = None


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's tokens, and what its own file says about those around a text.

    Attributes:
      ids: of all tokens, by their names.
      control: those of the control tokens.
      prefix_ids: what the file puts before every text; None: it does not say.
      bos_id, eos_id: begin and end token, where the file marks them.
      is_sentencepiece: `add_bos_token` in tokenizer_config.json holds for it; beside a tokenizer.json it has no effect.
    """

    ids: Mapping[str, int]
    control: Mapping[str, int]
    prefix_ids: tuple[int, ...] | None = None
    bos_id: int | None = None
    eos_id: int | None = None
    is_sentencepiece: bool = False


def find_special_tokens(
    vocabulary: Vocabulary, settings: TokenizerConfig | None = None, origin: Origin | None = None
) -> SpecialTokens:
    """The special tokens of a tokenizer. Raises UserError for a token in the settings that it does not have."""
    settings = TokenizerConfig() if settings is None else settings
    sources = _Sources(vocabulary, settings, origin)
    bos_id, prefix_ids = sources.bos_id(), vocabulary.prefix_ids
    begin = () if bos_id is None else (bos_id,)
    if settings.bos_token is not None:
        prefix_ids = begin
    elif prefix_ids is None:  # the documents of a bare file begin with the begin token, if it has one
        begins = origin is None or (vocabulary.is_sentencepiece and origin.adds_bos)
        prefix_ids = begin if begins else ()
    eos_id, stop_ids = sources.ends()
    return SpecialTokens(prefix_ids, bos_id, eos_id, stop_ids, sources.pad_id(bos_id, stop_ids))


def surrounding_ids(post_processor: Any) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Ids that a post-processor of `tokenizers` puts before and after a text; None if there is no post-processor.

    Raises ValueError for a kind of post-processor that is not known.
    """
    return None if post_processor is None else _surrounding(json.loads(post_processor.__getstate__()))


def _surrounding(state: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    kind = state["type"]
    if kind == "ByteLevel":
        return (), ()
    if kind in ("BertProcessing", "RobertaProcessing"):
        return (state["cls"][1],), (state["sep"][1],)
    if kind == "Sequence":
        inner = [_surrounding(part) for part in state["processors"]]
        before = [id for prefix, _ in reversed(inner) for id in prefix]
        return tuple(before), tuple(id for _, suffix in inner for id in suffix)
    if kind == "TemplateProcessing":
        pieces = state["single"]
        text = next(index for index, piece in enumerate(pieces) if "Sequence" in piece)
        names = [[piece["SpecialToken"]["id"] for piece in part] for part in (pieces[:text], pieces[text + 1 :])]
        before, after = ([id for name in part for id in state["special_tokens"][name]["ids"]] for part in names)
        return tuple(before), tuple(after)
    raise ValueError(
        f"its post-processor is {kind}; known are ByteLevel, TemplateProcessing, BertProcessing, "
        "RobertaProcessing and Sequence"
    )


@dataclasses.dataclass(frozen=True)
class _Sources:
    """Everything that can name a special token, in the order of the module's docstring."""

    vocabulary: Vocabulary
    settings: TokenizerConfig
    origin: Origin | None

    def bos_id(self) -> int | None:
        """The begin token."""
        if self.settings.bos_token is not None:
            return self._set("bos_token", self.settings.bos_token)
        own, prefix_ids = self.vocabulary.bos_id, self.vocabulary.prefix_ids or ()
        return _first([*self._named("bos_token"), *_given(own), *prefix_ids, *self._usual(_BOS_NAMES)])

    def ends(self) -> tuple[int | None, tuple[int, ...]]:
        """The token that ends a document, and all that end a generated text."""
        if self.settings.eos_token is not None:
            ids = [id for name in self.settings.eos_token for id in _given(self._set("eos_token", name))]
            return _first(ids), tuple(dict.fromkeys(ids))
        listed = self.origin.ids("eos_token_id") if self.origin else []
        own = _given(self.vocabulary.eos_id)
        eos_id = _first([*self._named("eos_token"), *own, *self._usual(_EOS_NAMES)])
        return eos_id, tuple(dict.fromkeys([*self._known(listed), *_given(eos_id)]))

    def pad_id(self, bos_id: int | None, stop_ids: tuple[int, ...]) -> int | None:
        """The padding token, or the best that is no end token: one of that name, unknown, reserved, begin."""
        if self.settings.pad_token is not None:
            return self._set("pad_token", self.settings.pad_token)
        control = self.vocabulary.control
        padding = [id for name, id in control.items() if "pad" in name.lower()]
        reserved = [id for id in sorted(control.values()) if id != bos_id]
        choices = [*self._named("pad_token"), *padding, *self._usual(_UNK_NAMES), *reserved, *_given(bos_id)]
        return _first(id for id in choices if id not in stop_ids)

    def _set(self, key: str, name: str) -> int | None:
        """The id of a token in the settings; None for "", which means that there is none."""
        if name and name not in self.vocabulary.ids:
            some = ", ".join(list(self.vocabulary.control)[:12]) or "none"
            raise UserError(f"tokenizer.{key}: {name!r} is no token of this tokenizer; its control tokens: {some}")
        return self.vocabulary.ids[name] if name else None

    def _named(self, key: str) -> list[int]:
        """Ids that the model's own files name: those of the tokenizer first, then those of the model."""
        if self.origin is None:
            return []
        named = self.vocabulary.ids.get(self.origin.token(key) or "")
        return [*_given(named), *self._known(self.origin.ids(f"{key}_id"))]

    def _known(self, ids: Iterable[int]) -> list[int]:
        known = set(self.vocabulary.ids.values())
        return [id for id in ids if id in known]

    def _usual(self, names: Iterable[str]) -> list[int]:
        return [self.vocabulary.control[name] for name in names if name in self.vocabulary.control]


def _given(id: int | None) -> list[int]:
    return [] if id is None else [id]


def _first(ids: Iterable[int]) -> int | None:
    return next(iter(ids), None)
