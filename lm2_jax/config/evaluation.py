"""The sections of a config that evaluation reads."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, JsonValue, model_validator

from lm2_jax.config.sections import (
    ONE_OR_MORE,
    NonEmptyStr,
    NonNegativeInt,
    PositiveInt,
    Section,
    Texts,
    TokenizerConfig,
    pattern_problem,
    raise_problems,
)


class PerplexityConfig(Section):
    """Loss and perplexity of documents (evaluate --task perplexity)."""

    path: Texts | None = None  # files or globs; null: the run's validation documents
    source: Literal["text", "jsonl", "bin"] | None = None  # null: by file name, .txt, .jsonl or .bin
    document_separator: str | None = None  # text: see data.document_separator

    @model_validator(mode="after")
    def _regular_expression(self) -> Self:
        if problem := pattern_problem(self.document_separator):
            raise ValueError(problem)
        return self


BabilongTask = Literal[
    "qa1", "qa2", "qa3", "qa4", "qa5", "qa6", "qa7", "qa8", "qa9", "qa10",
    "qa11", "qa12", "qa13", "qa14", "qa15", "qa16", "qa17", "qa18", "qa19", "qa20",
]  # fmt: skip
BabilongTasks = Annotated[tuple[BabilongTask, ...], Field(min_length=1), ONE_OR_MORE]


class BabilongConfig(Section):
    """Questions about facts in long contexts (evaluate --task babilong)."""

    tasks: BabilongTasks = ("qa1", "qa2", "qa3", "qa4", "qa5")  # bAbI tasks
    lengths: Annotated[Texts, Field(min_length=1)] = ("0k", "1k", "2k", "4k")  # tokens of context, 1k: 1000, 1M: 1000k
    samples: PositiveInt = 100  # samples of each task at each length
    path: NonEmptyStr | None = None  # directory of samples in the hub's layout; null: build samples
    babi: NonEmptyStr | None = None  # directory of bAbI files to build from; null: generated stories (qa1 to qa5)
    books: Texts | None = None  # text files to scatter the facts in; null: built-in sentences
    counter: TokenizerConfig | None = None  # tokenizer by which contexts are measured; null: the model's
    prompt: Literal["official", "plain"] = "official"  # plain: context and question only, as in training on stories
    max_new_tokens: PositiveInt = 20  # longest generated answer
    retrieval: Literal["bm25"] | None = None  # the model reads the sentences that this finds for the question, not all
    retrieved: PositiveInt = 5  # how many sentences

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        wrong = [length for length in self.lengths if not re.fullmatch(r"\d+[kM]", length)]
        problems = [f"lengths: found {length!r}; write 0k, 4k, 128k or 1M" for length in wrong]
        for name in ("tasks", "lengths"):
            values = getattr(self, name)
            problems += [
                f"{name}: {value} appears twice" for value in sorted({v for v in values if values.count(v) > 1})
            ]
        if self.path and (self.babi or self.books):
            problems.append(f"path {self.path!r} holds whole samples; leave out babi and books, or leave out path")
        raise_problems(problems)
        return self


class MmluConfig(Section):
    """Multiple-choice questions on many subjects (evaluate --task mmlu)."""

    path: NonEmptyStr | None = None  # directory with dev/*_dev.csv and test/*_test.csv; null: download from the hub
    subjects: Texts | None = None  # subjects, such as astronomy; null: all
    shots: NonNegativeInt = 5  # solved questions in front of each question
    limit: PositiveInt | None = None  # questions per subject; null: all
    chat: bool = False  # ask in the model's chat template, shots as turns of the conversation


class Mapping(dict[str, Any]):
    """A mapping of JSON values that, like every setting, can be hashed."""

    def __hash__(self) -> int:
        return hash(json.dumps(self, sort_keys=True))


class HarnessConfig(Section):
    """Tasks of lm-evaluation-harness (evaluate --task harness)."""

    tasks: Texts = ()  # names of tasks, groups or tags, or YAML files of tasks
    include: NonEmptyStr | None = None  # directory with task files of your own
    metadata: Annotated[dict[str, JsonValue], AfterValidator(Mapping)] = Mapping()  # settings of tasks, as lm-eval's
    shots: NonNegativeInt | None = None  # solved examples in front of each question; null: the task's own number
    limit: PositiveInt | None = None  # samples per task; null: all
    chat: bool = False  # ask in the model's chat template, shots as turns of the conversation


class EvalConfig(Section):
    """Validation during training, accuracy by context length at its end, and the tasks of `evaluate`."""

    every_steps: NonNegativeInt = 100  # steps between two validations; 0: only at the end
    windows: PositiveInt = 8  # validation windows, each of batch_size lanes
    lengths: tuple[NonNegativeInt, ...] = (1, 2, 4, 8, 16, 32)  # stories: context lengths in segments; 0: no background
    one_segment: bool = False  # stories: read each context as one segment, with attention over all of it
    questions: PositiveInt = 1000  # stories: questions per context length
    path: Texts | None = None  # stories: bAbI test files to report next to the held-out stories
    perplexity: PerplexityConfig = PerplexityConfig()  # evaluate --task perplexity
    babilong: BabilongConfig = BabilongConfig()  # evaluate --task babilong
    mmlu: MmluConfig = MmluConfig()  # evaluate --task mmlu
    harness: HarnessConfig = HarnessConfig()  # evaluate --task harness
