"""From a config to lanes: the documents of a run, those that are held out, and the lanes that read them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lm2_jax.common.errors import UserError
from lm2_jax.common.files import content_digest, expand_paths
from lm2_jax.common.local_copies import local_copy
from lm2_jax.common.storage import AnyPath, to_path
from lm2_jax.config import Config, DataConfig, StageConfig
from lm2_jax.data.babi.sources import QuestionSource, StoryFiles, StorySource
from lm2_jax.data.documents import BinSource, DocumentSource, JsonLinesSource, Mixture, TextSource, split_documents
from lm2_jax.data.lanes import LaneDataset, Lanes
from lm2_jax.data.official_order import OfficialItems
from lm2_jax.data.prepared import MANIFEST, PreparedSource
from lm2_jax.tokenizer import Tokenizer


class Pipeline:
    """The training and the validation documents of a run, laid into lanes for any stage of its curriculum."""

    def __init__(self, config: Config, tokenizer: Tokenizer | None, own_lanes: Sequence[int] | None = None) -> None:
        """Opens the files that `config.data` names. Raises UserError where they are missing, damaged or empty.

        tokenizer: None for `.bin` shards, which hold ids.
        own_lanes: the lanes of this process; None if it is the only process.
        """
        self._config = config
        self._own_lanes = own_lanes
        if own_lanes is not None and config.data.source in ("text", "jsonl"):
            raise UserError(
                f"data.source {config.data.source}: raw text is tokenised as it is read, by a single process; "
                "several processes need data that is prepared once for all of them (lm2_jax.prepare_data)"
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
        """Windows of held-out documents, the same from every fresh iterator; None if nothing is held out."""
        held_out = self.sources(stage)[1]
        return None if held_out is None else self._lanes(held_out, stage)

    def fingerprint(self) -> str:
        """16 hex digits that change with the tokenizer, files' names and contents, manifests and weights.

        See `content_digest` for files beyond a gigabyte.
        """
        return self._fingerprint(content_digest)

    def fingerprint_by_size(self) -> str:
        """The fingerprint that earlier versions took, which changes with files' sizes instead of their contents."""
        return self._fingerprint(lambda path: path.stat().st_size)

    def _fingerprint(self, describe: Callable[[Path], object]) -> str:
        data, lines = self._config.data, [self._tokenizer.fingerprint() if self._tokenizer else ""]
        for key in ("path", "validation_path", "background"):
            paths = getattr(data, key) or ()
            if data.source == "prepared" and key != "background":
                lines += [f"{key} {_manifest_digest(path)}" for path in paths]
            elif paths:
                lines += [
                    f"{key} {path.name} {describe(local_copy(path))}" for path in expand_paths(paths, f"data.{key}")
                ]
        lines += [f"mixture {_manifest_digest(part.path)} {part.weight!r}" for part in data.mixture]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def sources(self, stage: StageConfig) -> tuple[DocumentSource, DocumentSource | None]:
        """Training documents and held-out ones (None without any); stories are as long as the stage's window."""
        if self._files is not None:
            return self._files
        if stage not in self._stories:
            self._stories[stage] = tuple(
                StorySource(
                    self._config.data,
                    self._tokenizer,
                    budget=stage.segments * stage.segment_length,
                    seed=self._config.train.seed,
                    held_out=held_out,
                    segment_length=stage.segment_length,
                )
                for held_out in (False, True)
            )
        return self._stories[stage]

    def question_sets(self) -> Iterator[tuple[str, Callable[[int | None], QuestionSource]]]:
        """Yields the name of each set of questions, and a function of the context's tokens (None: no background).

        First come held-out stories of the training data: each task of the generator, or each file of data.path; then
        the files of eval.path.
        """
        data, settings = self._config.data, self._config.eval

        def among(data: DataConfig, files: StoryFiles | None = None) -> Callable[[int | None], QuestionSource]:
            return lambda budget: QuestionSource(
                data,
                self._tokenizer,
                budget=budget,
                seed=self._config.train.seed,
                count=settings.questions,
                files=files,
                segment_length=self._config.stages[-1].segment_length,
            )

        if data.path is None:
            for task in data.stories.tasks:
                stories = data.stories.model_copy(update={"tasks": (task,)})
                yield f"{task} (generator)", among(data.model_copy(update={"stories": stories}))
        else:
            for path in expand_paths(data.validation_path or data.path, "data.path"):
                side = "all" if data.validation_path else "held out"
                yield f"{path.name} (held out)", among(data, StoryFiles((str(path),), "data.path", side))
        for path in expand_paths(settings.path, "eval.path") if settings.path else ():
            yield path.name, among(data, StoryFiles((str(path),), "eval.path"))

    def _check_stories(self) -> None:
        """Finds bad files and too short segments at the start, not when their stage or the evaluation begins."""
        stages, lengths = self._config.stages, self._config.eval.lengths
        self.sources(min(stages, key=lambda stage: stage.segments * stage.segment_length))
        shortest = min(filter(None, lengths), default=0)  # a story that fits the shortest context fits all of them
        for _, make_source in self.question_sets():
            make_source(shortest * stages[-1].segment_length or None)

    def _open_files(self) -> tuple[DocumentSource, DocumentSource | None]:
        data = self._config.data
        if data.mixture:
            return self._open_mixture()
        training = self._open(data.path, "data.path")
        if data.validation_path is not None:
            return training, self._open(data.validation_path, "data.validation_path")
        if data.order == "official":  # the official trainer validates on other shards
            return training, None
        return split_documents(training, data.validation_fraction, self._config.train.seed)

    def _open_mixture(self) -> tuple[DocumentSource, DocumentSource | None]:
        """Holds out a share of every source; training and held-out documents are mixed by the same weights."""
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
            return PreparedSource(paths, self._tokenizer.fingerprint(), key, int(data.cache_gb * 1e9))
        if data.source == "jsonl":
            return JsonLinesSource(paths, self._tokenizer, key=key)
        return TextSource(paths, self._tokenizer, data.document_separator, key=key)

    def _lanes(self, source: DocumentSource, stage: StageConfig) -> LaneDataset:
        data = self._config.data
        lanes = Lanes(data.batch_size, stage.segments, stage.segment_length, data.boundaries, self._own_lanes)
        return LaneDataset(source, source.ordinals(self._config.train.seed), lanes)


def held_out_files(data: DataConfig) -> list[AnyPath]:
    """Lists the files that hold a run's validation documents: manifests where data is prepared."""
    paths = data.validation_path or data.path or tuple(part.path for part in data.mixture)
    if data.source == "prepared":
        return [to_path(path) / MANIFEST for path in paths]
    return expand_paths(paths, "data.path")


def _manifest_digest(directory: str) -> str:
    """A digest that changes with anything in a prepared directory, since its manifest holds checksums."""
    return hashlib.sha256((to_path(directory) / MANIFEST).read_bytes()).hexdigest()
