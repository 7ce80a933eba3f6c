"""Generated tokens to text, as they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lm2_jax.tokenizer import Tokenizer


class TextStream:
    """Tokens to text as they come, up to the first stop string.

    Text is held back where the next token may still change it: an incomplete character, the beginning of a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], write: Callable[[str], object]) -> None:
        self._tokenizer, self._stops, self._write = tokenizer, stops, write
        self._ids: list[int] = []  # the tokens of the last text, for the space between them and the next, and new ones
        self._old = 0  # how many of them are not new
        self._held = ""

    def push(self, token: int) -> bool:
        """Whether a stop string is complete with this token."""
        self._ids.append(token)
        text = self._new_text()
        if text.endswith("\ufffd"):
            return False
        if text:
            self._ids = self._ids[self._old :]
        self._old = len(self._ids)
        return self._add(text)

    def close(self) -> None:
        """Writes what was held back."""
        self._add(self._new_text())
        self._write(self._held)

    def _new_text(self) -> str:
        return self._tokenizer.decode(self._ids)[len(self._tokenizer.decode(self._ids[: self._old])) :]

    def _add(self, text: str) -> bool:
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        begun = [n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])]
        ready = min(places) if places else len(self._held) - max(begun, default=0)
        self._write(self._held[:ready])
        self._held = "" if places else self._held[ready:]
        return bool(places)
