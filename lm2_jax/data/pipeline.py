"""From a config to lanes: which documents there are, which are held out, and in which order lanes read them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain

from lm2_jax.common.errors import UserError
from lm2_jax.config import Config, DataConfig, StageConfig
from lm2_jax.data.babi.sources import QuestionSource, StorySource
from lm2_jax.data.documents import (
    BinSource,
    DocumentSource,
    JsonLinesSource,
    TextSource,
    split_documents,
)
from lm2_jax.data.lanes import LaneDataset, documents_in_order, shuffled_documents
from lm2_jax.data.mixture import Mixture
from lm2_jax.data.official_order import OfficialItems
from lm2_jax.data.paths import expand_paths
from lm2_jax.data.prepared import MANIFEST, PreparedSource
from lm2_jax.tokenizer import Tokenizer


class Pipeline:
    """The training and the validation documents of a run, laid into lanes for any stage of its curriculum."""

    def __init__(self, config: Config, tokenizer: Tokenizer | None, own_lanes: Sequence[int] | None = None) -> None:
        """Opens the files that `config.data` names. Raises UserError where they are missing, damaged or empty.

        tokenizer: None for `.bin` shards, which hold ids.
        own_lanes: the lanes of this process, of several; None if it is the only one.
        """
        self._config = config
        self._own_lanes = own_lanes
        if own_lanes is not None and config.data.source in ("text", "jsonl"):
            raise UserError(
                f"data.source {config.data.source}: raw text is tokenised as it is read, by a single process; "
                "several processes need data that is prepared once for all of them (tools/prepare_data.py)"
            )
        self._tokenizer = tokenizer
        self._files: tuple[DocumentSource, DocumentSource | None] | None = None
        self._stories: dict[StageConfig, tuple[StorySource, StorySource]] = {}
        if config.data.source != "stories":
            self._files = self._open_files()
        else:
            self._check_stories()

    def training(self, stage: StageConfig) -> LaneDataset:
        """Windows of training documents, in an order that depends on train.seed alone."""
        return self._lanes(self.sources(stage)[0], stage)

    def validation(self, stage: StageConfig) -> LaneDataset | None:
        """Windows of the documents held out; None if there are none. The same ones from every fresh iterator."""
        held_out = self.sources(stage)[1]
        return None if held_out is None else self._lanes(held_out, stage)

    def fingerprint(self) -> str:
        """16 hex digits that change with the tokenizer, with files' names and sizes, with manifests and weights."""
        data, parts = self._config.data, [self._tokenizer.fingerprint() if self._tokenizer else ""]
        for key in ("path", "validation_path", "background"):
            paths = getattr(data, key) or ()
            if data.source == "prepared" and key != "background":
                parts += [f"{key} {_manifest_digest(path)}" for path in paths]
            elif paths:
                parts += [f"{key} {path.name} {path.stat().st_size}" for path in expand_paths(paths, f"data.{key}")]
        parts += [f"mixture {_manifest_digest(part.path)} {part.weight!r}" for part in data.mixture]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def sources(self, stage: StageConfig) -> tuple[DocumentSource, DocumentSource | None]:
        """Training documents and those held out; stories are as long as the stage's window."""
        if self._files is not None:
            return self._files
        if stage not in self._stories:
            self._stories[stage] = self._make_stories(stage, held_out=False), self._make_stories(stage, held_out=True)
        return self._stories[stage]

    def _make_stories(self, stage: StageConfig, held_out: bool) -> StorySource:
        return StorySource(
            self._config.data,
            self._tokenizer,
            budget=stage.segments * stage.segment_length,
            seed=self._config.train.seed,
            held_out=held_out,
            segment_length=stage.segment_length,
        )

    def question_sets(self) -> Iterator[tuple[str, Callable[[int | None], QuestionSource]]]:
        """Names of sets of questions, and what makes them for a context of so many tokens (None: no background).

        First the held-out stories of what is trained on: each task of the generator, or each file of data.path; then
        the files of eval.path.
        """
        data, ask = self._config.data, self._config.eval

        def among(data: DataConfig, **which: Any) -> Callable[[int | None], QuestionSource]:
            return lambda budget: QuestionSource(
                data,
                self._tokenizer,
                budget=budget,
                seed=self._config.train.seed,
                count=ask.questions,
                segment_length=self._config.stages[-1].segment_length,
                **which,
            )

        if data.path is None:
            for task in data.stories.tasks:
                stories = data.stories.model_copy(update={"tasks": (task,)})
                yield f"{task} (generator)", among(data.model_copy(update={"stories": stories}))
        else:
            for path in expand_paths(data.validation_path or data.path, "data.path"):
                held_out = data.validation_path is None
                yield f"{path.name} (held out)", among(data, paths=(str(path),), key="data.path", held_out=held_out)
        for path in expand_paths(ask.path, "eval.path") if ask.path else ():
            yield path.name, among(data, paths=(str(path),))

    def _check_stories(self) -> None:
        """Finds bad files and segments that are too short for a story now, not when their stage or the end comes."""
        stages, lengths = self._config.stages, self._config.eval.lengths
        self.sources(min(stages, key=lambda stage: stage.segments * stage.segment_length))
        shortest = min(filter(None, lengths), default=0)  # what fits the shortest context fits all of them
        for _, make_source in self.question_sets():
            make_source(shortest * stages[-1].segment_length or None)

    def _open_files(self) -> tuple[DocumentSource, DocumentSource | None]:
        data = self._config.data
        if data.mixture:
            return self._open_mixture()
        training = self._open(data.path, "data.path")
        if data.validation_path is not None:
            return training, self._open(data.validation_path, "data.validation_path")
        if data.order == "official":  # whose validation is other shards
            return training, None
        return split_documents(training, data.validation_fraction, self._config.train.seed)

    def _open_mixture(self) -> tuple[DocumentSource, DocumentSource | None]:
        """Of every part a share is held out; both kinds of documents are mixed by the same weights."""
        data = self._config.data
        weights, pairs, problems = [part.weight for part in data.mixture], [], []
        for number, part in enumerate(data.mixture):
            try:
                whole = self._open((part.path,), f"data.mixture.{number}.path")
                fraction = 0 if data.validation_path else data.validation_fraction
                pairs.append(split_documents(whole, fraction, self._config.train.seed))
            except UserError as error:
                problems.append(str(error))
        if problems:
            raise UserError("\n".join(problems))
        training, held_out = zip(*pairs, strict=True)
        if data.validation_path:
            return Mixture(training, weights), self._open(data.validation_path, "data.validation_path")
        return Mixture(training, weights), None if None in held_out else Mixture(held_out, weights)

    def _open(self, paths: tuple[str, ...], key: str) -> DocumentSource:
        data = self._config.data
        if data.order == "official":
            T = self._config.stages[0].segment_length
            return OfficialItems(paths, self._config.model.vocab_size, data.batch_size, T, key=key)
        if data.source == "bin":
            return BinSource(paths, self._config.model.vocab_size, data.begin_id, key=key)
        if data.source == "prepared":
            return PreparedSource(paths, self._tokenizer.fingerprint(), key=key)
        if data.source == "jsonl":
            return JsonLinesSource(paths, self._tokenizer, key=key)
        return TextSource(paths, self._tokenizer, data.document_separator, key=key)

    def _lanes(self, source: DocumentSource, stage: StageConfig) -> LaneDataset:
        def in_order(items: Sequence[Any]) -> grain.MapDataset[Any]:
            if self._config.data.order == "official":
                return documents_in_order(items)
            if isinstance(source, Mixture):
                return source.shuffled(self._config.train.seed).map(items.__getitem__)
            return shuffled_documents(items, self._config.train.seed)

        return LaneDataset(
            in_order(source),
            num_lanes=self._config.data.batch_size,
            segments=stage.segments,
            segment_length=stage.segment_length,
            boundaries=self._config.data.boundaries,
            documents_per_epoch=len(source),
            lengths=None if source.lengths is None else in_order(source.lengths),
            own_lanes=self._own_lanes,
        )


def held_out_files(data: DataConfig) -> list[Path]:
    """The files that hold a run's validation documents; of prepared data, the manifests."""
    paths = data.validation_path or data.path or tuple(part.path for part in data.mixture)
    return [Path(path) / MANIFEST for path in paths] if data.source == "prepared" else expand_paths(paths, "data.path")


def _manifest_digest(directory: str) -> str:
    """Changes with anything that a prepared directory holds: its manifest has the checksums."""
    return hashlib.sha256((Path(directory) / MANIFEST).read_bytes()).hexdigest()
