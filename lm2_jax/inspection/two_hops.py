"""Two-hop questions answered by a trained model: by what became of the thing, and by how long ago it was told.

Contexts are held-out qa2 stories of the generator with one question at the end, "Where is the milk?". It takes two
statements to answer: who took the milk last or put it down, and the move that brought this person, and the milk, to
where it is. Any memory kind can be asked. Axes: B contexts, S segments, T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm2_jax.config import Config
from lm2_jax.data.babi.files import Story
from lm2_jax.data.babi.world import World
from lm2_jax.inspection.survival import Contexts, asked_stories
from lm2_jax.model.decoder import Decoder
from lm2_jax.tokenizer import Tokenizer

FATES = ("taken, the holder stays", "taken and carried on", "put down, the person stays", "put down, the person leaves")


@dataclasses.dataclass(frozen=True)
class TwoHops:
    """Facts behind a qa2 question.

    Attributes:
      fate: one of FATES: the last that happened to the thing, and whether the person moved afterwards.
      handled: number of the statement that names the thing last.
      moved: number of the statement that brought it to where it is.
      person_now: where that person is: a wrong answer if the thing was left behind.
    """

    fate: str
    handled: int
    moved: int
    person_now: str


def two_hops(story: Story) -> TwoHops | None:
    """Facts of a qa2 story with one question; None where no move of the person tells where the thing is."""
    texts = [line.text for line in story[:-1]]
    thing = story[-1].text.split()[-1].removesuffix("?")
    world = World()
    for text in texts:
        world.tell(text)
    handled = max(i for i, text in enumerate(texts) if f" the {thing}" in text)
    person = texts[handled].split()[0]
    taken = world.holder[thing] == person
    moves = [i for i, text in enumerate(texts) if text.startswith(f"{person} ") and " to the " in text]
    telling = [i for i in moves if taken or i < handled]
    if not telling:
        return None
    fate = FATES[2 * (not taken) + (moves[-1] > handled)]
    return TwoHops(fate, handled, telling[-1], world.place[person])


@dataclasses.dataclass(frozen=True)
class Questions(Contexts):
    """Contexts of qa2; the age is that of the later of the two statements.

    Attributes:
      lure_B: id of the place where the person is.
      fate_B: `TwoHops.fate`.
      apart_B: segments between the two statements.
    """

    lure_B: np.ndarray
    fate_B: np.ndarray
    apart_B: np.ndarray


def make_questions(config: Config, tokenizer: Tokenizer, segments: int, count: int) -> Questions:
    """Held-out qa2 stories in contexts of `segments` segments. Raises UserError as `asked_stories` does."""
    rows = []
    stories = asked_stories(config, tokenizer, "qa2", segments, lambda story: two_hops(story) is not None)
    for story, places, asked in itertools.islice(stories, count):
        hops = two_hops(story)
        earlier, later = sorted(places[i].start // config.trained_segment_length for i in (hops.handled, hops.moved))
        (lure,) = tokenizer.encode(f" {hops.person_now}")
        rows.append((*asked, segments - 1 - later, lure, hops.fate, later - earlier))
    return Questions(*map(np.array, zip(*rows, strict=True)))


def predict_answers(model: Decoder, params: Any, questions: Questions) -> np.ndarray:
    """The predicted id of each answer, [B]."""

    @jax.jit
    def read(tokens_BT: jax.Array, memory: Any) -> tuple[jax.Array, Any]:
        logits_BTV, memory = model.apply({"params": params}, tokens_BT, memory)
        return jnp.argmax(logits_BTV, axis=-1), memory

    B, S, _ = questions.tokens_BST.shape
    memory = model.init_memory(B, params)
    for s in range(S):
        guess_BT, memory = read(questions.tokens_BST[:, s], memory)
    return np.asarray(guess_BT)[np.arange(B), questions.asked_B]


def table(questions: Questions, guess_B: np.ndarray) -> str:
    """Correct answers by fate, by the age of the later statement, and by the distance between the two."""
    groups = {"all": np.full(len(guess_B), True)}
    groups |= {fate: questions.fate_B == fate for fate in FATES}
    for title, segments_B in (
        ("segments since the later statement", questions.age_B),
        ("segments between the two", questions.apart_B),
    ):
        groups |= {f"{title}: {segments}": segments_B == segments for segments in range(3)}
        groups[f"{title}: 3 or more"] = segments_B >= 3
    right_B = guess_B == questions.target_B
    lured_B = (guess_B == questions.lure_B) & ~right_B
    lines = ["| qa2 | asked | right | the person's present place instead |", "| --- | --- | --- | --- |"]
    for name, among_B in groups.items():
        if among_B.any():
            right, lured = (x_B[among_B].mean() for x_B in (right_B, lured_B))
            lines.append(f"| {name} | {among_B.sum()} | {right:.1%} | {lured:.1%} |")
    return "\n".join(lines)
