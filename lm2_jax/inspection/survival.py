"""How long a memory keeps what was read: answers by the age of a fact, and a linear probe for any text.

Axes: B contexts, S segments, T tokens, L banks, F numbers of a memory's trace, E numbers of a segment's signature.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lm2_jax.common.errors import UserError
from lm2_jax.common.statistics import wilson_interval
from lm2_jax.config import Config
from lm2_jax.data.babi.files import Story, is_held_out
from lm2_jax.data.babi.scatter import Scatterer
from lm2_jax.data.babi.world import PEOPLE, generate_story
from lm2_jax.inspection.reading import trace_segment
from lm2_jax.model.decoder import Decoder
from lm2_jax.tokenizer import Tokenizer

CANDIDATES = 8  # segments among which a probe has to recognise the right one
FEWEST_SEGMENTS = 64  # of a text, for a probe
_MOST_MISSES = 5000  # unsuitable stories in a row before giving up


@dataclasses.dataclass(frozen=True)
class Survival:
    """Accuracy by age, the number of segments read since.

    Attributes:
      title: what is counted as right.
      ages: middles of the ranges of age.
      accuracy: at each.
      low, high: 95% interval.
      chance: accuracy of guessing.
      control: accuracy, at each age, of the same probe on the newest segment's words instead of the memory; or None.
    """

    title: str
    ages: np.ndarray
    accuracy: np.ndarray
    low: np.ndarray
    high: np.ndarray
    chance: float
    control: np.ndarray | None = None


# --- Stories: is the question answered? ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Contexts:
    """Held-out stories, each with one question at its end.

    Attributes:
      tokens_BST, target_B: what is read; the answer's id.
      asked_B: index, in the last segment, of the token whose prediction is the answer.
      age_B: segments between the question and the latest statement that its answer takes.
    """

    tokens_BST: np.ndarray
    target_B: np.ndarray
    asked_B: np.ndarray
    age_B: np.ndarray


@dataclasses.dataclass(frozen=True)
class PersonContexts(Contexts):
    """Contexts of qa1 ("where is someone?").

    Attributes:
      person_BST: number of the person in `PEOPLE`, from 1, that a statement's tokens are about; 0: no statement.
    """

    person_BST: np.ndarray


def make_contexts(config: Config, tokenizer: Tokenizer, segments: int, count: int) -> PersonContexts:
    """`count` contexts of `segments` segments. Raises UserError as `asked_stories` does."""
    rows = []
    for story, places, asked in itertools.islice(asked_stories(config, tokenizer, "qa1", segments), count):
        asked_about, last = story[-1].text.split()[-1].removesuffix("?"), 0
        person_ST = np.zeros((segments, config.trained_segment_length), np.int8)
        for line, place in zip(story[:-1], places, strict=True):
            name = line.text.split()[0]
            person_ST.flat[place] = 1 + PEOPLE.index(name)
            if name == asked_about:
                last = place.start
        rows.append((*asked, segments - 1 - last // config.trained_segment_length, person_ST))
    return PersonContexts(*map(np.array, zip(*rows, strict=True)))


def asked_stories(
    config: Config, tokenizer: Tokenizer, task: str, segments: int, wanted: Callable[[Story], bool] = lambda story: True
) -> Iterator[tuple[Story, list[slice], tuple[Any, ...]]]:
    """Held-out stories with one question at the end, in contexts of `segments` segments; the same ones every time.

    With each: where every statement's tokens are, and the first three fields of its `Contexts`. Raises
    UserError if even the shortest story might not fit, or none is found.
    """
    T = config.trained_segment_length
    low, high = config.data.stories.facts
    needed = 8 * (low + 1)  # of tokens, at most: a line has up to 8
    if segments * T < needed:
        raise UserError(
            f"--segments {segments}: {low} facts and a question need {needed} tokens, {-(-needed // T)} segments"
        )
    rng = np.random.default_rng((0, int(task.removeprefix("qa"))))
    scatterer = Scatterer(tokenizer, segments * T, segment_length=T)
    misses = 0
    while misses < _MOST_MISSES:
        misses += 1
        story = generate_story(task, rng, int(rng.integers(low, high + 1)), 0, 1)
        if wanted(story) and is_held_out(story) and scatterer.length(story) <= scatterer.room:
            misses, document = 0, scatterer.scatter(story, rng)
            target = int(np.flatnonzero(document.answers)[0])
            asked = document.tokens[:-1].reshape(segments, T), document.tokens[target], (target - 1) % T
            yield story, _statement_places(document.tokens, story, tokenizer), asked
    raise UserError(f"--segments {segments}: no story of {task} was found that fits; give more")


def _statement_places(tokens: np.ndarray, story: Story, tokenizer: Tokenizer) -> list[slice]:
    """A text's first line stands there without the space in front, which not every tokenizer ignores."""
    places, end, text = [], 0, tokens.tolist()
    for line in story[:-1]:
        forms = [tokenizer.encode(space + line.text) for space in (" ", "")]
        start, ids = next((i, ids) for i in range(end, len(text)) for ids in forms if text[i : i + len(ids)] == ids)
        end = start + len(ids)
        places.append(slice(start, end))
    return places


@dataclasses.dataclass(frozen=True)
class Answers:
    """Record of contexts being read.

    Attributes:
      contexts: that were read.
      right_B: bool, the model gave the answer.
      change_LBS: mean over slots of |slot after the segment - before| / |before|.
      written_LBST: attention of the slots to each token when memory was written, mean over slots; None where slots do
        not attend to tokens.
      taken_LNP: attention of a slot to the statements about a person, mean over the segments that have any; or None.
    """

    contexts: PersonContexts
    right_B: np.ndarray
    change_LBS: np.ndarray
    written_LBST: np.ndarray | None
    taken_LNP: np.ndarray | None


def answer_contexts(model: Decoder, params: Any, contexts: PersonContexts) -> Answers:
    """Reads the contexts and answers their questions. The model must have a memory and not look ahead."""
    B, S, _ = contexts.tokens_BST.shape
    memory, changes, written, taken, told_P = model.init_memory(B, params), [], [], 0, 0
    about_BSTP = contexts.person_BST[..., None] == 1 + np.arange(len(PEOPLE))
    for s in range(S):
        memory, trace = trace_segment(model, params, contexts.tokens_BST[:, s], memory)
        changes.append(np.asarray(trace.change_LBN.mean(-1)))
        if trace.written_LBNT is not None:
            written.append(np.asarray(trace.written_LBNT.mean(2)))
            taken += np.einsum("lbnt,btp->lnp", trace.written_LBNT, about_BSTP[:, s])
            told_P += about_BSTP[:, s].any(1).sum(0)
    asked_V = np.asarray(trace.logits_BTV)[np.arange(B), contexts.asked_B]
    return Answers(
        contexts=contexts,
        right_B=asked_V.argmax(-1) == contexts.target_B,
        change_LBS=np.stack(changes, axis=-1),
        written_LBST=np.stack(written, axis=2) if written else None,
        taken_LNP=taken / np.maximum(told_P, 1) if written else None,
    )


def answers_by_age(answers: Answers) -> Survival:
    """Share of right answers by the age of the fact, in up to 8 ranges of age."""
    contexts, cells = answers.contexts, []
    S = contexts.tokens_BST.shape[1]
    for first, end in itertools.pairwise(np.unique(np.round(np.linspace(0, S, 9)).astype(int)).tolist()):
        right_b = answers.right_B[(contexts.age_B >= first) & (contexts.age_B < end)]
        if len(right_b):
            cells.append(((first + end - 1) / 2, right_b.mean(), *wilson_interval(int(right_b.sum()), len(right_b))))
    ages, accuracy, low, high = np.array(cells).T
    return Survival("questions answered", ages, accuracy, low, high, chance=1 / 6)  # the world has 6 places


# --- Any text: can the segment of a given age be told from the memory? ----------------------------------------------


def probe(traces_SF: np.ndarray, ids_n: np.ndarray, segment_length: int) -> Survival | None:
    """Measures how well a ridge regression recognises, from the memory, the segment of a given age by its words.

    It is trained on the first half of the text and tested on the second: among 8 segments, the right one and 7 random
    ones of that half, which fits the predicted words best? Neighbouring segments share their subject; the control shows
    what the newest segment's own words reveal.

    Args:
      traces_SF: the memory after each segment.

    Returns None for a text under 64 segments.
    """
    S = len(ids_n) // segment_length
    if S < FEWEST_SEGMENTS:
        return None
    signature_SE = _signatures(ids_n[: S * segment_length].reshape(S, segment_length))
    cells = []
    for age in _ages(S // 8):
        told, control = (_probe(x_SF[:S], signature_SE, age) for x_SF in (traces_SF, signature_SE))
        cells.append((age, told.mean(), *wilson_interval(int(told.sum()), len(told)), control.mean()))
    ages, accuracy, low, high, control = np.array(cells).T
    return Survival(
        f"right segment of {CANDIDATES} told by a linear probe", ages, accuracy, low, high, 1 / CANDIDATES, control
    )


def _ages(most: int) -> list[int]:
    """0, 1, 2, 4, ... up to `most`."""
    return [0, *(2**power for power in range(most.bit_length()) if 2**power <= most)]


def _signatures(ids_ST: np.ndarray, size: int = 128) -> np.ndarray:
    """For each segment, the sum of random vectors of its distinct words, rare words weighted more; [S,E]."""
    S = len(ids_ST)
    words, index_ST = np.unique(ids_ST, return_inverse=True)
    held_SW = np.zeros((S, len(words)), bool)
    held_SW[np.arange(S)[:, None], index_ST.reshape(ids_ST.shape)] = True
    weight_W = np.log(S / held_SW.sum(0))
    vectors_WE = np.random.default_rng(0).standard_normal((len(words), size))
    return (held_SW * weight_W) @ vectors_WE / np.sqrt(size)


def _probe(x_SF: np.ndarray, y_SE: np.ndarray, age: int) -> np.ndarray:
    """True for each segment of the second half if the one `age` segments earlier is recognised among `CANDIDATES`."""
    x_SF, y_SE = x_SF[age:], y_SE[: len(y_SE) - age]
    half = len(x_SF) // 2
    x_mean_F, y_mean_E = x_SF[:half].mean(0), y_SE[:half].mean(0)
    x_SF = (x_SF - x_mean_F) / (x_SF[:half].std(0) + 1e-6)
    y_SE = y_SE - y_mean_E
    train_SF, asked_SF = x_SF[:half], x_SF[half:]
    gram_SS = train_SF @ train_SF.T
    ridge = 0.1 * np.trace(gram_SS) / half + 1e-6
    told_SE = asked_SF @ train_SF.T @ np.linalg.solve(gram_SS + ridge * np.eye(half), y_SE[:half])
    true_SE = y_SE[half:]
    norms_S = np.linalg.norm(true_SE, axis=-1) + 1e-9
    scores_SS = told_SE @ true_SE.T / norms_S
    rng = np.random.default_rng(age)
    n = len(true_SE)
    others_SC = (np.arange(n)[:, None] + rng.integers(1, n, size=(n, CANDIDATES - 1))) % n
    return np.diag(scores_SS) > np.take_along_axis(scores_SS, others_SC, axis=1).max(axis=1)
