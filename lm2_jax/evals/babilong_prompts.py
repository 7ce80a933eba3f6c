"""Instructions, examples and answer formats of the BABILong tasks, in our words, and the labels of their answers.

The structure is the official one (arXiv 2406.10149); the texts are ours, since the official ones are not part of this
repository. Scores of instruction-tuned models therefore compare with each other, but not exactly with published ones.
"""

from __future__ import annotations

from typing import NamedTuple

from lm2_jax.config import BabilongTask
from lm2_jax.data.babi.babilong import Sample

_TEMPLATE = "{instruction}\n\n{examples}\n\n{post_prompt}\n\n<context>\n{context}\n</context>\n\nQuestion: {question}"


class Task(NamedTuple):
    """The texts of a task's prompt, and the labels of its answers."""

    labels: tuple[str, ...]
    instruction: str
    examples: tuple[tuple[str, str, str], ...]  # context, question, answer
    post_prompt: str


def official_prompt(sample: Sample, task: BabilongTask) -> str:
    """Instruction, examples, answer format, context and question, as one text."""
    text = TASKS[task]
    examples = "\n\n".join(
        f"<example>\n{context}\n{question}\nAnswer: {answer}\n</example>" for context, question, answer in text.examples
    )
    return _TEMPLATE.format(
        instruction=f"I give you a text in which some facts are hidden. {text.instruction}",
        examples=examples,
        post_prompt=text.post_prompt,
        context=sample.context,
        question=sample.question,
    )


_ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
_PLACES = ("bedroom", "cinema", "kitchen", "office", "park", "school")
_WHERE = "Answer with the name of one room alone."
_YES_NO = "Answer with one word: yes or no."

TASKS: dict[BabilongTask, Task] = {
    "qa1": Task(
        _ROOMS,
        "They say where people go. Answer a question about where somebody is now.",
        (("Anna went to the office. Anna moved to the garden.", "Where is Anna?", "garden"),),
        "Only the last move of a person counts. " + _WHERE,
    ),
    "qa2": Task(
        _ROOMS,
        "They say where people go and what they carry. Answer a question about where an object is now.",
        (("Anna took the apple. Anna moved to the garden.", "Where is the apple?", "garden"),),
        "An object is with the one who carries it, or where it was left. " + _WHERE,
    ),
    "qa3": Task(
        _ROOMS,
        "They say where people go and what they carry. Answer a question about where an object was before.",
        (
            (
                "Anna got the milk. Anna went to the office. Anna moved to the garden.",
                "Where was the milk before the garden?",
                "office",
            ),
        ),
        "Follow the places that the object was in, in their order. " + _WHERE,
    ),
    "qa4": Task(
        _ROOMS,
        "They say how rooms lie to each other. Answer a question about which room lies in a direction.",
        (("The garden is north of the office.", "What is north of the office?", "garden"),),
        _WHERE,
    ),
    "qa5": Task(
        ("Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk"),
        "They say who gives what to whom. Answer a question about the giver, the receiver or the object.",
        (("Bill gave the milk to Mary.", "Who gave the milk?", "Bill"),),
        "Only the last time counts. Answer with one name or one object alone.",
    ),
    "qa6": Task(
        ("no", "yes"),
        "They say where people go. Answer whether somebody is in a room.",
        (("Anna went to the office.", "Is Anna in the office?", "yes"),),
        _YES_NO,
    ),
    "qa7": Task(
        ("none", "one", "three", "two"),
        "They say who picks up and drops what. Answer how many objects somebody carries.",
        (("Anna took the apple. Anna got the milk.", "How many objects is Anna carrying?", "two"),),
        "Answer with one word: none, one, two or three.",
    ),
    "qa8": Task(
        ("apple", "football", "milk", "nothing"),
        "They say who picks up and drops what. Answer what somebody carries.",
        (("Anna took the apple. Anna got the milk.", "What is Anna carrying?", "apple,milk"),),
        "Answer with the objects alone, commas between them, or with nothing.",
    ),
    "qa9": Task(
        ("no", "yes"),
        "They say where people are and where they are not. Answer whether somebody is in a room.",
        (("Anna is no longer in the office.", "Is Anna in the office?", "no"),),
        _YES_NO,
    ),
    "qa10": Task(
        ("maybe", "no", "yes"),
        "They say where people are, or in which of two places. Answer whether somebody is in a place.",
        (("Anna is either in the park or the school.", "Is Anna in the park?", "maybe"),),
        "Answer with one word: yes, no or maybe.",
    ),
    "qa11": Task(
        _ROOMS,
        "They say where people go; he and she mean the one named before. Answer where somebody is now.",
        (("Anna went to the office. Then she moved to the garden.", "Where is Anna?", "garden"),),
        _WHERE,
    ),
    "qa12": Task(
        _ROOMS,
        "They say where two people go together. Answer where somebody is now.",
        (("Anna and Paul went to the office.", "Where is Paul?", "office"),),
        _WHERE,
    ),
    "qa13": Task(
        _ROOMS,
        "They say where two people go together; they means those named before. Answer where somebody is now.",
        (("Anna and Paul went to the office. Then they moved to the garden.", "Where is Paul?", "garden"),),
        _WHERE,
    ),
    "qa14": Task(
        _PLACES,
        "They say where people went and at what time, not in order. Answer where somebody was before a place.",
        (
            (
                "Anna went to the park this morning. Yesterday Anna went to the school.",
                "Where was Anna before the park?",
                "school",
            ),
        ),
        "Put yesterday, morning, afternoon and evening in order. Answer with the name of one place alone.",
    ),
    "qa15": Task(
        ("cat", "mouse", "sheep", "wolf"),
        "They say which animals are afraid of which, and what animal somebody is. Answer what somebody is afraid of.",
        (("Sheep are afraid of wolves. Emma is a sheep.", "What is Emma afraid of?", "wolf"),),
        "Answer with one animal, in the singular.",
    ),
    "qa16": Task(
        ("gray", "green", "white", "yellow"),
        "They say what animal and what color somebody is. Animals of a kind are alike. Answer the color of somebody.",
        (("Emma is a swan. Emma is white. Otto is a swan.", "What color is Otto?", "white"),),
        "Answer with one color alone.",
    ),
    "qa17": Task(
        ("no", "yes"),
        "They say how shapes lie to each other. Answer whether one lies as the question says.",
        (("The red square is above the blue circle.", "Is the blue circle below the red square?", "yes"),),
        _YES_NO,
    ),
    "qa18": Task(
        ("no", "yes"),
        "They say which things are bigger and which fit into others. Answer a question about sizes.",
        (("The box fits inside the chest.", "Is the chest bigger than the box?", "yes"),),
        _YES_NO,
    ),
    "qa19": Task(
        ("e,e", "e,n", "e,s", "n,e", "n,n", "n,w", "s,e", "s,s", "s,w", "w,n", "w,s", "w,w"),
        "They say how rooms lie to each other. Answer how one goes from one to another in two steps.",
        (
            (
                "The garden is north of the office. The kitchen is east of the garden.",
                "How do you go from the office to the kitchen?",
                "n,e",
            ),
        ),
        "Answer with two letters of n, e, s and w, a comma and no space between them.",
    ),
    "qa20": Task(
        ("bedroom", "bored", "garden", "hungry", "kitchen", "thirsty", "tired"),
        "They say how people feel, where they go and what they take. Answer why they do so, or where they will go.",
        (("Anna is thirsty.", "Where will Anna go?", "kitchen"),),
        "Answer with one place or one feeling alone.",
    ),
}
