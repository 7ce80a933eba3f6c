"""The small world of bAbI tasks 1-5: a simulation that answers questions, and a generator of stories that uses it.

Grammar, names, answers and choices follow bAbI v1.2 (Weston et al., arXiv 1502.05698); the frequencies were counted in
its files. One difference: bAbI asks about the last five statements only, this generator about the whole story.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Literal, TypeVar

import numpy as np

from lm2_jax.data.babi.files import Line, Question, Statement, Story

Task = Literal["qa1", "qa2", "qa3", "qa4", "qa5"]

_PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
_OBJECTS = ("apple", "football", "milk")
PEOPLE = ("Daniel", "John", "Mary", "Sandra")
_QA5_PEOPLE = ("Bill", "Fred", "Jeff", "Mary")
_OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}
_VERBS = {
    "move": ("journeyed", "moved", "travelled", "went", "went back"),
    "get": ("got", "grabbed", "picked up", "took"),
    "drop": ("discarded", "dropped", "left", "put down"),
    "give": ("gave", "handed", "passed"),
}
_KINDS = {verb.split()[0]: kind for kind, verbs in _VERBS.items() for verb in verbs}
_FUNCTION_WORDS = "The Where What Who is was did give received of the to there before . ?"

LEXICON: tuple[str, ...] = tuple(
    sorted(
        {*_FUNCTION_WORDS.split(), *_PLACES, *_OBJECTS, *PEOPLE, *_QA5_PEOPLE, *_OPPOSITE}
        | {word for verbs in _VERBS.values() for verb in verbs for word in verb.split()}
    )
)
"""Every word and mark that a story of any task can contain, as written (sentence-initial capitals included)."""

_T = TypeVar("_T")


@dataclasses.dataclass
class World:
    """Everything that is known after some statements.

    Attributes:
      place: where each person is.
      holder: who has each object, None for nobody.
      history: the places each object has been seen in, oldest first; the last is where it is.
      gifts: (giver, object, receiver), oldest first.
      neighbours: the room that lies in a direction from a room, by (direction, room).
    """

    place: dict[str, str] = dataclasses.field(default_factory=dict)
    holder: dict[str, str | None] = dataclasses.field(default_factory=dict)
    history: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    gifts: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    neighbours: dict[tuple[str, str], str] = dataclasses.field(default_factory=dict)

    def tell(self, statement: str) -> None:
        """Adds one statement, such as "Mary got the milk there."; raises ValueError if it is not a bAbI sentence."""
        match statement.removesuffix(".").split():
            case ["The", room, "is", direction, "of", "the", other] if direction in _OPPOSITE:
                self.neighbours[direction, other] = room
                self.neighbours[_OPPOSITE[direction], room] = other
            case [actor, verb, *_, "to", "the", place] if _KINDS.get(verb) == "move":
                self.place[actor] = place
                for thing, holder in self.holder.items():
                    if holder == actor:
                        self._see(thing, place)
            case [actor, verb, "the", thing, "to", receiver] if _KINDS.get(verb) == "give":
                self.gifts.append((actor, thing, receiver))
                self.holder[thing] = receiver
            case [actor, verb, *_, "the", thing] | [actor, verb, *_, "the", thing, "there"] if verb in _KINDS:
                self.holder[thing] = actor if _KINDS[verb] == "get" else None
                if actor in self.place:
                    self._see(thing, self.place[actor])
            case _:
                raise ValueError(f"no statement of tasks qa1-qa5: {statement!r}")

    def answers(self, question: str) -> tuple[str, ...]:
        """The answers to a question, best first: none where nothing is known, otherwise usually one.

        There are several only for "What did X give to Y?" when X gave Y several things: bAbI then accepts any of them.
        Raises ValueError for a sentence that is not a question of these tasks.
        """
        found: Sequence[str | None]
        match question.removesuffix("?").split():
            case ["Where", "is", "the", thing]:
                found = self.history.get(thing, [])[-1:]
            case ["Where", "is", person]:
                found = [self.place.get(person)]
            case ["Where", "was", "the", thing, "before", "the", place]:
                visits = self.history.get(thing, [])
                found = [visits[i - 1] for i in range(len(visits) - 1, 0, -1) if visits[i] == place][:1]
            case ["What", "is", direction, "of", "the", room]:
                found = [self.neighbours.get((direction, room))]
            case ["What", "is", "the", room, direction, "of"] if direction in _OPPOSITE:
                found = [self.neighbours.get((_OPPOSITE[direction], room))]
            case ["What", "did", giver, "give", "to", receiver]:
                found = [thing for who, thing, whom in reversed(self.gifts) if (who, whom) == (giver, receiver)]
            case ["Who", "gave", "the", thing, "to", receiver]:
                found = [who for who, what, whom in reversed(self.gifts) if (what, whom) == (thing, receiver)][:1]
            case ["Who", "gave", "the", thing]:
                found = [who for who, what, _ in reversed(self.gifts) if what == thing][:1]
            case ["Who", "received", "the", thing]:
                found = [whom for _, what, whom in reversed(self.gifts) if what == thing][:1]
            case ["Who", "did", giver, "give", "the", thing, "to"]:
                found = [whom for who, what, whom in reversed(self.gifts) if (who, what) == (giver, thing)][:1]
            case _:
                raise ValueError(f"no question of tasks qa1-qa5: {question!r}")
        return tuple(dict.fromkeys(answer for answer in found if answer is not None))

    def questions(self, task: Task) -> list[str]:
        """The questions of a task that now have exactly one answer; likelier ones are listed several times."""
        match task:
            case "qa1":
                return [f"Where is {person}?" for person in self.place]
            case "qa2":
                return [f"Where is the {thing}?" for thing, visits in self.history.items() if visits]
            case "qa3":
                return [text for thing, visits in self.history.items() for text in _before_questions(thing, visits)]
            case "qa4":
                # A room with a neighbour on both sides is asked about twice as often, as in bAbI.
                degree = [room for _, room in self.neighbours]
                return [
                    text
                    for direction, room in self.neighbours
                    for text in (
                        f"What is {direction} of the {room}?",
                        f"What is the {room} {_OPPOSITE[direction]} of?",
                    )
                    for _ in range(degree.count(room))
                ]
            case "qa5":
                asked = [text for gift in self.gifts for text in _gift_questions(*gift)]
                return [text for text in asked if not text.startswith("What") or len(self.answers(text)) == 1]

    def _see(self, thing: str, place: str) -> None:
        visits = self.history.setdefault(thing, [])
        if not visits or visits[-1] != place:
            visits.append(place)


def generate_story(
    task: Task,
    rng: np.random.Generator,
    num_facts: int,
    questions_between: int,
    questions_after: int,
    asked_between: Sequence[Task] | None = None,
) -> Story:
    """Makes up a story of a bAbI task.

    Args:
      task: qa1 to qa5.
      rng: the source of all choices.
      num_facts: statements, at least 1; more if no question can be asked yet. qa4 has at most 5.
      questions_between: questions before the last statement; fewer if too little is known by then.
      questions_after: questions after the last statement, all different; fewer if there is less to ask.
      asked_between: tasks of the questions before the last statement; None: the story's own.

    Returns:
      Statements and questions; the last line is a question.
    """
    draws = _draws(rng)
    if task == "qa4":
        num_facts = min(num_facts, len(_PLACES) - 1)
        facts = _map(draws, num_facts)
    else:
        facts = _actions(task, draws, num_facts)
    between = [1 + int(next(draws) * (num_facts - 1)) for _ in range(questions_between)] if num_facts > 1 else []
    world, waiting, lines = World(), 0, list[Line]()
    for told, fact in enumerate(facts, 1):
        world.tell(fact)
        lines.append(Statement(fact))
        if told >= num_facts and world.questions(task):
            break
        waiting += between.count(told)
        if waiting:
            asked = _ask(asked_between or (task,), world, draws, waiting)
            waiting -= len(asked)
            lines += asked
    return (*lines, *_ask((task,), world, draws, questions_after))


def _draws(rng: np.random.Generator) -> Iterator[float]:
    """Yields uniform numbers in [0, 1), drawn in blocks: one call for each would take ten times as long."""
    while True:
        yield from rng.random(128).tolist()


def _pick(draws: Iterator[float], options: Sequence[_T]) -> _T:
    return options[int(next(draws) * len(options))]


def _ask(tasks: Sequence[Task], world: World, draws: Iterator[float], count: int) -> list[Question]:
    """Picks up to `count` different questions."""
    asked, open_questions = [], [text for task in tasks for text in world.questions(task)]
    while open_questions and len(asked) < count:
        text = _pick(draws, open_questions)
        asked.append(Question(text, world.answers(text)[0]))
        open_questions = [other for other in open_questions if other != text]
    return asked


def _actions(task: Task, draws: Iterator[float], num_facts: int) -> Iterator[str]:
    """An endless play of people who move, pick up, drop and (qa5) give.

    Everyone and everything starts somewhere that only the play knows, so an object may be taken "there" before the
    reader can tell where; `hidden` is the world with that knowledge. After `num_facts` acts mostly one actor
    continues, which soon gives something to ask about.
    """
    people = _QA5_PEOPLE if task == "qa5" else PEOPLE
    hidden = World(place={person: _pick(draws, _PLACES) for person in people})
    if task != "qa1":
        hidden.history = {thing: [_pick(draws, _PLACES)] for thing in _OBJECTS}
    for told in itertools.count():
        if told < num_facts or next(draws) < 0.25:
            actor = _pick(draws, people)
        here = hidden.place[actor]
        held = [thing for thing, holder in hidden.holder.items() if holder == actor]
        free = [
            thing for thing, visits in hidden.history.items() if visits[-1] == here and not hidden.holder.get(thing)
        ]
        company = [person for person in people if person != actor and hidden.place[person] == here]
        kinds = ["move"] + ["get"] * bool(free) + ["drop"] * bool(held)
        if task == "qa5" and held and company:
            kinds += ["give"] * 4
        kind = _pick(draws, kinds)
        act = f"{actor} {_pick(draws, _VERBS[kind])}"
        if kind == "move":
            statement = f"{act} to the {_pick(draws, [place for place in _PLACES if place != here])}."
        elif kind == "give":
            statement = f"{act} the {_pick(draws, held)} to {_pick(draws, company)}."
        else:
            there = " there" if next(draws) < 0.2 or (kind == "get" and task != "qa3") else ""
            statement = f"{act} the {_pick(draws, free if kind == 'get' else held)}{there}."
        hidden.tell(statement)
        yield statement


def _map(draws: Iterator[float], num_facts: int) -> Iterator[str]:
    """Describes rooms in a straight line (qa4): each pair of neighbours once, in any order and from either side."""
    rooms = sorted(_PLACES, key=lambda _: next(draws))[: num_facts + 1]
    direction = _pick(draws, tuple(_OPPOSITE))
    for room, other in sorted(itertools.pairwise(rooms), key=lambda _: next(draws)):
        if next(draws) < 0.5:
            yield f"The {room} is {direction} of the {other}."
        else:
            yield f"The {other} is {_OPPOSITE[direction]} of the {room}."


def _before_questions(thing: str, visits: Sequence[str]) -> Iterator[str]:
    """Asks where a thing was before its present place (four times as often, as in bAbI) and before the previous one."""
    if len(visits) > 1:
        yield from [f"Where was the {thing} before the {visits[-1]}?"] * 4
    if len(visits) > 2:
        yield f"Where was the {thing} before the {visits[-2]}?"


def _gift_questions(giver: str, thing: str, receiver: str) -> tuple[str, ...]:
    """Asks for the object, the giver or the receiver, each equally often."""
    return (
        *(f"What did {giver} give to {receiver}?",) * 2,
        f"Who gave the {thing} to {receiver}?",
        f"Who gave the {thing}?",
        f"Who received the {thing}?",
        f"Who did {giver} give the {thing} to?",
    )
