"""Generated tokens turned into text as they arrive."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lm2_jax.tokenizer import Tokenizer


class TextStream:
    """Writes tokens as text as they arrive, up to the first stop string.

    Text that the next token may still change is held back: an incomplete character, the beginning of a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], write: Callable[[str], object]) -> None:
        self._tokenizer, self._stops, self._write = tokenizer, stops, write
        self._ids: list[int] = []  # tokens of the last text written, as context for spaces, and the new ones
        self._old = 0  # number of ids that are context
        self._held = ""

    def push(self, token: int) -> bool:
        """Adds a token; True if it completes a stop string."""
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
        found = [index for stop in self._stops if (index := self._held.find(stop)) >= 0]
        partial = [n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])]
        ready = min(found) if found else len(self._held) - max(partial, default=0)
        self._write(self._held[:ready])
        self._held = "" if found else self._held[ready:]
        return bool(found)
